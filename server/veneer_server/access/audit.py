"""The audit log: a JSON line for each call that changes something, and for each refusal.

Lines say who, what, on which revision, from where and with which outcome; never a secret, a
prompt or a path. A thread of their own writes them into a file that is rotated. A disk that is
full or slow stops no call: lines that cannot be written are counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Final

from veneer_registry.errors import InvalidField, VeneerError

from veneer_server.access.methods import AUDITED
from veneer_server.access.principal import PRINCIPAL
from veneer_server.logs import REQUEST_ID, get_logger

__all__ = ["MOST_BYTES", "Audit"]

MOST_BYTES: Final = 64 << 20
"""Bytes of the file before it is rotated."""
KEPT: Final = 8
"""Rotated files that are kept."""
_WAITING: Final = 10_000
"""Lines that may wait to be written."""
_LONGEST: Final = 200
"""Most characters of a value."""

_REFUSALS: Final = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"})

_log = get_logger(__name__)


class Audit:
    """One file; without one nothing is written.

    Attributes:
        lost: lines that could not be written.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        most_bytes: int = MOST_BYTES,
        kept: int = KEPT,
        on_written: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        on_written, on_lost: called for each line, from any thread.

        Raises:
            InvalidField: the file cannot be opened.
        """
        self.lost = 0
        self._on_written, self._on_lost = on_written, on_lost
        self._writer: Thread | None = None
        if path is None:
            return
        try:
            file = _File(path, most_bytes, kept)
        except OSError as error:
            raise InvalidField(
                f"--audit-log {path} cannot be opened: {error.strerror or error}",
                metadata={"key": "audit_log"},
            ) from error
        self._lines: Queue[str | None] = Queue(_WAITING)
        self._writer = Thread(target=self._write, args=[file], name="audit", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Write what waits, and close the file. Safe to call again."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._lines.put(None)
            writer.join()

    def note(
        self,
        method: str,
        peer: str,
        error: VeneerError | None = None,
        *,
        request: object = None,
        answer: object = None,
    ) -> None:
        """A call has ended; decides whether it belongs here.

        Args:
            method: as in `methods.METHODS`.
            error: why it was refused; None if it was answered.
            request, answer: messages, of which only names and revisions are taken.
        """
        if self._writer is None:
            return
        code = "OK" if error is None else error.code
        if method not in AUDITED and code not in _REFUSALS:
            return
        principal = PRINCIPAL.get()
        adapter = getattr(answer, "adapter", None)
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "who": principal.name,
            "tenant": principal.tenant,
            "from": peer,
            "method": method.removeprefix("/"),
            "outcome": code,
            "reason": "" if error is None else error.reason,
            "adapter": _text(adapter, "name") or _text(request, "name", "alias"),
            "revision": _text(adapter, "revision") or _text(request, "revision"),
            "request_id": REQUEST_ID.get(),
        }
        line = json.dumps({key: value for key, value in entry.items() if value})
        try:
            self._lines.put_nowait(line + "\n")
        except Full:
            self._lose("the disk is too slow")

    def _write(self, file: _File) -> None:
        while (line := self._lines.get()) is not None:
            try:
                file.write(line.encode())
            except OSError as error:
                self._lose(error.strerror or str(error))
            else:
                self._on_written()
        file.close()

    def _lose(self, why: str) -> None:
        self.lost += 1
        self._on_lost()
        if self.lost.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ...
            _log.warning("audit lines are lost", why=why, lost=self.lost)


class _File:
    """A private file that is rotated: ``NAME``, then ``NAME.1`` and so on, older ones last."""

    def __init__(self, path: Path, most_bytes: int, kept: int) -> None:
        """Raises OSError if it cannot be opened."""
        self._path = path
        self._most = most_bytes
        self._kept = kept
        self._open()

    def write(self, line: bytes) -> None:
        """Append a line, whole or not at all. Raises OSError."""
        if self._size and self._size + len(line) > self._most:
            self._rotate()
        written = os.write(self._fd, line)
        if written < len(line):  # the disk is full
            os.ftruncate(self._fd, self._size)
            raise OSError(0, "the disk is full")
        self._size += written

    def close(self) -> None:
        os.close(self._fd)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        names = [self._path]
        names += [self._path.with_name(f"{self._path.name}.{n + 1}") for n in range(self._kept)]
        for older, newer in reversed(list(zip(names[1:], names, strict=False))):
            if newer.exists():
                newer.replace(older)
        before = self._fd
        self._open()
        os.close(before)


def _text(message: object, *fields: str) -> str:
    values = (getattr(message, field, "") for field in fields)
    return next((v[:_LONGEST] for v in values if isinstance(v, str) and v), "")
