"""Safely opens a file of an adapter folder, whose content is untrusted.

A FIFO would block for ever, a device might never end, and a symbolic link may point to a
secret that a push would send. So only regular files are opened, without blocking, and a link
is followed only inside the folder. One exception: the files of a Hugging Face cache snapshot
are links into the ``blobs`` folder of the same repository's cache.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Final

from veneer_registry.strict_json import refuse, show

_SNAPSHOTS: Final = "snapshots"
_BLOBS: Final = "blobs"
_CACHED: Final = ("models--", "datasets--", "spaces--")

_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_MISSING: Final = "is missing; save the adapter again"


def stat_regular(path: Path) -> os.stat_result:
    """Stat the file that `open_regular` would open, without opening it.

    Raises:
        AdapterInvalid: as `open_regular`.
    """
    try:
        found = os.stat(_followed(path), follow_symlinks=False)
    except FileNotFoundError:
        refuse(path.name, _MISSING)
    _check_kind(path, found.st_mode)
    return found


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file of an adapter folder for reading, unbuffered.

    Raises:
        AdapterInvalid: metadata ``file``: it is missing, not a regular file, or a link that
            leaves the folder.
        OSError: it cannot be read.
    """
    stat_regular(path)  # merely opening some devices has side effects
    flags = os.O_RDONLY | os.O_CLOEXEC
    # Flags, where the system has them, so that opening cannot block even if the file is
    # replaced meanwhile.
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY"):
        flags |= getattr(os, name, 0)
    try:
        descriptor = os.open(_followed(path), flags)
    except FileNotFoundError:
        refuse(path.name, _MISSING)
    file = io.FileIO(descriptor, "rb")
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def _followed(path: Path) -> str:
    """The path itself, or the target of a link that may be followed."""
    if not path.is_symlink():
        return os.fspath(path)
    folder = os.path.realpath(path.parent)
    try:
        target = os.path.realpath(path, strict=True)
    except OSError as error:
        refuse(
            path.name,
            f"is a link to {show(os.readlink(path))}, which cannot be followed "
            f"({error.strerror}); put the file itself there",
        )
    inside = [folder]
    if (blobs := _blobs(Path(folder))) is not None:
        inside.append(blobs)
    if not any(os.path.commonpath([root, target]) == root for root in inside):
        refuse(
            path.name,
            f"is a link to {show(target)}, outside the folder; put a copy of that file there "
            "if it is the adapter's, or remove the link",
            cause="outside",
        )
    return target


def _blobs(folder: Path) -> str | None:
    """The ``blobs`` folder beside ``snapshots``, for a folder in the Hugging Face cache."""
    for parent in folder.parents:
        if parent.name == _SNAPSHOTS and parent.parent.name.startswith(_CACHED):
            return os.fspath(parent.parent / _BLOBS)
    return None


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((told for is_kind, told in _KINDS if is_kind(mode)), "not a file")
    refuse(path.name, f"is {kind}, not a regular file; remove it, or save the adapter again")
