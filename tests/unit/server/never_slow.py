"""Keeps a busy machine from deciding what a test of constraints sees."""

from __future__ import annotations

import math

import pytest
from veneer_server.constraints import grammars, matchers


def never_slow(patch: pytest.MonkeyPatch) -> None:
    """Treat no sequence as slow, whatever CPU time its masks take: a call waits for its
    answer, and none is LATE before its time has passed."""
    patch.setattr(grammars, "SLOW_MASK_S", math.inf)
    patch.setattr(grammars, "SLOW_TRIAL_S", math.inf)
    patch.setattr(matchers, "SLOW_MASK_S", math.inf)
