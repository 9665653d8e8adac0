"""Plant an attack's bug in a server's process."""

from __future__ import annotations

import importlib
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from tests.attacks.case import Bug
from tests.other_engine import engine_of
from tests.planted import planted

_ROOT = Path(__file__).resolve().parents[2]
_kept: list[AbstractContextManager[None]] = []
"""Contexts that stay entered while the process runs."""


def planting(bug: Bug) -> str:
    """Return Python source that a server runs before it starts, which plants the bug."""
    return (
        f"import sys\nsys.path.insert(0, {str(_ROOT)!r})\n"
        "from tests.attacks.case import Bug\n"
        "from tests.attacks.planting import plant\n"
        f"plant({bug!r})"
    )


def plant(bug: Bug) -> None:
    """Called in the front process: plant the bug here, or in the engine that it will start."""
    if bug.process == "engine":
        _kept.append(engine_of("tests.attacks.planting", bug.module, bug.old, bug.new))
    else:
        _kept.append(planted(importlib.import_module(bug.module), bug.old, bug.new))
    _kept[-1].__enter__()


def _engine() -> None:
    from veneer_server.engine.process import main

    module, old, new = (sys.argv.pop(1) for _ in range(3))
    with planted(importlib.import_module(module), old, new):
        main()


if __name__ == "__main__":
    _engine()
