"""What the parsers of all families share: text outside calls, and what became no call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from enum import Enum
from typing import Final

from veneer_server.text.replies.deltas import Content, Delta
from veneer_server.text.replies.tools.call_object import CallObject, State

__all__ = ["CallParser", "Place", "held_back"]


class Place(Enum):
    """Where a parser is."""

    TEXT = "text"
    """Before the first call."""
    CALL = "call"
    BETWEEN = "between"
    """After a call; text here is dropped, as vLLM does."""
    PLAIN = "plain"
    """What looked like the first call is none, so all of the answer is text."""
    SILENT = "silent"
    """No further call is wanted, or one was broken."""


class CallParser(ABC):
    """Finds calls in an answer's text. A `ReplyParser`, in time linear in the text.

    A call is given out once its name and its arguments' first character are known. What
    turns out to be no call before that is text, if no call came before it.
    """

    thinking: Final = False

    def __init__(
        self, *, parallel: bool = True, keys: Collection[str] = ("arguments",)
    ) -> None:
        """Args:
        parallel: give out all calls, rather than only the first one.
        keys: names that a call's arguments may have.
        """
        self._parallel = parallel
        self._keys = keys
        self._place = Place.TEXT
        self._calls = 0
        self._pending = ""
        """Text that is not understood without more of it."""
        self._raw: list[str] = []
        """Text of a call that has not begun."""
        self._object = CallObject(0, keys)

    def feed(self, text: str) -> Sequence[Delta]:
        """See `ReplyParser.feed`."""
        text, self._pending = self._pending + text, ""
        deltas: list[Delta] = []
        at = 0
        while at < len(text):
            if self._place is Place.SILENT:
                break
            if self._place is Place.PLAIN:
                _say(deltas, text[at:])
                break
            at = self._step(text, at, deltas)
        return deltas

    def finish(self) -> Sequence[Delta]:
        """See `ReplyParser.finish`."""
        deltas: list[Delta] = []
        if self._place in (Place.TEXT, Place.PLAIN) or (self._raw and not self._calls):
            _say(deltas, "".join(self._raw) + self._pending)
        self._raw, self._pending = [], ""
        return deltas

    @abstractmethod
    def _step(self, text: str, at: int, deltas: list[Delta]) -> int:
        """Read on from a position, at which there is a character. Returns the next position;
        at the end, text that must be read again goes into `_pending`."""

    def _outside(self, text: str, at: int, tags: Sequence[str], deltas: list[Delta]) -> int:
        """Pass text on up to the first of ``tags``. Returns where that begins, or the text's
        end."""
        found = [place for tag in tags if (place := text.find(tag, at)) >= 0]
        end = min(found, default=len(text) - held_back(text, at, tags))
        if self._place is Place.TEXT:
            _say(deltas, text[at:end])
        if not found:
            self._pending = text[end:]
            return len(text)
        return end

    def _begin_object(self, opener: str) -> None:
        """An object begins, behind the text that announced it."""
        self._place = Place.CALL
        self._raw = [opener]
        self._object = CallObject(self._calls, self._keys)

    def _read_object(self, text: str, at: int, deltas: list[Delta]) -> int:
        """Read on in an object. `State.BROKEN` before it began ends all calls."""
        begun = self._object.begun
        end, more = self._object.feed(text, at)
        deltas += more
        if self._object.begun:
            self._raw = []
            self._calls += not begun
        else:
            self._raw.append(text[at:end])
            if self._object.state is State.BROKEN:
                self._no_call(deltas)
        return end

    def _no_call(self, deltas: list[Delta]) -> None:
        raw, self._raw = "".join(self._raw), []
        if self._calls:
            self._place = Place.SILENT
        else:
            self._place = Place.PLAIN
            _say(deltas, raw)

    def _after_call(self) -> None:
        self._place = Place.BETWEEN if self._parallel else Place.SILENT


def held_back(text: str, at: int, tags: Sequence[str]) -> int:
    """How many characters at the end of ``text[at:]`` may be the beginning of a tag."""
    longest = min(max(map(len, tags)) - 1, len(text) - at)
    for size in range(longest, 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return size
    return 0


def _say(deltas: list[Delta], text: str) -> None:
    if text:
        deltas.append(Content(text))
