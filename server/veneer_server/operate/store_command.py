"""The commands ``veneer-server store verify``, ``store gc`` and ``store recover``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from veneer_registry import rebuild, upkeep
from veneer_registry.errors import InvalidField
from veneer_registry.terminal import Guard

from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.serving.tenants import FOLDER, LocationConfig, address_of, objects_of

_MIB = 1 << 20


def verify(
    data_dir: Path, tell: Callable[[str], None], *, quarantine: bool, as_json: bool
) -> bool:
    """Check every stored byte; return True if all are intact.

    Args:
        quarantine: whether to quarantine damaged weights; needs the folder's lock.

    Raises as `upkeep.verify` and `upkeep.quarantine`.
    """
    found = upkeep.verify(data_dir, _progress if sys.stderr.isatty() else _silent)
    if quarantine and found.damaged:
        upkeep.quarantine(data_dir, found.damaged)
    whole = _tell_verified(found, tell, as_json=as_json, quarantine=quarantine)
    if not as_json:
        _tell_others(data_dir, tell)
    return whole


def verify_elsewhere(
    config: LocationConfig,
    tenant: str,
    tell: Callable[[str], None],
    *,
    quarantine: bool,
    as_json: bool,
) -> bool:
    """As `verify`, for a tenant's adapters in an object store with a catalog in PostgreSQL.

    Raises as `verify_shared`, and InvalidField for ``quarantine``.
    """
    if quarantine:
        raise InvalidField(
            "--quarantine works on a data folder only: with --store, servers quarantine "
            "damaged weights when they fetch them; push the adapters again to repair them",
            metadata={"field": "quarantine"},
        )
    address, objects = address_of(config, tenant), objects_of(config.store, tenant)
    from veneer_registry.shared.upkeep import verify_shared

    found = verify_shared(address, objects, _progress if sys.stderr.isatty() else _silent)
    whole = _tell_verified(found, tell, as_json=as_json, gone_by="the servers delete them")
    if not as_json and tenant == DEFAULT_TENANT and objects.any(FOLDER):
        tell("  this was the tenant default; for others give --tenant NAME")
    return whole


def _tell_verified(
    found: upkeep.Verified,
    tell: Callable[[str], None],
    *,
    as_json: bool,
    quarantine: bool = False,
    gone_by: str = "`store gc` removes them",
) -> bool:
    if as_json:
        tell(json.dumps(asdict(found)))
        return not found.damaged
    tell(
        f"{_names(found)}, {_count(found.weights, 'set')} of weights, "
        f"{found.bytes / _MIB:.1f} MiB: "
        + (f"{len(found.damaged)} damaged" if found.damaged else "all intact")
    )
    for damage in found.damaged:
        tell(f"  damaged {damage.kind} {damage.digest[:12]}: {damage.why}")
        tell(f"    used by {', '.join(damage.adapters)}")
    if quarantine and found.damaged:
        tell("  damaged weights are in quarantine: push the adapters again to repair them")
    for digest, why in found.quarantined.items():
        tell(f"  in quarantine {digest[:12]}: {why}")
    if found.unreferenced:
        tell(f"  {found.unreferenced} folders that no adapter uses: {gone_by}")
    if found.uploads:
        tell(f"  {found.uploads} uploads in progress or interrupted")
    return not found.damaged


def collect(
    data_dir: Path,
    tell: Callable[[str], None],
    *,
    upload_hours: float,
    quarantine: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove unneeded content. Raises as `upkeep.collect`."""
    removed = upkeep.collect(
        data_dir,
        uploads_older_than=time.time() - upload_hours * 3600,
        quarantine=quarantine,
        dry_run=dry_run,
    )
    if as_json:
        tell(json.dumps({**asdict(removed), "dry_run": dry_run}))
        return
    tell(
        f"{'would remove' if dry_run else 'removed'} {removed.unreferenced} folders that no "
        f"adapter uses, {removed.uploads} old uploads, {removed.quarantined} from quarantine: "
        f"{removed.bytes / _MIB:.1f} MiB"
    )
    _tell_others(data_dir, tell)


def recover(data_dir: Path, tell: Callable[[str], None], *, as_json: bool) -> None:
    """Rebuild the catalog. Raises as `rebuild.recover`."""
    found = rebuild.recover(data_dir, _progress if sys.stderr.isatty() else _silent)
    if as_json:
        tell(json.dumps(asdict(found)))
        return
    tell(
        f"{'recovered' if found.changed else 'nothing to recover: the catalog is intact,'} "
        + _names(found)
        + (f", {found.aliases} aliases" if found.changed else "")
    )
    for spec in found.from_store:
        tell(f"  {spec}: recovered from the store")
    for name, revision in found.current.items():
        tell(f"  {name} now points to {revision[:12]}")
    for name in found.nameless:
        tell(f"  {name}: its name is unknown; push it under its own name and delete this one")
    for spec in found.missing:
        tell(
            f"  {spec}: its content is not in the store; refused until it is restored or "
            "pushed again"
        )
    for digest, why in found.damaged.items():
        tell(f"  damaged {digest[:12]}: {why}")
    if found.lost_rows:
        tell(f"  {found.lost_rows} rows of the old catalog could not be read")
    if found.changed:
        tell("  aliases, history, retention and pins that could not be read are lost")
    if found.aside:
        tell(f"  the old catalog is kept: {found.aside}")
    _tell_others(data_dir, tell)


def _tell_others(data_dir: Path, tell: Callable[[str], None]) -> None:
    """Mention the other tenants: each has its own folder, which was not touched."""
    others = sorted(path.name for path in (data_dir / FOLDER).glob("*") if path.is_dir())
    if others:
        tell(
            f"  this was the tenant default; {_count(len(others), 'other')} "
            f"({', '.join(others[:8])}): give --data-dir {data_dir / FOLDER / others[0]}"
        )


def _silent(at: int, total: int) -> None:
    pass


def _progress(at: int, total: int) -> None:
    end = "\n" if at == total else ""
    raw = sys.stderr.raw if isinstance(sys.stderr, Guard) else sys.stderr
    print(f"\rverifying {at} of {total}", end=end, file=raw, flush=True)


def _names(found: upkeep.Verified | rebuild.Recovered) -> str:
    return f"{_count(found.names, 'name')}, {_count(found.revisions, 'revision')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
