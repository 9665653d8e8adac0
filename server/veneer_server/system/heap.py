"""The C library's heap: return freed memory to the system, or take it out of use."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from typing import Final

_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2
"""Arenas of the process, shared by its threads."""

_M_MMAP_THRESHOLD: Final = -3
_LARGE: Final = 256 << 10
"""Blocks of at least this many bytes get their own mapping."""

_HOLES: Final = (1 << 20, 64 << 10, 4 << 10, 512, 128)
"""Sizes in bytes of the blocks that fill holes."""


def configure_malloc() -> None:
    """Have glibc return freed memory to the system. Call it before threads start; does
    nothing with another C library.

    By default, glibc raises its mmap threshold to the largest block ever freed, up to 32 MiB.
    From then on large texts come from the heap, and holes between blocks in use keep it
    large: some 4 MB requests leave 100 MB behind. And threads get separate arenas, up to
    eight for each core, so that free memory in one is of no use to the others.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            libc.mallopt(_M_ARENA_MAX, _ARENAS)


def fill_holes() -> None:
    """Take free heap memory out of use, so that `RLIMIT_DATA` of this process or its children
    limits everything they use from now on, not only newly mapped memory.

    Free pages go back to the system first; filling the holes touches few of them again.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    with contextlib.suppress(AttributeError):  # another C library
        libc.malloc_trim(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    left = now = data_bytes()  # holes are smaller; some sandboxes enforce no limit
    resource.setrlimit(resource.RLIMIT_DATA, (now, hard))  # nothing but holes
    try:
        for size in _HOLES:
            while left >= size and libc.malloc(size):
                left -= size
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def data_bytes() -> int:
    """Bytes of this process that count towards `RLIMIT_DATA`."""
    with open("/proc/self/status", encoding="ascii") as status:
        [kilobytes] = [int(line.split()[1]) for line in status if line.startswith("VmData:")]
    return kilobytes << 10
