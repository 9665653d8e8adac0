"""Memory that a loader fills and the engine reads, in pages of 2 MB if Linux provides them.

An adapter is 10 MB and each step reads it once. With 4 kB pages, address translation takes
a tenth of a step with eight adapters, allocating and zeroing 2,400 pages takes 7.5 ms of a
load, and mapping them again in the engine takes 1.5 ms; with large pages, the latter two take
1.6 and 0.3 ms. Shared memory gets large pages only on request ("never" in shmem_enabled is the
default), with MADV_COLLAPSE of Linux 6.1.

A process can have at most 65,530 mappings (vm.max_map_count). So adapters do not get one each:
a loader fills the ranges of a large file in memory, one after the other, and the engine maps
the whole file. A range is used only once, so that a process that is being killed but still
writes cannot overwrite another adapter.
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

_LARGE: Final = 2 << 20
PIECE: Final = 256 << 10
"""Bytes of small pages that are made ready in one go."""
_COLLAPSE: Final = 25
_REMOVE: Final = 9
_FIXED: Final = 0x10
_PERIOD: Final = 128 << 10
"""Addresses this many bytes apart use the same sets of the L2 cache in today's CPUs."""
_APART: Final = 5  # pages
_PUNCH_HOLE: Final = 3  # and keep the size
_FAILED: Final = ctypes.c_void_p(-1).value
_LINUX: Final = sys.platform == "linux"
SEGMENT: Final = 1 << 30 if _LINUX else 0
"""Bytes of a file in memory whose ranges hold adapters; a larger adapter gets a larger file. On
systems other than Linux a range cannot be released alone, so each adapter has its own file."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
if _LINUX:
    _libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def memory(size: int) -> int:
    """Return a file descriptor of ``size`` bytes of zeroed memory."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("veneer-adapter")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def next_range(end: int) -> int:
    """Return where a range may begin after one that ended at ``end``: no two ranges share a
    large page."""
    return -(-end // _LARGE) * _LARGE


def place(number: int, size: int) -> int:
    """Return where in its range the ``number``-th adapter begins, which has ``size`` bytes.

    A step reads the same layer of many adapters. If all adapters began at the start of a large
    page, these layers would share a few sets of a core's cache and evict each other: with eight
    adapters a step took 6 to 9 % longer. So adapters begin at different pages. The offset is
    limited by the room in the last large page and to a 64th of the size, since the bytes
    before an adapter are not used.
    """
    if not _LINUX:
        return 0
    free = min(next_range(size) - size, size // 64) // mmap.PAGESIZE
    places = min(free + 1, _PERIOD // mmap.PAGESIZE)
    if places > _APART and places % _APART == 0:
        places -= 1  # or some places would never be used
    return number * (_APART if places > _APART else 1) % places * mmap.PAGESIZE


def release(fd: int, begin: int, end: int) -> None:
    """Give back the whole pages between ``begin`` and ``end``; they are zero if read again."""
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    if _LINUX and begin < end:
        _libc.fallocate(fd, _PUNCH_HOLE, begin, end - begin)


class MappedSegment:
    """A file in memory, mapped once. Its ranges are released one by one, and the mapping after
    the last of them.

    Args:
        fd: the file's descriptor, closed by this object.
        size: bytes of the file.

    Raises:
        MemoryError: there is no room for the mapping.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._size = size
        self._end = 0
        """End of the last range."""
        weakref.finalize(self, os.close, fd).atexit = False
        self._fd = fd
        if _LINUX:
            area, length, self._start = _map(fd, size, 0, 0)
            # Not at exit, when other threads may still read it.
            weakref.finalize(self, _libc.munmap, area, length).atexit = False

    def take(self, offset: int, size: int) -> memoryview:
        """Return the next range, with every page populated if the system can do that: otherwise
        the first access to each page faults. The memory is given back when nothing refers to it
        any more.

        Raises:
            MemoryError: the range cannot be mapped.
        """
        if not _LINUX:
            return map_pages(self._fd, size)
        if offset < self._end or offset + size > self._size:
            raise BufferError(f"{offset} and {size} bytes are not the next range")
        begin = offset - offset % _LARGE  # a large page is given back whole
        self._end = next_range(offset + size)
        start = self._start + offset
        # This replaces part of the mapping with an equal one, and the kernel merges both.
        _map_at(start, self._fd, size, offset, mmap.MAP_POPULATE)
        numbers = (ctypes.c_ubyte * size).from_address(start)
        weakref.finalize(numbers, self._remove, begin, self._end).atexit = False
        return memoryview(numbers).cast("B")

    def close(self) -> None:
        """Give back the memory made ready for further ranges, since there will be none."""
        self._remove(self._end, self._size)
        self._end = self._size

    def _remove(self, begin: int, end: int) -> None:
        if _LINUX and begin < end:
            _libc.madvise(self._start + begin, min(end, self._size) - begin, _REMOVE)


def map_pages(fd: int, size: int, offset: int = 0) -> memoryview:
    """Map a range of the memory, with every page populated if the system can do that. It is
    unmapped when nothing refers to it any more.

    Raises:
        MemoryError: there is no room for the mapping.
    """
    if not _LINUX:
        try:
            return memoryview(mmap.mmap(fd, size))
        except OSError as error:
            raise MemoryError(str(error)) from error
    area, length, start = _map(fd, size, offset, mmap.MAP_POPULATE)
    numbers = (ctypes.c_ubyte * size).from_address(start)
    # Not at exit, when other threads may still read it.
    weakref.finalize(numbers, _libc.munmap, area, length).atexit = False
    return memoryview(numbers).cast("B")


def make_ready(fd: int, size: int, begin: int) -> int:
    """Allocate and zero the next pages from ``begin`` on, so that writing to them does not
    fault. Return where the pages after them begin; if that is ``size``, all are ready."""
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
    """Map at an address that is as far into a large page as the offset is. Return the area
    reserved around it, the area's length, and the address."""
    within = offset % _LARGE
    length = within + size + _LARGE
    area = _libc.mmap(None, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if area == _FAILED:
        raise MemoryError(os.strerror(ctypes.get_errno()))
    start = -(-area // _LARGE) * _LARGE + within
    try:
        _map_at(start, fd, size, offset, flags)
    except MemoryError:
        _libc.munmap(area, length)
        raise
    return area, length, start


def _map_at(start: int, fd: int, size: int, offset: int, flags: int) -> None:
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags |= mmap.MAP_SHARED | _FIXED
    if _libc.mmap(start, size, protection, flags, fd, offset) == _FAILED:
        raise MemoryError(os.strerror(ctypes.get_errno()))
