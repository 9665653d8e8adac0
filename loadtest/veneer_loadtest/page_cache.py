"""Drop files from the page cache, so that they are read from the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path


def drop(folder: Path) -> bool:
    """Ask the kernel to forget every file under ``folder``.

    Returns:
        whether it did, judged by the files above 1 MiB: some file systems keep pages, and
        some kernels lack the call.

    This needs no privileges, and affects no other file.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # the server has deleted it
            continue
        try:
            os.fsync(descriptor)  # only clean pages are dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    large = [path for path in files if path.exists() and path.stat().st_size > 1 << 20]
    return bool(large) and not any(is_cached(path) for path in large)


def is_cached(path: Path) -> bool:
    """Return whether any page of the file is in memory; True if the system cannot tell.

    This asks `mincore`, which never makes the kernel read ahead, unlike a non-blocking read."""
    size = path.stat().st_size
    if size == 0 or not sys.platform.startswith("linux"):
        return True
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped,
    ):
        first = ctypes.c_char.from_buffer(mapped)
        refused = libc.mincore(ctypes.byref(first), ctypes.c_size_t(size), pages)
        del first  # a map with a reference into it cannot be closed
    return refused != 0 or any(page & 1 for page in pages)
