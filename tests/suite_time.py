"""``python tests/suite_time.py``: how many tests there are, and how long they will take here.

What `make test` says first, before anything is installed, so it needs nothing but the standard
library. The last whole run in this checkout is the best estimate; without one, a run that was
recorded in this file, scaled by the speed of a loop on one core.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

FILE = Path(__file__).parents[1] / ".cache" / "suite-time.json"
"""Of the last whole run in this checkout."""
RECORDED_TESTS, RECORDED_MINUTES, RECORDED_LOOPS_PER_S = 8400, 49, 62e6
"""A whole run on two cores of an AMD EPYC (Zen 3, AVX2), some work beside it, 2026-11-30."""


def record(tests: int, seconds: float) -> None:
    """Keep what a whole run took, for the next one's estimate."""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps({"tests": tests, "seconds": round(seconds)}), "utf-8")


def estimate() -> str:
    """One line: the number of tests, the time, and what the estimate rests on."""
    try:
        last = json.loads(FILE.read_text("utf-8"))
        tests, minutes = int(last["tests"]), float(last["seconds"]) / 60
        source = "as the last whole run here"
    except (OSError, ValueError, KeyError, TypeError):
        tests = RECORDED_TESTS
        slower = RECORDED_LOOPS_PER_S / _loops_per_s() * 2 / min(os.cpu_count() or 1, 3)
        minutes = RECORDED_MINUTES * slower
        source = "estimated; a run of `make test` makes it exact"
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
    print(estimate(), flush=True)
