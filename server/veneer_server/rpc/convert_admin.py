"""Admin messages from the registry's records, and what admin requests ask for."""

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
"""Bytes of a page's entries, unless a single one takes more: gRPC clients refuse answers
of more than 4 MiB unless told otherwise."""

BATCH: Final = 100
"""Entries that are read at once: of large ones a page takes few."""

MAX_LABEL_FILTER: Final = 64
"""Labels to filter by; an adapter has no more."""

_FRAME: Final = 6
"""Bytes of an entry's tag and length, at most."""

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
    """Entries of a page; 0 asks for the default. Raises InvalidField past the most."""
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
        place: of the last one, for the token of the next page.
    """

    def __init__(self, size: int | None, taken: int = 0) -> None:
        """Args:
        size: most entries; None for as many as fit.
        taken: bytes of what the answer holds beside them.
        """
        self.entries: list[Entry] = []
        self.place = ""
        self._size = size
        self._left = PAGE_BYTES - taken

    def add(self, entry: Entry, place: str = "") -> bool:
        """Whether it fits; the first one always does. Once one does not, the page ends."""
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
    """A page token for a place in a list."""
    return base64.urlsafe_b64encode(place.encode()).decode()


def decode_token(token: str, rpc: str) -> str:
    """The place that a page token stands for; "" for none. Raises InvalidField."""
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError as error:  # not ASCII, no base64, or no UTF-8 in it
        raise bad_token(rpc) from error


def bad_token(rpc: str) -> InvalidField:
    """A page token that no page gave."""
    return InvalidField(
        f"page_token was not issued by {rpc}: start without one",
        metadata={"field": "page_token"},
    )


def alias_targets(request: adapters_pb2.SetAliasRequest) -> list[tuple[str, int]]:
    """(revision, weight) pairs that an alias shall mean; empty for rollback and removal.

    Raises InvalidField unless exactly one thing is asked for.
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
    """An alias as the wire shows it."""
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
    """A line of the history as the wire shows it."""
    return adapters_pb2.HistoryEntry(
        time=convert.timestamp(row.time),
        event=row.event,
        revision=row.revision,
        name=row.name,
        actor=row.who.actor,
        peer=row.who.peer,
        detail=row.detail,
    )
