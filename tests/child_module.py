"""Another module in place of the one that a child process should run."""

from __future__ import annotations

import pytest
from veneer_server.adapters import child


def run_instead(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Let children that are started from now on run ``module``."""
    right = child.child_python
    monkeypatch.setattr(
        child, "child_python", lambda option, _, *rest: right(option, module, *rest)
    )
