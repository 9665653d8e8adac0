"""``[TOOL_CALLS]``, and then the calls: Mistral.

Up to version 7 of its tokenizer they are a list, ``[{"name": ..., "arguments": ...}, ...]``,
from version 11 on each follows a tag of its own, ``[TOOL_CALLS]name{...}`` or
``[TOOL_CALLS]name[ARGS]{...}``.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from veneer_server.text.replies.deltas import Delta, ToolArguments, ToolCallBegun
from veneer_server.text.replies.tools.call_object import State, new_id
from veneer_server.text.replies.tools.parsing import CallParser, Place, held_back

__all__ = ["ARGS", "TAG", "MistralParser"]

TAG: Final = "[TOOL_CALLS]"
ARGS: Final = "[ARGS]"

_LONGEST_NAME: Final = 256
"""Most characters before the arguments: otherwise a long text could be held back."""


class _Part(Enum):
    """What is read behind a tag."""

    FIRST = "first"
    """Its first character, which tells the format."""
    LIST = "list"
    NAME = "name"
    ARGUMENTS = "arguments"


class MistralParser(CallParser):
    """Parser of the Mistral family."""

    def __init__(self, *, parallel: bool = True) -> None:
        super().__init__(parallel=parallel)
        self._part = _Part.FIRST

    def _step(self, text: str, at: int, deltas: list[Delta]) -> int:
        if self._place is not Place.CALL:
            at = self._outside(text, at, [TAG], deltas)
            if at < len(text):
                self._begin_object(TAG)
                self._part = _Part.FIRST
                at += len(TAG)
            return at
        match self._part:
            case _Part.FIRST:
                return self._first(text, at)
            case _Part.LIST:
                return self._list(text, at, deltas)
            case _Part.NAME:
                return self._name(text, at, deltas)
            case _Part.ARGUMENTS:
                return self._arguments(text, at, deltas)

    def _first(self, text: str, at: int) -> int:
        sign = text[at]
        if not sign.isspace():
            self._part = _Part.LIST if sign in "[{" else _Part.NAME
            if sign != "[":
                return at
        self._raw.append(sign)
        return at + 1

    def _list(self, text: str, at: int, deltas: list[Delta]) -> int:
        if self._object.state is State.OPEN:
            at = self._read_object(text, at, deltas)
        if self._object.state is State.BROKEN and self._place is Place.CALL:
            self._place = Place.SILENT
        if self._object.state is not State.WHOLE or at == len(text):
            return at
        if text[at] == ",":
            if self._parallel:
                self._begin_object("")
            else:
                self._place = Place.SILENT
        elif not text[at].isspace():  # the list has ended
            self._place = Place.SILENT
        return at + 1

    def _name(self, text: str, at: int, deltas: list[Delta]) -> int:
        end = text.find("{", at)
        self._raw.append(text[at : len(text) if end < 0 else end])
        fits = sum(map(len, self._raw)) <= _LONGEST_NAME
        if end < 0 and fits:
            return len(text)
        name = "".join(self._raw).removeprefix(TAG).partition("[")[0].strip()
        if not fits or not name:
            self._no_call(deltas)
            return len(text) if end < 0 else end
        self._raw = []
        self._part = _Part.ARGUMENTS
        deltas.append(ToolCallBegun(self._calls, new_id(), name))
        self._calls += 1
        return end

    def _arguments(self, text: str, at: int, deltas: list[Delta]) -> int:
        found = text.find(TAG, at)
        end = len(text) - held_back(text, at, [TAG]) if found < 0 else found
        if end > at:
            deltas.append(ToolArguments(self._calls - 1, text[at:end]))
        if found >= 0:
            self._after_call()
            return found
        self._pending = text[end:]
        return len(text)

    def finish(self) -> list[Delta]:
        """See `ReplyParser.finish`."""
        deltas: list[Delta] = []
        if self._place is Place.CALL and self._part is _Part.ARGUMENTS and self._pending:
            deltas.append(ToolArguments(self._calls - 1, self._pending))
        return [*deltas, *super().finish()]
