"""Keeps compiled libraries on disk, and loads one only if nobody else could have written it.

A library is named ``<key>-<SHA-256>.so``. The name holds its checksum, so that both appear in
one rename. File and folder must belong to this user or to root, and only these two may write to
them; write permission for a group without other members is harmless. Parent folders need no
check: somebody who can rename those can replace our folder, but not by one that this user
owns. A file is checked and loaded through the same descriptor.
"""

from __future__ import annotations

import grp
import hashlib
import logging
import os
import pwd
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from veneer_registry.disk import sync

from veneer_server.backends.native.forms import HEX
from veneer_server.system.disk import make_private, remove, staged

log = logging.getLogger(__name__)

_NAME: Final = re.compile(rf"[0-9a-f]{{{HEX}}}-[0-9a-f]{{{HEX}}}\.so")

_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


class FileRefused(Exception):
    """A file or folder is not used; the message tells an operator why."""


def places(cache_dir: Path) -> tuple[Path, ...]:
    """Return the folders to search for libraries: the cache, then a folder of this user that
    lasts until the next boot. New libraries are kept in the first one that can be written."""
    own = Path(tempfile.gettempdir()) / f"veneer-{os.geteuid()}"
    return cache_dir / "native", own / "native"


def find(place: Path, key: str) -> Path | None:
    """Return the library with this key, or None. Libraries that must not be loaded are removed
    if possible."""
    try:
        files = sorted(place.glob(f"{key}-*.so"))
        if not files:
            return None
        check_folder(place)
    except (FileRefused, OSError) as reason:
        log.warning("not loading compiled kernels from %s: %s", place, reason)
        return None
    for file in files:
        try:
            os.close(open_checked(file))
            return file
        except (FileRefused, OSError) as reason:
            log.warning("not loading the compiled kernels %s: %s", file, reason)
            discard(file)
    return None


@contextmanager
def scratch(
    place: Path, prefix: str = "veneer-build-", names: re.Pattern[str] = _NAME
) -> Iterator[Path]:
    """Context with a temporary folder in ``place``, in which to make a file.

    Args:
        prefix: prefix of the folder's name.
        names: pattern of the names of files in ``place`` that are made this way.

    Raises:
        FileRefused: others can write to ``place``.
        OSError: this user cannot write to it.
    """
    make_private(place)
    _tighten(place, names)
    check_folder(place)
    with staged(place, prefix) as folder:
        yield folder


def keep(place: Path, key: str, draft: Path) -> Path:
    """Move a new library from `scratch` to its final name, and return that."""
    draft.chmod(0o644)  # whatever the umask
    digest = hashlib.sha256(draft.read_bytes()).hexdigest()
    sync(draft)
    file = place / f"{key}-{digest[:HEX]}.so"
    if file.is_dir():
        remove(file)
    draft.replace(file)
    sync(place)
    return file


def open_checked(file: Path) -> int:
    """Open a library, check that it may be loaded, and return the descriptor, through which it
    can be loaded (``/proc/self/fd``).

    Raises:
        FileRefused: it is damaged, or others could have written it.
        OSError: it cannot be read.
    """
    fd = open_own(file)
    try:
        with open(fd, "rb", closefd=False) as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest[:HEX] != file.stem.rpartition("-")[2]:
            raise FileRefused("it is damaged: its content does not match its name")
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_own(file: Path) -> int:
    """Open a file that nobody else could have written, and return the descriptor.

    Raises:
        FileRefused: others could have written it.
        OSError: it cannot be read.
    """
    fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(os.fstat(fd), stat.S_ISREG, "a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_folder(place: Path) -> None:
    """Raise FileRefused if others can write to the folder, OSError if it is missing."""
    _check(place.lstat(), stat.S_ISDIR, "a folder")


def _check(found: os.stat_result, is_kind: Callable[[int], bool], kind: str) -> None:
    if not is_kind(found.st_mode):
        raise FileRefused(f"it is not {kind}")
    if found.st_uid not in (0, os.geteuid()):
        raise FileRefused(f"it belongs to user {found.st_uid}, not to this user or root")
    group = found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid, found.st_uid)
    if group or found.st_mode & stat.S_IWOTH:
        raise FileRefused(f"others can write to it (mode {stat.S_IMODE(found.st_mode):04o})")


def _is_private(group: int, user: int) -> bool:
    """Return True for a user private group: one with the user's name and no other member.
    Systems with such groups often use umask 002. Debian's OpenSSH has the same rule."""
    try:
        name = pwd.getpwuid(user).pw_name
        found = grp.getgrgid(group)
    except KeyError:
        return False
    primary = {each.pw_name for each in pwd.getpwall() if each.pw_gid == group}
    return found.gr_name == name and {*found.gr_mem, *primary} <= {name}


def _tighten(place: Path, names: re.Pattern[str]) -> None:
    """If others could write to a folder of ours, make it private and remove its files, since
    anybody may have written them."""
    found = place.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & _OTHERS:
        place.chmod(0o700)
        for file in place.iterdir():
            if names.fullmatch(file.name):
                discard(file)


def discard(file: Path) -> None:
    """Remove a file that must not be used; a failure is logged."""
    try:
        remove(file)
    except OSError as error:
        log.warning("%s cannot be removed: %s", file, error)
