"""``<tool_call>{"name": ..., "arguments": ...}</tool_call>``: Hermes, Qwen and many others."""

from __future__ import annotations

from typing import Final

from veneer_server.text.replies.deltas import Delta
from veneer_server.text.replies.tools.call_object import State
from veneer_server.text.replies.tools.parsing import CallParser, Place, held_back

__all__ = ["CLOSE", "OPEN", "HermesParser"]

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


class HermesParser(CallParser):
    """Parser of the Hermes family."""

    def _step(self, text: str, at: int, deltas: list[Delta]) -> int:
        if self._place is not Place.CALL:
            at = self._outside(text, at, [OPEN], deltas)
            if at < len(text):
                self._begin_object(OPEN)
                at += len(OPEN)
            return at
        if self._object.state is State.OPEN:
            return self._read_object(text, at, deltas)
        # Behind the object, or behind what made it broken.
        found = text.find(CLOSE, at)
        if found < 0:
            self._pending = text[len(text) - held_back(text, at, [CLOSE]) :]
            return len(text)
        self._after_call()
        return found + len(CLOSE)
