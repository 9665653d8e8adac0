"""Run another module in a child process instead of the usual one."""

from __future__ import annotations

from pathlib import Path

import pytest
from veneer_server.adapters import child


def run_instead(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make child processes that are started from now on run ``module``."""
    right = child.child_python
    monkeypatch.setattr(
        child, "child_python", lambda option, _, *rest: right(option, module, *rest)
    )


def run_in_turn(folder: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Make child processes that are started from now on sleep for ever ("sleeps") and end with
    status 3 ("ends") in turn, beginning with ``first``. ``folder`` gets their module."""
    (folder / "sleeps_or_ends.py").write_text(
        "import pathlib, signal, sys\n"
        "began = pathlib.Path(__file__).with_name('began')\n"
        f"sleeps = began.exists() != {first == 'sleeps'}\n"
        "began.unlink() if began.exists() else began.touch()\n"
        "signal.pause() if sleeps else sys.exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    run_instead(monkeypatch, "sleeps_or_ends")
