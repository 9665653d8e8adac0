"""``python tests/suite_time.py TIER``: how many tests there are, and how long they take here.

What `make test` says first, before anything is installed, so it needs nothing but the standard
library. The last whole run in this checkout is the best estimate; without one, a run that was
recorded in this file, scaled by the speed of a loop on one core.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

FILE = Path(__file__).parents[1] / ".cache" / "suite-time.json"
"""Of the last whole runs in this checkout, by tier."""
ALL = "all"
"""Every tier in one run."""
RECORDED = {"test": (6290, 4.1), "push": (1470, 11.0), ALL: (9440, 21.0)}
"""Tests and minutes of a run on the CPU of `RECORDED_LOOPS_PER_S`, by tier (tests/tiers.py)."""
RECORDED_LOOPS_PER_S = 62e6
"""Two cores of an Intel Xeon (AMX, 2 GHz), nothing beside it, 2026-12-01."""


def record(tier: str, tests: int, seconds: float) -> None:
    """Keep what a whole run of a tier took, for the next one's estimate."""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(_kept() | {tier: [tests, round(seconds)]}), "utf-8")


def _kept() -> dict[str, list[int]]:
    try:
        kept = json.loads(FILE.read_text("utf-8"))
        return {str(tier): [int(tests), int(s)] for tier, (tests, s) in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def estimate(tier: str) -> str:
    """One line: the number of tests, the time, and what the estimate is based on."""
    if tier in (kept := _kept()):
        tests, minutes = kept[tier][0], kept[tier][1] / 60
        source = "as the last such run here"
    else:
        tests, minutes = RECORDED[tier]
        minutes *= RECORDED_LOOPS_PER_S / _loops_per_s() * 2 / min(os.cpu_count() or 1, 3)
        source = "estimated; the next run knows it exactly"
    return (
        f"about {tests:,} tests, {max(1, round(minutes))} minutes ({source}); "
        "Ctrl-C ends them and prints what failed so far"
    )


def _loops_per_s() -> float:
    loops, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < 0.2:
        for _ in range(10_000):
            pass
        loops += 10_000
    return loops / took


if __name__ == "__main__":
    print(estimate(sys.argv[1] if len(sys.argv) > 1 else ALL), flush=True)
