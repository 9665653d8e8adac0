"""Memory that a loader fills and the engine reads, in pages of 2 MB if Linux has them.

An adapter is 10 MB and each step reads it once. With 4 kB pages, address translation takes
a tenth of a step with eight adapters, allocating and zeroing 2,400 pages 7.5 ms of a load,
and mapping them again in the engine 1.5 ms; with large pages, the latter two take 1.6 and
0.3 ms. Shared memory gets large pages only on request ("never" in shmem_enabled is the
default), with MADV_COLLAPSE of Linux 6.1.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["PIECE", "make_ready", "map_pages", "memory"]

_LARGE: Final = 2 << 20
PIECE: Final = 256 << 10
"""Bytes of small pages that are made ready at once."""
_COLLAPSE: Final = 25
_FIXED: Final = 0x10
_FAILED: Final = ctypes.c_void_p(-1).value
_LINUX: Final = sys.platform == "linux"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def memory(size: int) -> int:
    """A file descriptor of ``size`` bytes of zeroed memory."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("veneer-adapter")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def map_pages(fd: int, size: int) -> memoryview:
    """Map all of the memory, with every page populated if the system can: otherwise the first
    access to each page would fault. Unmapped when nothing refers to it any more.

    Raises:
        MemoryError: there is no room for the mapping.
    """
    if not _LINUX:
        try:
            return memoryview(mmap.mmap(fd, size))
        except OSError as error:
            raise MemoryError(str(error)) from error
    area, length, start = _map(fd, size, 0, mmap.MAP_POPULATE)
    numbers = (ctypes.c_ubyte * size).from_address(start)
    # Not at the end of the process: other threads may still read it then.
    weakref.finalize(numbers, _libc.munmap, area, length).atexit = False
    return memoryview(numbers).cast("B")


def make_ready(fd: int, size: int, begin: int) -> int:
    """Allocate and zero the next pages from ``begin`` on, so that writing to them does not
    fault. Returns where the pages after them begin; at ``size`` all are ready."""
    if not _LINUX:
        return size
    begin -= begin % mmap.PAGESIZE  # the last page may be only partly ready
    if begin % _LARGE == 0 and begin + _LARGE <= size and _collapse(fd, begin):
        return begin + _LARGE
    piece = min(PIECE, size - begin, _LARGE - begin % _LARGE)
    with _mapped(fd, piece, begin, mmap.MAP_POPULATE):
        pass
    return begin + piece


def _collapse(fd: int, begin: int) -> bool:
    with _mapped(fd, _LARGE, begin, 0) as start:
        ctypes.memset(start, 0, 1)  # an empty range cannot be collapsed
        return not _libc.madvise(start, _LARGE, _COLLAPSE)


@contextmanager
def _mapped(fd: int, size: int, offset: int, flags: int) -> Iterator[int]:
    area, length, start = _map(fd, size, offset, flags)
    try:
        yield start
    finally:
        _libc.munmap(area, length)


def _map(fd: int, size: int, offset: int, flags: int) -> tuple[int, int, int]:
    """Map at an address aligned for large pages. Returns the area reserved around it, the
    area's length, and the address."""
    length = size + _LARGE
    area = _libc.mmap(None, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if area == _FAILED:
        raise MemoryError(os.strerror(ctypes.get_errno()))
    start = -(-area // _LARGE) * _LARGE
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags |= mmap.MAP_SHARED | _FIXED
    if _libc.mmap(start, size, protection, flags, fd, offset) == _FAILED:
        error = ctypes.get_errno()
        _libc.munmap(area, length)
        raise MemoryError(os.strerror(error))
    return area, length, start
