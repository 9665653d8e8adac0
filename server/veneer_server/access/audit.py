"""The audit log: a JSON line for each call that changes something, and for refusals.

A line says who did what, on which revision, from where and with which outcome; it never has a
secret, a prompt or a path. A separate thread writes the lines, so a full or slow disk never
blocks a call: lines that cannot be written are counted.

No caller can push changes that another caller made within its share out of the log, and a
caller without a key cannot push out any change. So there are three histories, each rotated
separately:

- ``audit.jsonl``: calls of known callers that change something, up to a share of bytes for each
  caller;
- ``audit.frequent.jsonl``: all changes of callers beyond their share, until newer changes of
  any caller displace them;
- ``audit.refused.jsonl``: samples of refusals, of callers without a valid key and others, by
  host, method and reason. Refusals that are left out are counted; lines once a minute say how
  many.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Lock, Thread
from typing import Final, NamedTuple
from urllib.parse import unquote

from veneer_registry.errors import InvalidField, VeneerError

from veneer_server.access.caller import Caller
from veneer_server.access.lasting import ENDED
from veneer_server.access.methods import AUDITED
from veneer_server.access.principal import ANYONE, Principal
from veneer_server.logs import get_logger
from veneer_server.queues.connection_places import host_of
from veneer_server.queues.recent import Recent

MOST_BYTES: Final = 64 << 20
"""Most bytes of a file before it is rotated."""
KEPT: Final = 8
"""Number of rotated files kept of the history of changes."""
KEPT_OTHERS: Final = 3
"""Number of rotated files kept of each other history."""
CALLER_BYTES: Final = 16 << 10
"""A caller's bytes per minute in the history of changes; 16 minutes' worth at once."""
REFUSED_BYTES: Final = 64 << 10
"""Bytes of refusals per minute; half of them for callers without a valid key."""

_WAITING: Final = 10_000
"""Most lines that may wait to be written."""
_LONGEST: Final = 200
"""Most characters of a value."""
_MINUTE_S: Final = 60.0
_MOST_COUNTS: Final = 64
"""Most separate counts of left-out refusals within a minute."""

_REFUSALS: Final = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"})
_UNCHANGED: Final = _REFUSALS | {
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
}
"""Outcomes of calls that have changed nothing, unless they are `ENDED`. Calls with other
outcomes may have changed something."""


class _History(Enum):
    """The history of a line. Lines of a history are accepted only while the share of `_WAITING`
    that is in use is below its value."""

    CHANGES = 1.0
    FREQUENT = 0.75
    REFUSED = 0.5


class _LeftOut(NamedTuple):
    """The key of a count of left-out refusals."""

    who: str
    tenant: str
    method: str
    outcome: str
    reason: str


_log = get_logger(__name__)


class Audit:
    """The audit log; without a path, nothing is written.

    Attributes:
        lost: number of lines that could not be written.
        left_out: number of refusals that got no line, because many are alike.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        keyed: bool = False,
        most_bytes: int = MOST_BYTES,
        kept: int = KEPT,
        clock: Callable[[], float] = time.monotonic,
        on_written: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
        on_left_out: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        path: file of the history of changes; the other histories are next to it. A device or
            pipe gets the lines of all histories.
        keyed: whether callers must authenticate; if not, `ANYONE` is a known caller.
        clock: returns seconds.
        on_written, on_lost, on_left_out: called for each line, from any thread.

        Raises:
            InvalidField: the file cannot be opened.
        """
        self.lost = self.left_out = 0
        self._keyed = keyed
        self._clock = clock
        self._on_written, self._on_lost = on_written, on_lost
        self._on_left_out = on_left_out
        self._writer: Thread | None = None
        if path is None:
            return
        try:
            changes = _File(path, most_bytes, kept)
        except OSError as error:
            raise InvalidField(
                f"--audit-log {path} cannot be opened: {error.strerror or error}",
                metadata={"key": "audit_log"},
            ) from error
        self.files = dict.fromkeys(_History, changes)
        if changes.regular:
            fewer = min(kept, KEPT_OTHERS)
            for history, name in (
                (_History.FREQUENT, f"{path.stem}.frequent{path.suffix}"),
                (_History.REFUSED, f"{path.stem}.refused{path.suffix}"),
            ):
                self.files[history] = _File(path.with_name(name), most_bytes, fewer, later=True)
        self._changes = _Share(CALLER_BYTES, burst_minutes=16)
        self._refusals = _Refusals()
        self._counts = Counter[_LeftOut]()
        self._counted_since = clock()
        self._counting = Lock()
        self._lines: Queue[tuple[_History, str] | None] = Queue(_WAITING)
        self._writer = Thread(target=self._write, name="audit", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Write the waiting lines, and close the files. Safe to call again."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._tell_left_out(at_once=True)
            self._lines.put(None)
            writer.join()

    def note(
        self,
        caller: Caller,
        error: VeneerError | None = None,
        *,
        request: object = None,
        answer: object = None,
    ) -> None:
        """Note a call that has ended, if it belongs into the log.

        Args:
            caller: the caller, as far as it is known.
            error: why the call was refused; None if it was answered.
            request, answer: the call's messages, from which only names and revisions are taken.
        """
        if self._writer is None:
            return
        method, peer = caller.method, caller.peer
        code = "OK" if error is None else error.code
        if method not in AUDITED and code not in _REFUSALS:
            return
        self._tell_left_out()
        principal = caller.principal
        adapter = getattr(answer, "adapter", None)
        ended = error is not None and ENDED in error.metadata
        entry = {
            "time": _now(),
            "who": principal.name,
            "tenant": principal.tenant,
            "from": peer,
            "method": method.removeprefix("/"),
            "outcome": code,
            "reason": "" if error is None else error.reason,
            "ended": ended,
            "adapter": _text(adapter, "name") or _text(request, "name", "alias"),
            "revision": _text(adapter, "revision") or _text(request, "revision"),
            "request_id": caller.request_id,
        }
        line = json.dumps({key: value for key, value in entry.items() if value}) + "\n"
        changed = ended or code not in _UNCHANGED
        reason = "" if error is None else error.reason
        history = self._history(method, changed, principal, peer, reason, len(line))
        if history is not None:
            self._put(history, line)
            return
        self.left_out += 1
        self._on_left_out()
        about = _LeftOut(principal.name, principal.tenant, str(entry["method"]), code, reason)
        with self._counting:
            if about not in self._counts and len(self._counts) >= _MOST_COUNTS:
                about = _LeftOut("", "", "others", code, "")
            self._counts[about] += 1

    def _history(
        self,
        method: str,
        changed: bool,
        principal: Principal,
        peer: str,
        reason: str,
        size: int,
    ) -> _History | None:
        """Choose the history of a line; None if it is left out. ``changed``: the call may have
        changed something."""
        now = self._clock()
        known = principal is not ANYONE or not self._keyed
        who = _account(principal) if known else None
        if known and method in AUDITED:
            if self._changes.has(who, now):
                self._changes.take(who, size, now)
                return _History.CHANGES
            if changed:
                return _History.FREQUENT
        host = host_of(unquote(peer).removeprefix("ipv4:").removeprefix("ipv6:"))
        taken = self._refusals.take(who, host, (method, reason), size, now)
        return _History.REFUSED if taken else None

    def _tell_left_out(self, *, at_once: bool = False) -> None:
        """Write a line for each count of left-out refusals, once the minute is over."""
        now = self._clock()
        if not at_once and now - self._counted_since < _MINUTE_S:
            return
        with self._counting:
            counts, self._counts = self._counts, Counter()
            self._counted_since = now
        for about, number in counts.items():
            fields = {key: value for key, value in about._asdict().items() if value}
            entry = {"time": _now(), **fields, "left_out": number}
            self._put(_History.REFUSED, json.dumps(entry) + "\n")

    def _put(self, history: _History, line: str) -> None:
        try:
            if self._lines.qsize() >= history.value * _WAITING:
                raise Full
            self._lines.put_nowait((history, line))
        except Full:
            self._lose("disk too slow")

    def _write(self) -> None:
        while True:
            try:
                item = self._lines.get(timeout=_MINUTE_S)
            except Empty:
                self._tell_left_out()
                continue
            if item is None:
                break
            history, line = item
            try:
                self.files[history].write(line.encode())
            except OSError as error:
                self._lose(error.strerror or str(error))
            else:
                self._on_written()
        for file in set(self.files.values()):
            file.close()

    def _lose(self, why: str) -> None:
        self.lost += 1
        self._on_lost()
        if self.lost.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ...
            _log.warning("audit lines lost", why=why, lost=self.lost)


class _Share:
    """A budget of bytes per minute for each of many keys; the last line may exceed it."""

    def __init__(self, a_minute: int, *, burst_minutes: float = 2.0) -> None:
        self._rate = a_minute / _MINUTE_S
        self._burst_s = burst_minutes * _MINUTE_S
        self._due: Recent[Hashable, float] = Recent(4096)
        """When the bytes that a key has taken are paid for."""

    def has(self, key: Hashable, now: float) -> bool:
        return self._due.get(key, now) - now < self._burst_s

    def take(self, key: Hashable, size: int, now: float) -> None:
        self._due[key] = max(now, self._due.get(key, now)) + size / self._rate


class _Refusals:
    """Chooses the refusals that get a line. Each refusal counts towards three shares: that of
    similar refusals from its caller or host, that of its caller or host, and that of all known
    or all unknown callers. So unknown callers never use up the share of known ones."""

    def __init__(self) -> None:
        self._all = _Share(REFUSED_BYTES // 2)
        self._source = _Share(REFUSED_BYTES // 8)
        self._alike = _Share(REFUSED_BYTES // 32)

    def take(self, who: str | None, host: str, about: Hashable, size: int, now: float) -> bool:
        """Decide whether to write a line of `size` bytes for a refusal, and count it if so.

        Args:
            who: the caller; None if it has no valid key.
        """
        source = who or host
        keys = (
            (self._all, who is not None),
            (self._source, (who is None, source)),
            (self._alike, (who is None, source, about)),
        )
        if not all(share.has(key, now) for share, key in keys):
            return False
        for share, key in keys:
            share.take(key, size, now)
        return True


class _File:
    """A private file that is rotated to ``NAME.1``, ``NAME.2`` and so on, the oldest last."""

    def __init__(self, path: Path, most_bytes: int, kept: int, *, later: bool = False) -> None:
        """Raises OSError if it cannot be opened. ``later``: open it only for its first line."""
        self._path = path
        self.most = most_bytes
        self._kept = kept
        self._fd = -1
        self.regular = True
        """False for a device or pipe, which is not rotated."""
        if not later:
            self._open()

    def write(self, line: bytes) -> None:
        """Append a line, whole or not at all. Raises OSError."""
        if self._fd < 0:
            self._open()
        if self.regular and self._size and self._size + len(line) > self.most:
            self._rotate()
        written = os.write(self._fd, line)
        if written < len(line):  # disk full
            if self.regular:
                os.ftruncate(self._fd, self._size)
            raise OSError(0, "disk full")
        self._size += written

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        self._fd = self._opened(self._path)
        status = os.fstat(self._fd)
        self._size, self.regular = status.st_size, stat.S_ISREG(status.st_mode)

    def _opened(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _rotate(self) -> None:
        # Make the new file first: if the disk has no room for it, no older file is lost.
        new = self._path.with_name(f"{self._path.name}.new")
        opened = self._opened(new)
        try:
            names = [self._path]
            names += [
                self._path.with_name(f"{self._path.name}.{n + 1}") for n in range(self._kept)
            ]
            for older, newer in reversed(list(zip(names[1:], names, strict=False))):
                if newer.exists():
                    newer.replace(older)
            new.replace(self._path)
        except OSError:
            os.close(opened)
            raise
        before, self._fd, self._size = self._fd, opened, 0
        os.close(before)


def _text(message: object, *fields: str) -> str:
    values = (getattr(message, field, "") for field in fields)
    return next((v[:_LONGEST] for v in values if isinstance(v, str) and v), "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _account(principal: Principal) -> str:
    """Return a key that is the same for all calls of a caller, even in other tenants than its
    own. It includes the tenant, since callers of two tenants may have the same name."""
    return f"{'' if principal.visiting else principal.tenant}/{principal.name}"
