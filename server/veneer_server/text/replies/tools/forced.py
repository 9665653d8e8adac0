"""Calls that a constraint made the model write: see `veneer_server.serving.tools`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from veneer_server.text.replies.deltas import Delta, ToolArguments, ToolCallBegun
from veneer_server.text.replies.tools.call_object import State, new_id
from veneer_server.text.replies.tools.parsing import CallParser, Place

__all__ = ["NamedParser", "RequiredParser"]


class NamedParser:
    """The answer is the arguments of one known tool."""

    thinking: Final = False

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def feed(self, text: str) -> Sequence[Delta]:
        """See `ReplyParser.feed`."""
        return [*self._begin(), ToolArguments(0, text)] if text else ()

    def finish(self) -> Sequence[Delta]:
        """See `ReplyParser.finish`."""
        return self._begin()

    def _begin(self) -> list[Delta]:
        if self._begun:
            return []
        self._begun = True
        return [ToolCallBegun(0, new_id(), self._name)]


class RequiredParser(CallParser):
    """The answer is a list of calls."""

    def _step(self, text: str, at: int, deltas: list[Delta]) -> int:
        if self._place is not Place.CALL:
            self._begin_object(text[at])
            return at + 1  # behind the list's bracket
        if self._object.state is State.OPEN:
            return self._read_object(text, at, deltas)
        if self._object.state is State.BROKEN:
            self._place = Place.SILENT
        elif text[at] == ",":
            self._begin_object("")
        return at + 1
