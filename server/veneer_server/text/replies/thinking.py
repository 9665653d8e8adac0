"""Splits ``<think>...</think>`` off the beginning of an answer, however its text is cut.

Qwen3, DeepSeek-R1 and models trained after them write their thinking so. Some chat templates
open the tag in the prompt; the answer then has only the closing one.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final

from veneer_server.text.replies.deltas import Content, Delta, Reasoning

__all__ = ["CLOSE", "OPEN", "Thinking", "ThinkingParser", "thinking_of"]

OPEN: Final = "<think>"
CLOSE: Final = "</think>"


class Thinking(Enum):
    """What may be thinking in an answer."""

    NONE = "none"
    """Nothing: the answer is passed on as it is."""
    TAGGED = "tagged"
    """What the answer itself opens, at its beginning."""
    OPENED = "opened"
    """The prompt has opened it: everything up to the closing tag."""


def thinking_of(prompt: str, begun: str = "") -> Thinking:
    """What may be thinking in an answer to a prompt.

    Args:
        begun: the beginning of the answer, if the prompt ends with it.
    """
    if prompt.rstrip().endswith(OPEN) or begun.rfind(OPEN) > begun.rfind(CLOSE):
        return Thinking.OPENED
    return Thinking.NONE if begun.strip() else Thinking.TAGGED


class _Where(Enum):
    BEFORE = 0
    THINKING = 1
    AFTER = 2


class ThinkingParser:
    """A `ReplyParser`: all `Reasoning` comes before the first `Content`.

    Thinking begins where the answer begins, white space before its tag is dropped; a tag
    further on is ordinary text. An answer that ends before the closing tag is all thinking.
    Otherwise not a character is changed. Each is looked at a bounded number of times.
    """

    def __init__(self, *, opened: bool) -> None:
        """Args: opened: the prompt ends with the opening tag."""
        self._where = _Where.THINKING if opened else _Where.BEFORE
        self._blank: list[str] = []
        """White space before a possible opening tag."""
        self._held = ""
        """What may become a tag."""

    @property
    def thinking(self) -> bool:
        """See `ReplyParser.thinking`."""
        return self._where is _Where.THINKING

    def feed(self, text: str) -> Sequence[Delta]:
        """See `ReplyParser.feed`."""
        deltas: list[Delta] = []
        if self._where is _Where.BEFORE:
            text = self._begin(text)
        if self._where is _Where.THINKING:
            text = self._think(text, deltas)
        if text and self._where is _Where.AFTER:
            deltas.append(Content(text))
        return deltas

    def finish(self) -> Sequence[Delta]:
        """See `ReplyParser.finish`."""
        rest, self._held = "".join(self._blank) + self._held, ""
        self._blank = []
        if not rest:
            return ()
        return (Reasoning(rest) if self._where is _Where.THINKING else Content(rest),)

    def _begin(self, text: str) -> str:
        """Look for the opening tag. Returns what is to be looked at further."""
        if not self._held:
            stripped = text.lstrip()
            self._blank.append(text[: len(text) - len(stripped)])
            text = stripped
        text = self._held + text
        if OPEN.startswith(text[: len(OPEN)]) and len(text) < len(OPEN):
            self._held = text
            return ""
        self._held = ""
        if text.startswith(OPEN):
            self._blank = []
            self._where = _Where.THINKING
            return text[len(OPEN) :]
        text = "".join(self._blank) + text
        self._blank = []
        self._where = _Where.AFTER
        return text

    def _think(self, text: str, deltas: list[Delta]) -> str:
        """Take the thinking out of a text. Returns what follows it."""
        text = self._held + text
        at = text.find(CLOSE)
        if at >= 0:
            thought, text, self._held = text[:at], text[at + len(CLOSE) :], ""
            self._where = _Where.AFTER
            deltas += [Reasoning(thought), Reasoning("")] if thought else [Reasoning("")]
        else:
            cut = len(text) - _overlap(text)
            thought, self._held, text = text[:cut], text[cut:], ""
            if thought:
                deltas.append(Reasoning(thought))
        return text


def _overlap(text: str) -> int:
    """Length of the longest end of a text that begins the closing tag."""
    for size in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if text.endswith(CLOSE[:size]):
            return size
    return 0
