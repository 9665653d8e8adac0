"""Cache folders: private, and built under a temporary name before they appear."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LEAST_AGE_S: Final = 60.0
"""Younger folders are kept: their creator may be about to lock them."""


def make_private(folder: Path) -> None:
    """Create the folder and its missing parents, for this user alone."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def staged(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``parent``, private to this user, to be filled and renamed.

    It is removed at the end unless it was renamed. Folders left by a killed process are
    removed by the next call: a folder is locked as long as its process lives.
    """
    make_private(parent)
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            _remove_abandoned(left)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    if time.time() - folder.stat().st_mtime < _LEAST_AGE_S:
        return
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its process lives
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def remove(path: Path) -> None:
    """Remove whatever has this name; for a link, only the link.

    Raises:
        OSError: it could not be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
