"""Count the thread pool's operations in a phase: ``python -m tests.bench.thread_pool``.

At 2, 8, 32 and 64 threads, it counts the atomic operations of all threads together and per
thread, and how often a share is cut. The counts do not depend on this machine's cores or on
other processes (see `thread_pool.cpp`): each thread executes its own 8 chunks of every phase,
as if it had its own core. With ``--against REVISION``, the same is counted for that revision's
pool, and the time of a phase of 16 chunks of half a microsecond on 2 threads is measured in
turns, as a ratio of the fastest programs.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

HERE: Final = Path(__file__).parent
REPOSITORY: Final = HERE.parents[1]
KERNELS: Final = REPOSITORY / "server" / "veneer_server" / "backends" / "native" / "cpp"
PHASES: Final = 200


class Counts(NamedTuple):
    """Operations per phase, of all threads together.

    Attributes:
        reads: reads of atomics, without the turns of a wait that only read.
        exchanges: reads that also write, or try to: each takes the cache line from other cores.
        cuts: computations of where a share begins.
    """

    reads: float
    writes: float
    exchanges: float
    cuts: float

    @property
    def operations(self) -> float:
        return self.reads + self.writes + self.exchanges


class Pool:
    """The pool of one header, compiled to count and to time; delete the folder after use.

    Args:
        kernels: the folder with ``thread_pool.h``.
    """

    def __init__(self, folder: Path, kernels: Path = KERNELS) -> None:
        self._folder = folder
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        flags = ["-std=c++17", "-O2", "-pthread", "-mavx2", "-mfma"]
        for name, defined in (("counted", ["-DCOUNTED"]), ("timed", [])):
            made = ["-o", str(folder / name), str(HERE / "thread_pool.cpp")]
            subprocess.run([*compiler, *flags, *defined, f"-I{kernels}", *made], check=True)

    def counts(self, threads: int, phases: int = PHASES) -> Counts:
        return Counts(*self._run("counted", threads, phases, 1)[:4])

    def nanoseconds(self, threads: int) -> float:
        """Return the nanoseconds of a phase, in the fastest of 200 programs of 300 phases."""
        return self._run("timed", threads, 300, 200)[4]

    def waiting(self) -> list[float]:
        """Return the shares of a core that two threads use while one waits for the other: to
        begin a program, to leave it, and to prepare a phase."""
        return self._run("timed", "waiting")

    def _run(self, name: str, *words: int | str) -> list[float]:
        command = [str(self._folder / name), *map(str, words)]
        return list(map(float, subprocess.check_output(command, text=True).split()))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.thread_pool", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 8, 32, 64])
    parser.add_argument("--against", metavar="REVISION", help="a commit, such as HEAD~1")
    parser.add_argument("--rounds", type=int, default=7, help="of the measured time")
    given = parser.parse_args(words)
    with ExitStack() as stack:

        def folder() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-pool-")))

        pools = {"here": Pool(folder())}
        if given.against:
            path = str(KERNELS.relative_to(REPOSITORY))
            command = ["git", "archive", given.against, path]
            with tarfile.open(
                fileobj=io.BytesIO(subprocess.check_output(command, cwd=REPOSITORY))
            ) as archive:
                archive.extractall(before := folder(), filter="data")
            pools = {given.against: Pool(folder(), before / path), **pools}
        print(
            "per phase           threads  operations   a thread   exchanges   cuts of a share"
        )
        for threads in given.threads:
            for name, pool in pools.items():
                counts = pool.counts(threads)
                print(
                    f"{name:20}{threads:7}{counts.operations:12.0f}"
                    f"{counts.operations / threads:11.1f}{counts.exchanges / threads:12.1f}"
                    f"{counts.cuts / threads:18.1f}"
                )
        if given.against:
            times = [
                [pool.nanoseconds(2) for pool in pools.values()] for _ in range(given.rounds)
            ]
            ratio = statistics.median(new / old for old, new in times)
            old, new = (min(each) for each in zip(*times, strict=True))
            print(
                f"time of a phase on 2 threads: {old:.0f} ns before, {new:.0f} here; "
                f"median ratio of {given.rounds} rounds {ratio:.3f}"
            )


if __name__ == "__main__":
    main()
