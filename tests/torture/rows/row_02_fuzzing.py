"""Row 2: coverage-guided fuzzing of the parsers of untrusted bytes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.torture.fuzzing import has_atheris
from tests.torture.row import Control, Outcome, Scale

ROW = 2
TITLE = "fuzzing of the header, config and training parsers"
BAR = "nothing but AdapterInvalid with a reason escapes"
INSTALL = (
    "not guided by coverage: atheris is not installed (pip install --target DIR atheris, "
    "then PYTHONPATH=DIR); seeded mutation of the same targets ran instead"
)


def fuzz(seconds: int, seed: int, work: Path, *flags: str) -> Outcome:
    """Run the fuzzer in a separate process, since a finding may end it."""
    command = [sys.executable, "-m", "tests.torture.fuzzing", "--seconds", str(seconds)]
    command += ["--seed", str(seed), *flags, str(work)]
    ended = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    failures: tuple[str, ...] = ()
    if ended.returncode != 0:
        found = sorted(path.name for path in work.glob("*-*"))
        what = [
            line for line in ended.stdout.splitlines() if "Error" in line or "ERROR" in line
        ]
        kept = "; ".join(f"{name}: {(work / name).read_bytes()[:80]!r}" for name in found)
        failures = (f"exit {ended.returncode}: {' / '.join(what[:3])[:300]} ({kept})",)
    (done,) = re.findall(r"number_of_executed_units: *(\d+)", ended.stdout) or ["?"]
    figure = f"{done} inputs in {seconds} s"
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", ended.stdout)
    if covered:
        figure += ", {} edges, {} features, corpus of {}".format(*covered[-1])
    return Outcome(figure, BAR, failures, () if has_atheris() else (INSTALL,))


def run(scale: Scale) -> Outcome:
    """Fuzz for twenty minutes, or eight seconds."""
    return fuzz(scale.pick(8, 1200), scale.seed, scale.work)


def controls(scale: Scale) -> Iterator[Control]:
    """Plant a crash behind three bytes, or behind two without coverage; each run ends when it
    is found."""
    if has_atheris():
        found = fuzz(60, scale.seed, scale.folder("deep"), "--planted")
        yield Control.of("a crash behind three bytes, found by coverage", found)
    found = fuzz(30, scale.seed, scale.folder("shallow"), "--planted", "--engine", "seeded")
    yield Control.of("a crash in the parsers behind two bytes, found by mutation", found)
