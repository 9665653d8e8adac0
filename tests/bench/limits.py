"""Measure the machine's limits: how fast it reads memory and multiplies (``limits.cpp``)."""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import subprocess
import tempfile
import time
from ctypes import c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch

SIZE = 256 << 20
"""Bytes to read: several times the size of the caches."""


class Work(NamedTuple):
    """Necessary work: bytes read from memory, and floating-point operations."""

    bytes: float = 0.0
    flops: float = 0.0

    def plus(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


class Limits(NamedTuple):
    """Limits with a number of threads.

    Attributes:
        read: bytes per second from memory, in pages of 2 MB if the system has them.
        registers: floating-point operations per second of bfloat16 products in registers.
        matmul: floating-point operations per second of torch's GEMM of large bfloat16 matrices.
    """

    threads: int
    read: float
    registers: float
    matmul: float

    def seconds(self, work: Work) -> float:
        """Return the least time for the work: the longer of reading all bytes and doing all
        operations at the rate of `matmul`."""
        return max(work.bytes / self.read, work.flops / self.matmul)

    def __str__(self) -> str:
        return (
            f"limits, {self.threads} threads: reads {self.read / 1e9:.1f} GB/s, bf16 products "
            f" {self.matmul / 1e9:.0f} GFLOP/s (torch's matmul), "
            f"{self.registers / 1e9:.0f} (in registers)"
        )


def huge_pages(size: int) -> torch.Tensor:
    """Allocate memory in pages of 2 MB if the system has them, and write it once.

    The mapping is private, since shared memory, mmap's default, rarely gets such pages.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def load_limits() -> Any:
    """Compile limits.cpp for this CPU with the kernels' compiler; return its functions."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory(prefix="veneer-limits-") as folder:
        file = Path(folder) / "limits.so"
        subprocess.run([*compiler, *flags, "-o", str(file), str(source)], check=True)
        functions = ctypes.CDLL(str(file))
    functions.limit_read.argtypes = [c_void_p, c_int64, c_int32]
    functions.limit_multiply.argtypes = [c_int32]
    for function in (functions.limit_read, functions.limit_multiply, functions.limit_time):
        function.restype = c_double
    return functions


def matmul_rate(threads: int) -> float:
    """Return torch's best rate, in floating-point operations per second, over some bfloat16
    GEMMs."""
    torch.set_num_threads(threads)
    best = 0.0
    for size in (1024, 2048, 3072):
        a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
        for _ in range(4):
            began = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def measure_limits(functions: Any, threads: int) -> Limits:
    """Measure the limits, which takes some seconds."""
    memory = huge_pages(SIZE)
    read = functions.limit_read(memory.data_ptr(), SIZE, threads)
    return Limits(threads, read, functions.limit_multiply(threads), matmul_rate(threads))
