"""Time the native GEMM of two versions in turns:
``python -m tests.bench.gemms --against HEAD~1``.

Both versions' kernels are compiled for this CPU, and multiply the bundled base's weights, read
from memory, on one thread. Machines change their speed from second to second, so the versions
alternate, and the fastest rounds are compared; the results must have the same bits.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import os
import shlex
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from veneer_server.backends.native.compiler import build
from veneer_server.backends.native.forms import FLAGS
from veneer_server.backends.native.library import EIGHT_BIT, Library
from veneer_server.backends.native.linear import NativeLinear, pack_dense

from tests.bench.kernels import copies_of
from tests.bench.steps import CACHE, REPOSITORY, load

SOURCES: Final = "server/veneer_server/backends/native/cpp"
ROWS: Final = (1, 8, 16, 32, 128, 512)
SECONDS: Final = 0.01
"""Approximate length of a round."""


def compile_revision(revision: str, folder: Path) -> Path:
    """Compile a revision's kernels for this CPU."""
    archived = subprocess.check_output(["git", "archive", revision, SOURCES], cwd=REPOSITORY)
    with tarfile.open(fileobj=io.BytesIO(archived)) as archive:
        archive.extractall(folder, filter="data")
    library = folder / "kernels.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    source = folder / SOURCES / "library.cpp"
    subprocess.run([*compiler, *FLAGS, "-march=native", "-o", library, source], check=True)
    return library


def compare(name: str, linear: NativeLinear, versions: Sequence[Any], rounds: int) -> None:
    """Print each version's times for a weight [outputs, inputs]."""
    outputs, inputs = linear.shape
    copies, _memory = copies_of(linear)
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        results = [torch.empty(rows, outputs) for _ in versions]
        count = max(1, min(len(copies), int(SECONDS * 2e11 / (rows * outputs * inputs))))
        times: list[list[float]] = [[] for _ in versions]
        for number in range(rounds):
            order = list(enumerate(versions))
            for version, multiply in order if number % 2 == 0 else order[::-1]:
                y = results[version]
                began = time.perf_counter()
                for i in range(count):
                    copy = copies[(number * count + i) % len(copies)]
                    multiply(ctypes.byref(copy), x.data_ptr(), rows, y.data_ptr())
                times[version].append((time.perf_counter() - began) / count)
        if not torch.equal(results[0], results[1]):
            raise SystemExit(f"{name}, {rows} rows: the versions' bits differ")
        before, here = (min(each) for each in times)
        speed = 2e-9 * rows * outputs * inputs / here
        print(
            f"{name:18} {rows:4} rows {before * 1e6:9.1f} {here * 1e6:9.1f} us "
            f"{here / before:6.2f} {speed:7.0f} GFLOP/s",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tests.bench.gemms", description=__doc__)
    parser.add_argument("--against", metavar="REVISION", required=True)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    chosen = load("native", 1, num_blocks=2)
    layer, library = chosen.weights.layers[0], Library(build(CACHE))
    with tempfile.TemporaryDirectory(prefix="veneer-gemms-") as folder:
        versions = []
        for file in (compile_revision(given.against, Path(folder)), build(CACHE)):
            multiply = ctypes.CDLL(str(file)).veneer_multiply
            multiply.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64, ctypes.c_void_p]
            versions.append(multiply)
        print(
            f"{chosen.name}: fastest of {given.rounds} rounds: before, here, ratio, speed here"
        )
        compare("nf4 3072 x 576", layer.gate_up, versions, given.rounds)
        compare("nf4 576 x 1536", layer.down, versions, given.rounds)
        head = pack_dense(library, EIGHT_BIT, chosen.weights.head)
        compare("8 bits 49152 x 576", head, versions, given.rounds)


if __name__ == "__main__":
    main()
