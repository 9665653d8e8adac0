"""The C library's heap: measure it, return freed memory to the system, or take that out of
use."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable
from typing import Any, Final

_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2
"""Arenas of the process, shared by its threads."""

_M_MMAP_THRESHOLD: Final = -3
_LARGE: Final = 256 << 10
"""Blocks of at least this many bytes get their own mapping."""

_HOLES: Final = (1 << 20, 64 << 10, 4 << 10, 512, 128)
"""Sizes in bytes of the blocks that fill holes."""

_FIELDS: Final = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd",
    "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip
"""What mallinfo(3) tells."""


def mallinfo(name: str, number: type) -> Callable[[], Any] | None:
    """glibc's function of this name, which tells of the heap; None if there is none."""
    told = type("Mallinfo", (ctypes.Structure,), {"_fields_": [(f, number) for f in _FIELDS]})
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function.restype = told
    return function


_mallinfo: Final = mallinfo("mallinfo2", ctypes.c_size_t) or mallinfo("mallinfo", ctypes.c_uint)
"""glibc before 2.33 has only the second, which counts up to 4 GiB."""


def allocated_bytes() -> int:
    """Bytes of the heap's blocks in use. With another C library than glibc: of the process's
    pages, some of which may be free."""
    if _mallinfo is None:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    heap = _mallinfo()
    return int(heap.uordblks) + int(heap.hblkhd)


def return_freed() -> None:
    """Return free pages of the heap to the system."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


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
    return_freed()
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
