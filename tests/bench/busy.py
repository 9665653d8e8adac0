"""Time steps beside a busy process on the same cores: ``python -m tests.bench.busy``.

The native backend decodes with 8 adapters mixed, alternately on a quiet machine and beside one
process that computes without pause. Prints medians of the rounds' median steps, and their
ratio. A fair share would give 1.5: on two cores, three busy threads get two thirds of a core
each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from veneer_server.step.arrays import Backend

from tests.bench.steps import PROMPT, ROWS, blocks_for, load, make_adapters, run_round

NEW = 60


@contextmanager
def busy_process() -> Iterator[None]:
    """Run a process that takes all the CPU time it gets."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    most = PROMPT + 2 * NEW
    chosen = load("native", given.threads, num_blocks=max(ROWS) * blocks_for(most) + 1)
    backend: Backend = chosen.backend
    tables = make_adapters(chosen.weights.config, chosen.lora_dtype, paired=chosen.paired)
    torch.set_num_threads(1)  # as in serving
    for rows in ROWS:
        quiet, beside = [], []
        for _ in range(given.rounds):
            quiet.append(run_round(backend, rows, NEW, tables[:rows]))
            with busy_process():
                beside.append(run_round(backend, rows, NEW, tables[:rows]))
        ratios = [b / a for a, b in zip(quiet, beside, strict=True)]
        print(
            f"{rows} rows: {statistics.median(quiet) * 1e3:.1f} ms quiet, "
            f"{statistics.median(beside) * 1e3:.1f} ms beside a busy process: "
            f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
