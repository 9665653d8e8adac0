"""Run rows of the reliability scoreboard: ``python -m tests.torture --quick``.

``--row 4`` runs one row, ``--full`` uses the scoreboard's numbers, ``--seed`` repeats a run.
Rows that are judged by times (`TIMED`) need an idle machine, so they run only with ``--full``
or by their number. So do rows that take long (`LONG`). Each row runs in a separate process, so
that no planted bug reaches the next row. The exit status is 1 if a row fails or does not catch
one of its planted bugs.

Of several rows, one that fails is repeated at the end, alone and with the same seed, and has
failed only if it fails again. A planted bug that is not caught gets two more seeds.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

from tests import seeds, summary
from tests.torture.row import Control, Outcome, RowModule, Scale

ROWS = Path(__file__).parent / "rows"
MODULE = re.compile(r"row_(\d+)_\w+")
TIMED = frozenset({14, 15, 18, 19})
LONG = frozenset({23, 25})
"""Rows that take minutes even in their quick form; the suite tests each of their faults
alone."""
SLOWEST = (9, 21, 7, 5, 12)
"""Rows that begin first, in this order, so that no slow row is left alone at the end."""
BUG_SEEDS = 3
"""How many seeds a planted bug gets to be caught."""
SHOWN = 10
"""Maximum number of a row's failures to print."""


def found_rows() -> dict[int, str]:
    """Return row number -> module name, from the file names."""
    matches = (MODULE.fullmatch(path.stem) for path in sorted(ROWS.glob("row_*.py")))
    return {int(match[1]): match[0] for match in matches if match is not None}


def run_row(number: int, module: str, scale: Scale) -> bool:
    """Run one row with its controls and print the result; return False if it fails."""
    row = cast(RowModule, importlib.import_module(f"tests.torture.rows.{module}"))
    if number != row.ROW:
        raise ValueError(f"{module} says that it is row {row.ROW}")
    began = time.perf_counter()
    outcome = row.run(Scale(scale.full, scale.seed, scale.folder("run")))
    ran = time.perf_counter() - began
    if outcome.skipped:
        print(f"row {row.ROW:2d} | {row.TITLE} | SKIPPED: {outcome.skipped}", flush=True)
        return True
    controls = run_controls(row, scale)
    seconds = f"{ran:.1f} s + {time.perf_counter() - began - ran:.1f} s of controls"
    caught = bool(controls) and all(control.caught for control in controls)
    print("\n".join(report(row, outcome, controls, scale, seconds)), flush=True)
    return caught and not outcome.failures


def run_controls(row: RowModule, scale: Scale) -> list[Control]:
    """Run the row's planted bugs, again with other seeds while some are not caught."""
    controls = list[Control]()
    for tried in range(BUG_SEEDS):
        folder = scale.folder(f"controls-{tried}")
        ran = list(row.controls(Scale(scale.full, scale.seed + tried, folder)))
        earlier = controls or ran
        controls = [a if a.caught else b for a, b in zip(earlier, ran, strict=True)]
        if all(each.caught for each in controls):
            break
    return controls


def report(
    row: RowModule, outcome: Outcome, controls: list[Control], scale: Scale, seconds: str
) -> Iterator[str]:
    """Yield the lines to print: one for the row, and below it failures and notes."""
    missed = [control for control in controls if not control.caught]
    verdict = "FAILED" if outcome.failures else "held"
    caught = f"{len(controls) - len(missed)} of {len(controls)} planted bugs caught"
    yield (
        f"row {row.ROW:2d} | {row.TITLE} | {verdict}: {outcome.figure} | bar: {outcome.bar} | "
        f"seed {scale.seed} | {seconds} | {caught}"
    )
    for note in outcome.notes:
        yield f"    note: {note}"
    for failure in outcome.failures[:SHOWN]:
        yield f"    FAILURE: {failure}"
    if len(outcome.failures) > SHOWN:
        yield f"    and {len(outcome.failures) - SHOWN} more"
    for control in controls:
        said = f"caught: {control.caught[:200]}" if control.caught else "NOT CAUGHT"
        if scale.full or not control.caught:
            yield f"    planted: {control.planted}: {said}"
    if not controls:
        yield "    NO CONTROL: a row must show that its check can fail"


def run_apart(number: int, *, full: bool, seed: int) -> tuple[bool, str]:
    """Do `run_row` in a separate process; return whether it passed, and its output (its errors
    if it printed nothing)."""
    command = [sys.executable, "-m", "tests.torture", "--row", str(number)]
    command += ["--seed", str(seed), *(["--full"] if full else [])]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    text = ended.stdout or f"row {number:2d} | did not end: {ended.stderr[-2000:]}\n"
    return ended.returncode == 0, text


def main() -> int:
    """Run the rows that the command line names; return the exit status."""
    rows = found_rows()
    parser = argparse.ArgumentParser(prog="tests.torture", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the short forms (the default)")
    size.add_argument("--full", action="store_true", help="at the scoreboard's numbers")
    parser.add_argument(
        "--row", type=int, action="append", choices=sorted(rows), help="only this (repeatable)"
    )
    parser.add_argument("--seed", type=int, default=seeds.seed())
    parser.add_argument("--jobs", type=int, default=1, help="rows that run at the same time")
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it")
    given = parser.parse_args()
    chosen = sorted(set(given.row or (rows if given.full else rows.keys() - TIMED - LONG)))
    if len(chosen) == 1:
        work = given.keep or Path(tempfile.mkdtemp(prefix="veneer-torture-"))
        work.mkdir(parents=True, exist_ok=True)
        try:
            scale = Scale(given.full, given.seed, work)
            return 0 if run_row(chosen[0], rows[chosen[0]], scale) else 1
        finally:
            if given.keep is None:
                shutil.rmtree(work, ignore_errors=True)
    began = time.perf_counter()
    failed = []
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {
            number: pool.submit(run_apart, number, full=given.full, seed=given.seed)
            for number in [
                *(number for number in SLOWEST if number in chosen),
                *(number for number in chosen if number not in SLOWEST),
            ]
        }
        for number in chosen:
            held, text = runs[number].result()
            print(text, end="", flush=True)
            if not held:
                failed.append(number)
    repeated = []
    for number in list(failed):
        print(f"row {number:2d} once more, alone, with the same seed:", flush=True)
        held, text = run_apart(number, full=given.full, seed=given.seed)
        print(text, end="", flush=True)
        verdict = "HELD ONLY REPEATED" if held else "FAILED"
        summary.add(f"{verdict} torture row {number}, seed {given.seed}")
        if held:
            failed.remove(number)
            repeated.append(number)
    print(
        f"{len(chosen)} rows in {time.perf_counter() - began:.0f} s, "
        f"failed: {failed or 'none'}, held only when repeated: {repeated or 'none'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
