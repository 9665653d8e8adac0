"""Time steps of two or more checkouts in turns: ``python -m tests.bench.turns . ../before``.

Each argument is a folder with a checkout of Veneer, optionally followed by a colon and options
separated by commas: an instruction set, ``int8`` for ``--int8-activations``, or both. So
``.:avx2 ../before:avx2`` compares versions, and ``. .:int8`` compares options. All run with
this environment's packages.

It decodes as `tests.bench.backends` does, with the native backend. Prints the median over each
checkout's rounds, and its ratio to the first one's. A process can be a tenth slower than
another with the same code, depending on where its memory is: name each checkout twice to see
that.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.bench.steps import ROWS
from tests.places import cache_dir

NEW: Final = 24
"""Number of steps per round."""

PACKAGES: Final = ("server", "adapters_registry", "proto", "clients", "training", "loadtest")

CHILD: Final = """
import sys
from pathlib import Path
import torch
from tests.bench.steps import PROMPT, blocks_for, load, make_adapters, run_round

new, most, threads, base, instructions, int8 = sys.argv[1:]
blocks = int(most) * blocks_for(PROMPT + 2 * int(new)) + 1
options = {"int8_activations": True} if int8 else {}
chosen = load("native", int(threads), num_blocks=blocks, base=Path(base) if base else None,
              instructions=instructions, **options)
# Checkouts before 2026-11-29 have no pairs.
pairs = {"paired": chosen.paired} if hasattr(chosen, "paired") else {}
tables = make_adapters(chosen.weights.config, chosen.lora_dtype, **pairs)
torch.set_num_threads(1)
print(chosen.name, flush=True)
for line in sys.stdin:
    rows, mixed = map(int, line.split())
    seconds = run_round(chosen.backend, rows, int(new), tables[:rows] if mixed else ())
    print(seconds, flush=True)
"""


class Version:
    """A checkout's backend, in its own process.

    Args:
        spec: the argument; see the module docstring.
        given: the parsed command line.
    """

    def __init__(self, spec: str, given: argparse.Namespace) -> None:
        self.spec = spec
        folder, _, options = spec.partition(":")
        named = {option for option in options.split(",") if option}
        int8 = "int8" in named
        sets = [*(named - {"int8"})] or ["auto"]
        if len(sets) > 1:
            raise SystemExit(f"{spec}: name one instruction set, not {' and '.join(sets)}")
        root = Path(folder).resolve()
        if not (root / "tests" / "bench" / "steps.py").is_file():
            raise SystemExit(f"{root} is no checkout of Veneer")
        paths = [root, *(root / package for package in PACKAGES)]
        base = "" if given.base is None else str(given.base.resolve())
        numbers = [NEW, max(given.rows), given.threads]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                CHILD,
                *map(str, numbers),
                base,
                *sets,
                "int8" if int8 else "",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={
                **os.environ,
                "OMP_WAIT_POLICY": "passive",
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "VENEER_CACHE_DIR": str(cache_dir().resolve()),
            },
        )
        self.name = self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.spec} ended with status {self._process.wait()}")
        return line.strip()

    def round(self, rows: int, *, mixed: bool) -> float:
        """Run a round; return the median seconds of a step."""
        assert self._process.stdin is not None
        print(rows, int(mixed), file=self._process.stdin, flush=True)
        return float(self._read())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tests.bench.turns", description=__doc__)
    parser.add_argument("checkouts", nargs="+", metavar="FOLDER[:OPTION,...]")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="default: the bundled one")
    given = parser.parse_args()
    versions = [Version(spec, given) for spec in given.checkouts]
    for rows in given.rows:
        for mixed in (False, True):
            times: list[list[float]] = [[] for _ in versions]
            for number in range(given.rounds):
                order = list(zip(versions, times, strict=True))
                for version, taken in order if number % 2 == 0 else order[::-1]:
                    taken.append(version.round(rows, mixed=mixed))
            print(f"{rows} rows, {'adapters mixed' if mixed else 'base'}")
            first = statistics.median(times[0])
            for version, taken in zip(versions, times, strict=True):
                median = statistics.median(taken)
                print(
                    f"  {1000 * median:8.2f} ms  {median / first:.2f}  {version.spec}: "
                    f"{version.name}",
                    flush=True,
                )
    for version in versions:
        version.close()


if __name__ == "__main__":
    main()
