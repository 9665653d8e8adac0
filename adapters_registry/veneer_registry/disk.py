"""Files and folders of a data folder: private whatever the umask, and durable after `sync`.

Modes are passed at creation. Setting the umask instead would affect the whole process, and
with it the cache folder, which users may share.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pwd
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from veneer_registry.causes import cause_of
from veneer_registry.errors import DiskFailed, DiskFull, InvalidField

_log = logging.getLogger(__name__)

FOLDER_MODE: Final = 0o700
FILE_MODE: Final = 0o600
_OTHERS: Final = 0o077


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an operating system's error into `DiskFull` or `DiskFailed`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(folder) from error
        raise disk_failed(folder, error) from error


def disk_full(folder: Path) -> DiskFull:
    """The error for a full disk."""
    return DiskFull(
        "the server's disk is full and nothing was published; delete adapters or free space",
        detail=f"the disk of {folder}",
    )


def disk_failed(folder: Path, error: Exception) -> DiskFailed:
    """The error for a disk that cannot be written to or read."""
    cause = cause_of(error)[:200]
    return DiskFailed(
        f"the server's disk failed ({cause}), nothing was changed; check the system log and "
        "try again",
        metadata={"why": cause},
        retry_after_s=5.0,
        detail=f"the disk of {folder}: {error}",
    )


def make_folder(folder: Path, *, exist_ok: bool = False) -> None:
    """Create one private folder; its parent must exist."""
    folder.mkdir(mode=FOLDER_MODE, exist_ok=exist_ok)


def create_file(path: Path) -> None:
    """Create an empty private file unless one exists."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))


def write_file(path: Path, data: bytes) -> None:
    """Write a whole private file. It is not durable until `sync`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, FILE_MODE), "wb") as file:
        file.write(data)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def link(source: Path, to: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK):
            raise
        create_file(to)
        shutil.copyfile(source, to)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, best effort."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def move_away(folder: Path, to: Path) -> None:
    """Rename a folder. Does nothing if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        folder.rename(to)


def make_private(data_dir: Path, paths: Iterable[Path]) -> None:
    """Remove all permissions of group and others, which an older Veneer may have left.

    Raises:
        InvalidField: a path belongs to another user, who could change its mode and content.
    """
    for path in paths:
        try:
            found = path.stat()  # follows links: a store may be a link to another disk
        except FileNotFoundError:
            continue
        if os.geteuid() not in (0, found.st_uid):
            raise InvalidField(
                f"{path} belongs to user {_user(found.st_uid)}, but this server runs as "
                f"{_user(os.geteuid())}; run it as {_user(found.st_uid)}, or change the "
                f"owner: chown -R {_user(os.geteuid())} {data_dir}",
                metadata={"field": "data_dir", "path": str(path), "owner": str(found.st_uid)},
            )
        if not found.st_mode & _OTHERS:
            continue
        try:
            path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)
        except OSError as error:  # a file system without modes
            _log.warning(
                "other users can read %s: its mode cannot be changed (%s)", path, error
            )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
