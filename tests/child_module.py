"""Run another module in a child process instead of the usual one."""

from __future__ import annotations

import pytest
from veneer_server.adapters import child


def run_instead(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make child processes that are started from now on run ``module``."""
    right = child.child_python
    monkeypatch.setattr(
        child, "child_python", lambda option, _, *rest: right(option, module, *rest)
    )
