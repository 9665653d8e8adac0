"""JSON that is too long to be made at once: lists whose items are made as they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final

__all__ = ["Joined", "Many", "dump", "pieces_of", "written"]

PIECE: Final = 64 << 10
"""Bytes of a piece of JSON. One of log-probabilities takes about a millisecond to make."""

NUMBERS: Final = 2048
"""Numbers or texts that are written by one call into C."""


class Many:
    """A JSON list of many items.

    Its text can be kept where an answer repeats it: ``n`` choices of a completion have the same
    prompt, and each shows its scores.
    """

    def __init__(
        self,
        count: int,
        items: Callable[[], Iterable[Any]],
        *,
        at_once: int = NUMBERS,
        keep: bool = False,
    ) -> None:
        """Args:
        items: makes them anew whenever they are written.
        at_once: so many take a fraction of a millisecond.
        keep: make them once, and keep their JSON.
        """
        self.count = count
        self._items = items
        self._at_once = at_once
        self._keep = keep
        self._kept: list[bytes] = []

    @property
    def pieces(self) -> float:
        """In how many it is made."""
        return self.count / self._at_once

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items())

    def members(self) -> Iterator[bytes]:
        """The items as JSON with commas between them, without brackets, in pieces."""
        if self._kept:
            yield from self._kept
            return
        kept: list[bytes] = []
        items, comma = iter(self._items()), b""
        while some := list(islice(items, self._at_once)):
            piece, comma = comma + dump(some)[1:-1], b","
            if self._keep:
                kept.append(piece)
            yield piece
        self._kept = kept


class Joined:
    """Lists one behind the other, as one."""

    def __init__(self, *parts: Many) -> None:
        self._parts = [part for part in parts if part.count]

    def __iter__(self) -> Iterator[Any]:
        for part in self._parts:
            yield from part

    @property
    def pieces(self) -> float:
        return sum(part.pieces for part in self._parts)

    def members(self) -> Iterator[bytes]:
        for at, part in enumerate(self._parts):
            if at:
                yield b","
            yield from part.members()


def pieces_of(body: object) -> float:
    """In how many pieces its long lists are made."""
    if isinstance(body, Many | Joined):
        return body.pieces
    if isinstance(body, dict):
        return sum(map(pieces_of, body.values()))
    return sum(map(pieces_of, body)) if isinstance(body, list) else 0


def dump(body: object) -> bytes:
    """Compact JSON, at once."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=_listed).encode()


def _listed(value: object) -> list[Any]:
    if isinstance(value, Many | Joined):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def written(body: object) -> Iterator[bytes]:
    """The same in pieces of about `PIECE` bytes, each of which is made when it is asked for."""
    piece = bytearray()
    for part in _parts(body):
        piece += part
        if len(piece) >= PIECE:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


def _parts(body: object) -> Iterator[bytes]:
    if isinstance(body, Many | Joined):
        yield b"["
        yield from body.members()
        yield b"]"
    elif isinstance(body, dict):
        mark = b"{"
        for name, value in body.items():
            yield mark + dump(name) + b":"
            yield from _parts(value)
            mark = b","
        yield b"}" if body else b"{}"
    elif isinstance(body, list):
        mark = b"["
        for value in body:
            yield mark
            yield from _parts(value)
            mark = b","
        yield b"]" if body else b"[]"
    else:
        yield dump(body)
