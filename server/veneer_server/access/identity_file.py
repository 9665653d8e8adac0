"""Reads the file with keys and certificates, and reads it again whenever it has changed."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from pathlib import Path
from typing import Final, NamedTuple

from veneer_registry.errors import InvalidField, VeneerError

from veneer_server.access.keys import MAX_FILE, Identities, parse_identities
from veneer_server.logs import get_logger

SETTLED_NS: Final = 100_000_000
"""If a file changed within this time, it may change again without a difference in its times."""

_log = get_logger(__name__)


class _Stamp(NamedTuple):
    """The attributes that distinguish one version of a file from another."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


class IdentityFile:
    """The current content of the file. Belongs to one event loop.

    Every call checks the file's times, so a revoked key is refused from the next call on. If
    the file cannot be read or is not valid, the last valid content stays in use.
    """

    def __init__(self, path: Path) -> None:
        """Raises InvalidField if the file cannot be used."""
        self._path = path
        self._identities, self._stamp = _read(path)
        self._reading: asyncio.Task[None] | None = None
        self._begun = self._done = 0
        """`_begun`, `_done`: numbers of the last reading that began, and of the last that
        ended."""
        self._reported: tuple[_Stamp | None, ...] = ()
        """The version that was reported as unusable, if the file is unusable now."""

    @property
    def usable(self) -> bool:
        """Whether the current version of the file is in use."""
        return not self._reported

    @property
    def settled(self) -> bool:
        """Whether the file, when it was last read, had not changed for at least
        `SETTLED_NS`."""
        return self._stamp is not None

    @property
    def latest(self) -> Identities:
        """The content that was last read; the same object until the content changes."""
        return self._identities

    async def current(self) -> Identities:
        """Return the file's content as of this call, or later."""
        before = self._begun
        while self._stamp is None or _stamp(self._path) != self._stamp:
            if self._reading is None:
                self._begun += 1
                self._reading = asyncio.create_task(self._read_again(self._begun))
            await asyncio.shield(self._reading)
            if self._done > before:  # that reading began after this call
                break
        return self._identities

    async def _read_again(self, number: int) -> None:
        seen, before = _stamp(self._path), self._identities
        try:
            read, self._stamp = await asyncio.to_thread(_read, self._path)
        except VeneerError as error:
            self._stamp = seen
            if self._reported != (seen,):
                self._reported = (seen,)
                _log.warning("keys file rejected, keeping the previous keys", why=str(error))
        else:
            self._reported = ()
            if read != before:  # else keep the object: open calls notice changes by it
                self._identities = read
                _log.info("keys loaded", keys=len(read.keys))
        finally:
            self._reading, self._done = None, number


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _Stamp(
        found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )


def _read(path: Path) -> tuple[Identities, _Stamp | None]:
    """Read the content and its stamp; the stamp is None if the file changed so recently that it
    may change again with the same stamp.

    Raises:
        InvalidField: it cannot be read or is not valid.
    """
    try:
        # A pipe without a writer must not block.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _unusable(path, "it is not a regular file")
            if found.st_mode & stat.S_IWOTH:
                why = f"it is writable by everyone; run: chmod o-w {path}"
                raise _unusable(path, why, "writable")
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError as error:
        made = "`veneer-server key new` creates it with the first key"
        raise _unusable(path, f"it does not exist; {made}", "missing") from error
    except OSError as error:
        raise _unusable(path, str(error.strerror or error)) from error
    if len(data) > MAX_FILE:
        raise _unusable(path, f"it has more than {MAX_FILE} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _unusable(path, "it is not UTF-8") from error
    identities = parse_identities(text, path)
    stamp = _Stamp(
        found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )
    settled = time.time_ns() - max(stamp.modified_ns, stamp.changed_ns) > SETTLED_NS
    return identities, stamp if settled else None


def _unusable(path: Path, why: str, cause: str = "unusable") -> InvalidField:
    return InvalidField(
        f"the keys file {path} cannot be used: {why}",
        metadata={"file": str(path), "cause": cause},
    )
