"""Builds admin messages from registry records, and parses admin requests."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Final, Generic, Literal, TypeVar

from google.protobuf.message import Message
from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import InvalidField
from veneer_registry.rows import AliasRow, HistoryRow

from veneer_server.rpc import convert

__all__ = [
    "MAX_LABEL_FILTER",
    "PAGE_BYTES",
    "Page",
    "alias_message",
    "alias_targets",
    "bad_token",
    "decode_token",
    "encode_token",
    "evict_mode",
    "history_entry",
    "label_filter",
    "page_size",
    "set_alias_response",
]

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000

PAGE_BYTES: Final = 3 << 20
"""Most bytes of a page's entries, unless a single entry is larger: by default, gRPC clients
reject answers of more than 4 MiB."""

BATCH: Final = 100
"""Entries read at once; not a whole page, since a page holds few large entries."""

MAX_LABEL_FILTER: Final = 64
"""Most labels in a filter; no adapter has more."""

_FRAME: Final = 6
"""Most bytes of an entry's tag and length."""

EvictMode = Literal["drain", "fail_if_busy", "abort"]

_EVICT_MODES: Final[dict[int, EvictMode]] = {
    adapters_pb2.EVICT_MODE_UNSPECIFIED: "drain",
    adapters_pb2.EVICT_MODE_DRAIN: "drain",
    adapters_pb2.EVICT_MODE_FAIL_IF_BUSY: "fail_if_busy",
    adapters_pb2.EVICT_MODE_ABORT: "abort",
}


def evict_mode(value: int) -> EvictMode:
    """The mode of an eviction or deletion. Raises InvalidField for an unknown one."""
    mode = _EVICT_MODES.get(value)
    if mode is None:
        raise InvalidField(f"mode has the unknown value {value}", metadata={"field": "mode"})
    return mode


def page_size(asked: int) -> int:
    """Entries per page; 0 means the default. Raises InvalidField above `MAX_PAGE`."""
    if asked > MAX_PAGE:
        raise InvalidField(
            f"page_size is {asked}: ask for at most {MAX_PAGE}", metadata={"field": "page_size"}
        )
    return asked or DEFAULT_PAGE


def label_filter(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels to filter by. Raises InvalidField for more than any adapter has."""
    if len(labels) > MAX_LABEL_FILTER:
        raise InvalidField(
            f"labels has {len(labels)} entries: filter by at most {MAX_LABEL_FILTER}",
            metadata={"field": "labels"},
        )
    return dict(labels)


Entry = TypeVar("Entry", bound=Message)


class Page(Generic[Entry]):
    """Entries of one answer, bounded in number and bytes.

    Attributes:
        entries: those that fit.
        place: position of the last entry, from which the next page's token is made.
    """

    def __init__(self, size: int | None, taken: int = 0) -> None:
        """Args:
        size: most entries; None for as many as fit.
        taken: bytes of the rest of the answer.
        """
        self.entries: list[Entry] = []
        self.place = ""
        self._size = size
        self._left = PAGE_BYTES - taken

    def add(self, entry: Entry, place: str = "") -> bool:
        """Add an entry and return True, or return False if it does not fit; that ends the
        page. The first entry always fits."""
        size = entry.ByteSize() + _FRAME
        if self.entries and (size > self._left or len(self.entries) == self._size):
            return False
        self.entries.append(entry)
        self._left -= size
        self.place = place
        return True

    @property
    def next_token(self) -> str:
        """Where the next page begins."""
        return encode_token(self.place)


def encode_token(place: str) -> str:
    """A page token for a position in a list."""
    return base64.urlsafe_b64encode(place.encode()).decode()


def decode_token(token: str, rpc: str) -> str:
    """The position that a page token stands for; "" for no token. Raises InvalidField."""
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError as error:  # not ASCII, not base64, or not UTF-8
        raise bad_token(rpc) from error


def bad_token(rpc: str) -> InvalidField:
    """The error for a page token that ``rpc`` did not issue."""
    return InvalidField(
        f"page_token was not issued by {rpc}: start without one",
        metadata={"field": "page_token"},
    )


def alias_targets(request: adapters_pb2.SetAliasRequest) -> list[tuple[str, int]]:
    """(revision, weight) pairs that an alias is to point to; empty for rollback and removal.

    Raises InvalidField unless exactly one change is requested.
    """
    asked = [
        bool(request.revision),
        bool(request.targets),
        request.rollback,
        request.remove,
    ]
    if sum(asked) != 1:
        raise InvalidField(
            "set one of revision, targets, rollback and remove", metadata={"field": "revision"}
        )
    if request.revision:
        return [(request.revision, 1)]
    return [(target.revision, target.weight) for target in request.targets]


def _targets(pairs: Sequence[tuple[str, int]]) -> list[adapters_pb2.AliasTarget]:
    return [adapters_pb2.AliasTarget(revision=r, weight=w) for r, w in pairs]


def alias_message(row: AliasRow) -> adapters_pb2.Alias:
    """The protobuf form of an alias."""
    return adapters_pb2.Alias(
        alias=f"{row.name}/{row.alias}",
        targets=_targets(row.targets),
        etag=str(row.generation),
        updated=convert.timestamp(row.updated),
    )


def set_alias_response(
    row: AliasRow, before: Sequence[tuple[str, int]]
) -> adapters_pb2.SetAliasResponse:
    """The answer to SetAlias."""
    return adapters_pb2.SetAliasResponse(alias=alias_message(row), previous=_targets(before))


def history_entry(row: HistoryRow) -> adapters_pb2.HistoryEntry:
    """The protobuf form of a history entry."""
    return adapters_pb2.HistoryEntry(
        time=convert.timestamp(row.time),
        event=row.event,
        revision=row.revision,
        name=row.name,
        actor=row.who.actor,
        peer=row.who.peer,
        detail=row.detail,
    )
