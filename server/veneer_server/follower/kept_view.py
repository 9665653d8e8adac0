"""A follower's view on disk, so that the follower can start while its registry is away.

Two files. ``view`` has length-prefixed protobuf messages: a `FollowBegin`, then one for each
name; at the end, the SHA-256 of everything before it. ``view.changes`` has the changes since:
each is a `FollowResponse`, preceded by its length and a SHA-256 over the run, the length and
the message. What was acknowledged to the registry is in one of them: a follower must not go
back behind that, even after kill -9. The files may be outdated or missing: the registry is
asked first.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError
from veneer_proto.v1 import replication_pb2
from veneer_registry.disk import FILE_MODE, disk_errors, sync
from veneer_registry.replacing import replace_file

from veneer_server.follower.view import View
from veneer_server.logs import get_logger
from veneer_server.replication.states import NameState, Told
from veneer_server.replication.wire import from_wire, state_from_wire, state_to_wire, to_wire

_MAGIC: Final = b"veneer view 1\n"
_LENGTH: Final = 4
_DIGEST: Final = 32

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """A copy of a view's content; ``names`` has all names of all tenants."""

    run: str
    sequence: int
    store: str
    catalog_change: int
    names: tuple[NameState, ...]

    @classmethod
    def of(cls, view: View) -> Kept:
        """Copy a view, so that it can be saved while the view changes."""
        return cls(
            view.run,
            view.sequence,
            view.store,
            view.catalog_change,
            tuple(view.names.values()),
        )


def save(path: Path, kept: Kept, base: str) -> int:
    """Write the view, and drop the changes that it contains; blocks. Returns the file's size.
    Raises DiskFull or DiskFailed."""
    begin = replication_pb2.FollowBegin(
        run=kept.run,
        sequence=kept.sequence,
        store=kept.store,
        catalog_change=kept.catalog_change,
        base=base,
    )
    parts = [_MAGIC, *_framed(begin.SerializeToString())]
    for state in kept.names:
        parts += _framed(state_to_wire(state).SerializeToString())
    data = b"".join(parts)
    with disk_errors(path.parent):
        replace_file(path, data + hashlib.sha256(data).digest(), mode=FILE_MODE)
        _changes(path).unlink(missing_ok=True)
    return len(data)


def append(path: Path, run: str, changes: Iterable[Told]) -> int:
    """Add changes after those that are saved; blocks until they are durable. Returns the size
    of the file of changes. Raises DiskFull or DiskFailed."""
    parts: list[bytes] = []
    for told in changes:
        body = to_wire(told).SerializeToString()
        parts += (len(body).to_bytes(_LENGTH, "big"), _check(run, body), body)
    file = _changes(path)
    with disk_errors(path.parent):
        new = not file.exists()
        with file.open("ab") as out:
            os.fchmod(out.fileno(), FILE_MODE)
            out.write(b"".join(parts))
            out.flush()
            os.fdatasync(out.fileno())
            size = out.tell()
        if new:
            sync(path.parent)
    return size


def _changes(path: Path) -> Path:
    return path.with_name(f"{path.name}.changes")


def _check(run: str, body: bytes) -> bytes:
    length = len(body).to_bytes(_LENGTH, "big")
    return hashlib.sha256(run.encode() + b"\0" + length + body).digest()


def saved_at(path: Path) -> float:
    """Unix seconds at which the view was last written. Raises OSError if it never was."""
    newest = path.stat().st_mtime
    with suppress(FileNotFoundError):
        newest = max(newest, _changes(path).stat().st_mtime)
    return newest


def load(path: Path, base: str) -> Kept | None:
    """Read the file; None if it is missing, damaged, or for another base."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    data, digest = whole[:-_DIGEST], whole[-_DIGEST:]
    with suppress(ValueError, DecodeError, StopIteration):
        if hashlib.sha256(data).digest() != digest or not data.startswith(_MAGIC):
            raise ValueError
        messages = _messages(data[len(_MAGIC) :])
        begin = replication_pb2.FollowBegin.FromString(next(messages))
        if begin.base != base:
            return None
        names = tuple(
            state_from_wire(replication_pb2.NameState.FromString(each), base)
            for each in messages
        )
        kept = Kept(begin.run, begin.sequence, begin.store, begin.catalog_change, names)
        return _changed(path, kept, base)
    _log.warning("saved view of the registry is damaged, ignoring it", file=path.name)
    return None


def _changed(path: Path, kept: Kept, base: str) -> Kept:
    """The view after the saved changes. Whatever comes after a torn or damaged one was not
    acknowledged, or belongs to another run."""
    try:
        data = _changes(path).read_bytes()
    except OSError:
        return kept
    names, sequence, at = {state.key: state for state in kept.names}, kept.sequence, 0
    while at < len(data):
        begin = at + _LENGTH + _DIGEST
        end = begin + int.from_bytes(data[at : at + _LENGTH], "big")
        body = data[begin:end]
        if end > len(data) or data[at + _LENGTH : begin] != _check(kept.run, body):
            break
        at = end
        told = from_wire(replication_pb2.FollowResponse.FromString(body), base)
        if not isinstance(told, Told) or told.sequence <= sequence:
            continue
        if told.previous != sequence:
            break
        sequence = told.sequence
        names.pop(told.state.key, None)
        if told.state.entry is not None:
            names[told.state.key] = told.state
    return replace(kept, sequence=sequence, names=tuple(names.values()))


def _framed(message: bytes) -> Iterable[bytes]:
    return len(message).to_bytes(_LENGTH, "big"), message


def _messages(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + _LENGTH], "big")
        at += _LENGTH + size
        if at > len(data):
            raise ValueError
        yield data[at - size : at]
