"""``{"name": ..., "parameters": ...}``, several separated by semicolons: Llama 3.

``<|python_tag|>`` may come first. An answer whose first ``{`` begins no call is text.
"""

from __future__ import annotations

from typing import Final

from veneer_server.text.replies.deltas import Delta
from veneer_server.text.replies.tools.call_object import State
from veneer_server.text.replies.tools.parsing import CallParser, Place

__all__ = ["TAG", "Llama3Parser"]

TAG: Final = "<|python_tag|>"


class Llama3Parser(CallParser):
    """Parser of the Llama 3 family."""

    def __init__(self, *, parallel: bool = True) -> None:
        super().__init__(parallel=parallel, keys=("arguments", "parameters"))

    def _step(self, text: str, at: int, deltas: list[Delta]) -> int:
        if self._place is not Place.CALL:
            at = self._outside(text, at, [TAG, "{"], deltas)
            if at < len(text):
                tag = TAG if text[at] == "<" else ""
                self._begin_object(tag)
                at += len(tag)
            return at
        if self._object.state is State.OPEN:
            at = self._read_object(text, at, deltas)
        if self._object.state is State.WHOLE:
            self._after_call()
        elif self._object.state is State.BROKEN and self._place is Place.CALL:
            self._place = Place.SILENT
        return at
