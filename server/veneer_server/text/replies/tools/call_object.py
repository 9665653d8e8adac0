"""One call, written as a JSON object: ``{"name": ..., "arguments": {...}}``, as it arrives."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Iterator
from enum import Enum
from typing import Final

from veneer_server.text.replies.deltas import Delta, ToolArguments, ToolCallBegun

__all__ = ["CallObject", "State", "new_id"]

_ALPHABET: Final = string.ascii_letters + string.digits
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_STRING: Final = re.compile(r'[^"\\]*')
_STRUCTURE: Final = re.compile(r'[^"{}\[\]<]*')
_SCALAR: Final = re.compile(r"[^,}\s<]*")
_CLOSES: Final = {"{": "}", "[": "]"}


def new_id() -> str:
    """An id for a call: nine letters and digits, which is the form that Mistral's templates
    insist on."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class State(Enum):
    """How far a call is."""

    OPEN = "open"
    WHOLE = "whole"
    BROKEN = "broken"
    """It is not JSON, or not a call."""


class _At(Enum):
    """What comes next in the object."""

    BRACE = "brace"
    KEY = "key"
    COLON = "colon"
    VALUE = "value"
    COMMA = "comma"


class _Value:
    """A JSON value's text, up to its end. Nested values are only checked for their brackets.

    Each of its methods takes a text and a position, and returns the position that it reached.
    """

    __slots__ = ("_closers", "_escaped", "_in_string", "_scalar", "ended")

    def __init__(self, first: str) -> None:
        self.ended: State = State.OPEN
        self._closers: list[str] = []
        self._in_string = self._escaped = False
        self._scalar = first not in '{["'

    def feed(self, text: str, at: int) -> int:
        if self._scalar:
            at = _end(_SCALAR, text, at)
            if at < len(text):
                self.ended = State.WHOLE
            return at
        while at < len(text) and self.ended is State.OPEN:
            at = self._string(text, at) if self._in_string else self._outside(text, at)
        return at

    def _string(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        at = _end(_STRING, text, at)
        if at == len(text):
            return at
        if text[at] == "\\":
            self._escaped = True
        else:
            self._in_string = False
            self._check()
        return at + 1

    def _outside(self, text: str, at: int) -> int:
        at = _end(_STRUCTURE, text, at)
        if at == len(text):
            return at
        found = text[at]
        if found == '"':
            self._in_string = True
        elif found in _CLOSES:
            self._closers.append(_CLOSES[found])
        elif self._closers and found == self._closers[-1]:
            self._closers.pop()
            self._check()
        else:  # a tag, or a bracket that closes another kind
            self.ended = State.BROKEN
            return at
        return at + 1

    def _check(self) -> None:
        if not self._closers:
            self.ended = State.WHOLE


class CallObject:
    """Reads one object. The call begins with its arguments' first character, once its name is
    known; from then on it cannot be taken back.

    Attributes:
        state: whether the object has ended.
        begun: whether `ToolCallBegun` was given.
    """

    __slots__ = (
        "_at",
        "_buffered",
        "_index",
        "_key",
        "_keys",
        "_name",
        "_raw",
        "_value",
        "begun",
        "state",
    )

    def __init__(self, index: int, keys: Collection[str] = ("arguments",)) -> None:
        """Args:
        index: of the call within the answer.
        keys: names that the arguments may have in the object.
        """
        self.state = State.OPEN
        self.begun = False
        self._index = index
        self._keys = keys
        self._at = _At.BRACE
        self._key = ""
        self._name = ""
        self._value: _Value | None = None
        self._raw: list[str] = []
        self._buffered: str | None = None
        """Arguments that came before the name."""

    def feed(self, text: str, at: int) -> tuple[int, list[Delta]]:
        """Read on from a position. Returns the one that was reached, and what is certain."""
        deltas: list[Delta] = []
        while at < len(text) and self.state is State.OPEN:
            if self._value is not None:
                at = self._read_value(self._value, text, at, deltas)
                continue
            at = _end(_SPACE, text, at)
            if at < len(text):
                at = self._read_sign(text, at, deltas)
        return at, deltas

    def _read_sign(self, text: str, at: int, deltas: list[Delta]) -> int:
        sign = text[at]
        match self._at, sign:
            case (_At.BRACE, "{"):
                self._at = _At.KEY
            case (_At.KEY, '"'):
                self._value = _Value(sign)
                return at
            case (_At.COLON, ":"):
                self._at = _At.VALUE
            case (_At.VALUE, _) if sign in '{["-tfn' or sign.isdigit():
                self._value = _Value(sign)
                if self._key in self._keys and self._name and not self.begun:
                    deltas += self._begin()
                return at
            case (_At.COMMA, ","):
                self._at = _At.KEY
            case (_At.COMMA, "}"):
                self._end(deltas)
            case _:
                self.state = State.BROKEN
                return at
        return at + 1

    def _read_value(self, value: _Value, text: str, at: int, deltas: list[Delta]) -> int:
        end = value.feed(text, at)
        piece = text[at:end]
        if self._streams:
            if piece:
                deltas.append(ToolArguments(self._index, piece))
        else:
            self._raw.append(piece)
        if value.ended is State.BROKEN:
            self.state = State.BROKEN
        elif value.ended is State.WHOLE:
            self._value_ended()
        return end

    @property
    def _streams(self) -> bool:
        """Whether the current value is passed on as it comes."""
        return self.begun and self._at is _At.VALUE and self._key in self._keys

    def _value_ended(self) -> None:
        streamed = self._streams
        raw, self._raw, self._value = "".join(self._raw), [], None
        if self._at is _At.KEY:
            self._key, self._at = _text_of(raw), _At.COLON
            return
        self._at = _At.COMMA
        if streamed:
            self._keys = ()  # a second value of the same name is not part of the call
        elif self._key == "name" and not self.begun:
            self._name = _text_of(raw)
            if not self._name:
                self.state = State.BROKEN
        elif self._key in self._keys and _is_json(raw):
            self._buffered = raw

    def _begin(self) -> Iterator[Delta]:
        self.begun = True
        yield ToolCallBegun(self._index, new_id(), self._name)

    def _end(self, deltas: list[Delta]) -> None:
        if not self.begun and self._name and self._buffered is not None:
            deltas += self._begin()
            deltas.append(ToolArguments(self._index, self._buffered))
        self.state = State.WHOLE if self.begun else State.BROKEN


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None, "the patterns match the empty string"
    return match.end()


def _text_of(raw: str) -> str:
    """The value of a JSON string; empty for anything else."""
    try:
        value: object = json.loads(raw)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def _is_json(raw: str) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True
