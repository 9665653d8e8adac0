"""A follower's view on disk, so that the follower can start while its registry is away.

The file has length-prefixed protobuf messages: a `FollowBegin`, then one for each name; at the
end, the SHA-256 of everything before it. The file may be outdated or missing: the registry is
asked first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError
from veneer_proto.v1 import replication_pb2
from veneer_registry.disk import FILE_MODE, disk_errors
from veneer_registry.replacing import replace_file

from veneer_server.follower.view import View
from veneer_server.logs import get_logger
from veneer_server.replication.states import NameState
from veneer_server.replication.wire import state_from_wire, state_to_wire

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


def save(path: Path, kept: Kept, base: str) -> None:
    """Write the file; blocks. Raises DiskFull or DiskFailed."""
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
        return Kept(begin.run, begin.sequence, begin.store, begin.catalog_change, names)
    _log.warning("saved view of the registry is damaged, ignoring it", file=path.name)
    return None


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
