"""Run a program's checks: ``python -m tests.programs litellm``, in the programs' environment.

Prints a line of JSON for each check, with the traceback if it failed. A connection to anywhere
but this machine fails the check that made it.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any


def main(name: str) -> None:
    elsewhere = _refuse_other_hosts()
    module: dict[str, Any] = {}
    with asyncio.Runner() as loop:

        def run(check: Callable[[], Any]) -> str | None:
            """The traceback, or None."""
            elsewhere.clear()
            try:
                made = check()
                if inspect.iscoroutine(made):
                    loop.run(made)
                assert not elsewhere, f"connected to {elsewhere}"
            except Exception:
                return traceback.format_exc()
            return None

        def load() -> None:
            module.update(vars(importlib.import_module(f"tests.programs.checks.{name}")))

        _report("import", run(load))
        for each, check in list(module.items()):
            if each.startswith("check_"):
                _report(each, run(check))


def _report(check: str, error: str | None) -> None:
    sys.stdout.write(json.dumps({"check": check, "error": error}) + "\n")
    sys.stdout.flush()


def _refuse_other_hosts() -> list[Any]:
    """Programs hide that a price list or a trace does not get through, so each try is kept."""
    tried: list[Any] = []

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            host = given[0]
        elif event == "socket.connect" and given[0].family != socket.AF_UNIX:
            host = given[1][0]
        else:
            return
        if host not in ("127.0.0.1", b"127.0.0.1", None):
            tried.append(host)
            raise OSError(f"no network in tests: {host}")

    sys.addaudithook(hook)
    return tried


if __name__ == "__main__":
    main(sys.argv[1])
