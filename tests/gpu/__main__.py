"""The kernels against their references, interpreted: ``python -m tests.gpu``.

Each subject is checked with random shapes, then with each of its planted bugs, which must be
noticed. Prints a line for each; ``--json`` writes them to a file. The exit status is 1 if a
result is wrong or a bug is not noticed. ``--seed`` repeats a run; shape N of a subject depends
on the seed and on N alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random

import tests.gpu.interpreter  # noqa: F401 (before anything that imports triton)
from tests.gpu.subject import Bug, Subject, planted
from tests.gpu.subjects import SUBJECTS


def check(subject: Subject, seed: str, shapes: int) -> str:
    """The first wrong result, or ""."""
    for number in range(shapes):
        name = f"{seed}/{subject.name}/{number}"
        try:
            subject.check(Random(name))
        except AssertionError as error:
            return f"{name}: {type(error).__name__}: {error}"
    return ""


def caught(subject: Subject, bug: Bug, seed: str, shapes: int) -> str:
    """How a planted bug was noticed, or ""."""
    with planted(bug):
        return check(subject, seed, shapes)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tests.gpu", description=__doc__)
    parser.add_argument("--only", default="", help="subjects whose name has this in it")
    parser.add_argument("--seed", default="veneer")
    parser.add_argument("--shapes", type=int, default=200, help="for each subject")
    parser.add_argument(
        "--quick", action="store_true", help="2 shapes and the first bug: the suite's form"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shapes = 2 if given.quick else given.shapes
    results, failed = [], False
    for subject in SUBJECTS:
        if given.only not in subject.name:
            continue
        began = time.process_time()
        wrong = check(subject, given.seed, shapes)
        missed = []
        seconds = time.process_time() - began
        bugs = subject.bugs[:1] if given.quick else subject.bugs
        if not wrong:
            for bug in subject.bugs:
                bug.fits()
            for bug in bugs:
                noticed = caught(subject, bug, given.seed, max(shapes, 20))
                print(f"    {bug.name}: {noticed or 'NOT NOTICED'}", flush=True)
                if not noticed:
                    missed.append(bug.name)
        failed = failed or bool(wrong or missed)
        told = f"{len(bugs) - len(missed)} of {len(bugs)} bugs noticed"
        state = wrong or f"{shapes} shapes right in {seconds:.0f} s, {told}"
        print(f"{subject.name}: {state}", flush=True)
        results.append(
            {
                "subject": subject.name,
                "seed": given.seed,
                "shapes": shapes,
                "seconds": round(time.process_time() - began, 1),
                "wrong": wrong,
                "bugs": len(bugs),
                "missed": missed,
            }
        )
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
