"""Drops files from the page cache, so that they are read from the disk."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["drop", "is_cached"]


def drop(folder: Path) -> bool:
    """Ask the kernel to forget every file under ``folder``.

    Returns:
        whether it did: some file systems keep pages, some kernels lack the call.

    Needs no privileges, and affects no other file.
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
    """Whether the file's first page can be read without waiting for the disk; True where
    the system cannot tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(4096)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
