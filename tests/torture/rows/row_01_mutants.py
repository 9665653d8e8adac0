"""Row 1: damaged adapters are refused with a reason, in bounded time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.torture.mutants import LIMIT, PLANTED
from tests.torture.row import Control, Outcome, Scale
from tests.torture.syscalls import ROOT

ROW = 1
TITLE = "damaged adapters"
SPARE = 64 << 20
BAR = (
    "0 crashes, 0 INTERNAL or UNKNOWN, a reason each, nothing bad accepted, <= 2 s of CPU "
    f"each, memory <= {LIMIT >> 20} MiB (the limit) + {SPARE >> 20} MiB"
)


def torture(work: Path, count: int, seed: int, planted: str = "") -> Outcome:
    """Push ``count`` mutants in a separate process."""
    command = [sys.executable, "-m", "tests.torture.mutants", str(work)]
    command += ["--count", str(count), "--seed", str(seed)]
    command += ["--planted", planted] if planted else []
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if ended.returncode != 0:
        what = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        return Outcome("", BAR, (f"the process ended with {ended.returncode}: {what[:300]}",))
    found = json.loads(ended.stdout)
    failures = [f"seed {seed}, {failure}" for failure in found["failures"]]
    most = max(found["growth"], key=found["growth"].__getitem__)
    for what, grown in found["growth"].items():
        if grown > LIMIT + SPARE:
            failures.append(f"{what}: takes {grown >> 20} MiB of memory")
    answers = ", ".join(f"{what} {count}" for what, count in sorted(found["answers"].items()))
    figure = (
        f"{found['done']} mutants of {found['crafted']} crafted adapters and "
        f"{len(found['growth']) - 1} size bombs ({answers}), worst {found['worst_s']:.2f} s "
        f"of CPU, most memory {found['growth'][most] >> 20} MiB ({most})"
    )
    return Outcome(figure, BAR, tuple(failures))


def run(scale: Scale) -> Outcome:
    """Push 10,000 mutants, or 500."""
    return torture(scale.work, scale.pick(500, 10_000), scale.seed)


def controls(scale: Scale) -> Iterator[Control]:
    """Use the same judge on readers with a planted bug, without the size bombs. Of some seeds'
    200 mutants none shows a bug; then it takes more."""
    for number, planted in enumerate(PLANTED):
        for count in (200, 2000):
            found = torture(scale.folder(f"{number}-{count}"), count, scale.seed, planted)
            if found.failures:
                break
        yield Control.of(planted, found)
