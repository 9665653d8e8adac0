"""Parses JSON bodies, whose size is checked first, and writes long ones in pieces.

Parsing holds the GIL: 4 MiB of ``{}`` take 150 ms, during which every stream stalls, whichever
thread parses. So a body's items are counted first, in pieces that let other threads run, and
a body with too many is never parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final

LONG_BODY: Final = 64 << 10
"""Bodies of at least this many bytes are counted and parsed off the event loop."""

MAX_NODES: Final = 131_072
"""Most objects, lists, members and strings in a body."""

MAX_ITEMS: Final = 524_288
"""Most commas in a body, nearly all of them between token ids of prompts."""

MAX_DEPTH: Final = 200
"""Most nested lists and objects: enough for any schema, and far below the recursion limits
of our code and of libraries."""

PIECE: Final = 64 << 10
"""Bytes that are scanned before other threads may run, and bytes of a piece of written JSON. A
piece of log-probabilities takes about a millisecond to make."""

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_body(body: bytes, rest: Callable[[], None] = lambda: None) -> object:
    """Parse the JSON of a body.

    Args:
        rest: called between pieces of the work, which take milliseconds each. A thread
            sleeps in it, so that others get the GIL and the core.

    Raises:
        ValueError: the body is not valid JSON or holds too much; the message says why.
    """
    check_size(body, rest)
    # json.loads(bytes) would guess the encoding and accept lone surrogates.
    text = body.decode()
    parsed: object = json.loads(text, parse_constant=_no_constant)
    rest()
    _check_depth(parsed)
    if _may_have_surrogate(body):
        rest()
        try:
            _encode_texts(parsed)
        except UnicodeEncodeError as error:
            raise ValueError("it contains half of a surrogate pair") from error
    return parsed


def check_size(body: bytes, rest: Callable[[], None] = lambda: None) -> None:
    """Raise ValueError if a body holds more than `MAX_NODES` or `MAX_ITEMS`."""
    # An upper bound, as it also counts characters in strings; enough for most bodies.
    rough = 0
    for each in (b"{", b"[", b":", b'"'):
        rough += _count(body, each)
        rest()
    if rough <= MAX_NODES and _count(body, b",") <= MAX_ITEMS:
        return
    nodes = items = 0
    in_string, backslash = False, b""
    for at in range(0, len(body), PIECE):
        piece = backslash + body[at : at + PIECE]
        # The last of an odd number of backslashes escapes the next piece's first byte.
        backslash = b"\\" * ((len(piece) - len(piece.rstrip(b"\\"))) % 2)
        piece = piece.removesuffix(backslash)
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        quotes = len(parts) - 1
        nodes += (quotes + (not in_string)) // 2  # every second quote opens a string
        outside = b"".join(parts[in_string::2])
        nodes += outside.count(b"{") + outside.count(b"[") + outside.count(b":")
        items += outside.count(b",")
        in_string ^= quotes % 2 == 1
        if nodes > MAX_NODES or items > MAX_ITEMS:
            raise ValueError(
                f"it has more than {MAX_NODES} objects, lists, members and strings, or "
                f"{MAX_ITEMS} items: send less in one request"
            )
        rest()


def _count(body: bytes, byte: bytes) -> int:
    return sum(body.count(byte, at, at + PIECE) for at in range(0, len(body), PIECE))


def _may_have_surrogate(body: bytes) -> bool:
    longest = len(b"\\ud800")
    return any(
        _SURROGATE.search(body, at, at + PIECE + longest) for at in range(0, len(body), PIECE)
    )


def _check_depth(parsed: object) -> None:
    level, depth = [parsed], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep: flatten it")
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]


def _encode_texts(parsed: object) -> None:
    """Raise UnicodeEncodeError for half of a surrogate pair. Serializing everything would find
    it too, but in one call, which holds the GIL."""
    todo = [parsed]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            one.encode()
        elif isinstance(one, dict):
            todo.extend(one)
            todo.extend(one.values())
        elif isinstance(one, list):
            todo.extend(each for each in one if isinstance(each, str | dict | list))


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not a valid JSON number")


# -------------------- long json
# JSON that is too long to be made at once: lists whose items are made as they are written.

NUMBERS: Final = 2048
"""Numbers or texts that one call into C writes."""


class Many:
    """A JSON list of many items.

    Its JSON can be kept if an answer repeats it: each of a completion's ``n`` choices shows the
    scores of the same prompt.
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
        items: makes the items, anew each time they are written.
        at_once: how many items are written in one go, in a fraction of a millisecond.
        keep: make the items once, and keep their JSON.
        """
        self.count = count
        self._items = items
        self._at_once = at_once
        self._keep = keep
        self._kept: list[bytes] = []

    @property
    def pieces(self) -> float:
        """The number of pieces in which it is made."""
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
    """Several lists, concatenated into one."""

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
    """The number of pieces in which a body's long lists are made."""
    if isinstance(body, Many | Joined):
        return body.pieces
    if isinstance(body, dict):
        return sum(map(pieces_of, body.values()))
    return sum(map(pieces_of, body)) if isinstance(body, list) else 0


def dump(body: object) -> bytes:
    """Write compact JSON, all at once."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=_listed).encode()


def _listed(value: object) -> list[Any]:
    if isinstance(value, Many | Joined):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def written(body: object) -> Iterator[bytes]:
    """Write compact JSON in pieces of about `PIECE` bytes, each made when it is needed."""
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
