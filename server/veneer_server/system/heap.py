"""The C library's heap: what was freed goes back to the system, or is taken out of use."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from typing import Final

__all__ = ["configure_malloc", "data_bytes", "fill_holes"]

_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2
"""Of the process, shared by its threads."""

_M_MMAP_THRESHOLD: Final = -3
_LARGE: Final = 256 << 10
"""Bytes of a block from which on it is memory of its own."""

_HOLES: Final = (1 << 20, 64 << 10, 4 << 10, 512, 128)
"""Bytes of the blocks that holes are filled with."""


def configure_malloc() -> None:
    """Have glibc return freed memory to the system. Call it before threads start; does
    nothing with another C library.

    Of its own, glibc raises its threshold to the largest block that was ever freed, 32 MiB
    at most. From then on large texts come from the heap, and holes between what is still
    used keep it large: some 4 MB requests left 100 MB behind. And threads get arenas of their
    own, up to eight for each processor, so that free memory in one is of no use to the others.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            libc.mallopt(_M_ARENA_MAX, _ARENAS)


def fill_holes() -> None:
    """Take what is free in the heap out of use, so that `RLIMIT_DATA` of a process or its
    children bounds all that they use from now on, and not only what is new.

    Pages that are free go back to the system first; filling them touches few of them again.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    with contextlib.suppress(AttributeError):  # another C library
        libc.malloc_trim(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    left = now = data_bytes()  # holes are less; some sandboxes keep no limit
    resource.setrlimit(resource.RLIMIT_DATA, (now, hard))  # nothing but holes
    try:
        for size in _HOLES:
            while left >= size and libc.malloc(size):
                left -= size
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def data_bytes() -> int:
    """What this process has of that which `RLIMIT_DATA` bounds."""
    with open("/proc/self/status", encoding="ascii") as status:
        [kilobytes] = [int(line.split()[1]) for line in status if line.startswith("VmData:")]
    return kilobytes << 10
