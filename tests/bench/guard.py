"""Guard the native backend's speed: ``python -m tests.bench.guard`` (``make bench-guard``).

Compares ratios, not times, since times vary with the machine: native / torch, plain and with
mixed adapters, and the native backend's mixed / plain steps, at 1, 8 and 32 rows. A run is a
separate process in which both backends alternate, and gives the median of its rounds. Runs of
the same code differ by more than rounds within a run, so `judge` compares runs: a record in
``guard.json`` has several for each CPU, instruction set and number of threads. If the first
run shows a loss, two more follow, and the median of all three counts.

Exits 1 with a sentence for each loss. If nothing is recorded for this CPU, it prints what it
measured and how to record it, and exits 0. ``--record`` measures and records.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from tests.bench.backends import Peers, ratios
from tests.bench.judge import Record, Spread, judge, read_records, write_record
from tests.bench.steps import PROMPT, REPOSITORY, ROWS

FILE = Path(__file__).with_name("guard.json")
NEW = 16
"""Steps of a round: many short alternating rounds are more reliable than few long ones."""
_CPU_FIELDS = ("model name", "cpu family", "model")


def cpu_name() -> str:
    """Return Linux's name of the CPU, with family and model: a VM's name may say little."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return "unknown CPU"
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    model, family, number = (fields.get(field, "?") for field in _CPU_FIELDS)
    return f"{model} (family {family}, model {number})"


class Run(NamedTuple):
    """Result of one process.

    Attributes:
        cpu: CPU, instruction set and number of threads, which are the record's key.
        ratios: name -> median over the rounds.
    """

    cpu: str
    ratios: dict[str, float]


def measure(rounds: int, threads: int) -> Run:
    """Do a run in this process."""
    peers = Peers(threads, PROMPT + 2 * NEW)
    values: dict[str, list[float]] = {}
    for rows in ROWS:
        for times in peers.rounds(rows, rounds, NEW):
            for name, value in ratios(times).items():
                values.setdefault(f"{name}, {rows} row{'s' * (rows > 1)}", []).append(value)
    medians = {name: round(statistics.median(each), 4) for name, each in values.items()}
    return Run(f"{cpu_name()}, {peers.native_name}, {threads} threads", medians)


def run_apart(given: argparse.Namespace) -> Run:
    """Do a run in a separate process."""
    command = [sys.executable, "-m", "tests.bench.guard", "--once"]
    command += ["--rounds", str(given.rounds), "--threads", str(given.threads)]
    printed = subprocess.check_output(command, cwd=REPOSITORY, text=True)
    return Run(**json.loads(printed.splitlines()[-1]))


def spreads(runs: list[Run]) -> dict[str, Spread]:
    return {name: Spread.of([run.ratios[name] for run in runs]) for name in runs[0].ratios}


def held_against(record: Record, first: Run, given: argparse.Namespace) -> int:
    """Print ratios and losses; return the exit status."""
    if record.about["torch"] != torch.__version__:
        print(f"note: recorded beside torch {record.about['torch']}")
    runs = [first]
    if judge(record.ratios, spreads(runs)):
        print("below the record: two more runs", flush=True)
        runs += [run_apart(given) for _ in range(2)]
    found = spreads(runs)
    for name, spread in found.items():
        print(f"{name}: {spread.median:.3f} (recorded {record.ratios[name].median:.3f})")
    losses = judge(record.ratios, found)
    for loss in losses:
        print(f"LOST: {loss}")
    return 1 if losses else 0


def record_runs(first: Run, given: argparse.Namespace) -> None:
    """Do as many runs as a record needs, and write the record."""
    runs = [first, *(run_apart(given) for _ in range(given.runs - 1))]
    found = spreads(runs)
    for name, spread in found.items():
        print(f"{name}: {spread.median:.3f} (MAD {spread.mad:.3f} of {len(runs)} runs)")
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "runs": str(len(runs)),
    }
    write_record(given.file, first.cpu, Record(about, found))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write what is found")
    parser.add_argument("--runs", type=int, default=5, help="of a record")
    parser.add_argument("--rounds", type=int, default=5, help="of a run")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--file", type=Path, default=FILE, help="the records")
    parser.add_argument("--once", action="store_true", help="one run, printed as JSON")
    return parser.parse_args()


def main() -> int:
    """Measure, and compare or record; return the exit status."""
    given = _parse()
    if given.once:
        print(json.dumps(measure(given.rounds, given.threads)._asdict()))
        return 0
    first = run_apart(given)
    print(f"{first.cpu}; torch {torch.__version__}", flush=True)
    if given.record:
        record_runs(first, given)
        return 0
    record = read_records(given.file).get(first.cpu)
    if record is not None:
        return held_against(record, first, given)
    for name, value in first.ratios.items():
        print(f"{name}: {value:.3f}")
    print("nothing is recorded for this CPU: record with python -m tests.bench.guard --record")
    return 0


if __name__ == "__main__":
    sys.exit(main())
