"""``veneer-server doctor``: checks whether this configuration can serve on this machine.

Each check says what it found; a problem or warning also names the fix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

from veneer_server.config import ServerConfig
from veneer_server.operate.doctor import backends, base, machine, places
from veneer_server.operate.doctor.check import Check


def report(config: ServerConfig, say: Callable[[str], None], *, as_json: bool) -> bool:
    """Print the checks; return True if the server could start."""
    checks = list(examine(config))
    healthy = all(check.status != "problem" for check in checks)
    if as_json:
        say(json.dumps({"healthy": healthy, "checks": [asdict(c) for c in checks]}, indent=2))
        return healthy
    for check in checks:
        say(f"{check.status:8} {check.name:13} {check.found}")
        if check.fix:
            say(f"{'':8} {'':13} -> {check.fix}")
    return healthy


def examine(config: ServerConfig) -> Iterator[Check]:
    """All checks, ordered so that the first problem explains later ones."""
    yield machine.python_check()
    yield from map(machine.package_check, machine.PACKAGES)
    yield machine.no_kernels_check()
    if config.role != "registry":  # a registry has no engine
        yield from backends.torch_checks(config)
    yield from base.base_checks(config)
    yield base.memory_check(config)
    owner = places.owner_of(config.data_dir)
    yield from places.folder_checks("data folder", "--data-dir", config.data_dir)
    if owner is not None:
        yield places.running_check(owner, config.data_dir)
    yield from map(
        places.only_slower,
        places.folder_checks("cache folder", "--cache-dir", config.cache_dir),
    )
    for flag, address in (
        ("--listen", config.listen),
        ("--metrics-listen", config.metrics_listen),
        ("--openai-listen", config.openai_listen),
        ("--admin-listen", config.admin_listen),
    ):
        if address is not None:
            yield places.port_check(flag, address, running=owner is not None)
    if config.openai_listen is not None:
        yield machine.gateway_check()
    yield machine.open_files_check()
    yield machine.clock_check()
