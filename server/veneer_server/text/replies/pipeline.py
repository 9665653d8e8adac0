"""Joins parsers: thinking is split off first, another parser gets the content that is left."""

from __future__ import annotations

from collections.abc import Sequence

from veneer_server.text.replies.deltas import Content, Delta, ReplyParser
from veneer_server.text.replies.thinking import THINK, Tags, Thinking, ThinkingParser

__all__ = ["Pipeline", "reply_parser"]


class Pipeline:
    """A `ReplyParser` of two: the second sees the first one's `Content` as its text."""

    def __init__(self, first: ReplyParser, second: ReplyParser) -> None:
        self._first = first
        self._second = second

    @property
    def thinking(self) -> bool:
        """See `ReplyParser.thinking`."""
        return self._first.thinking

    def feed(self, text: str) -> Sequence[Delta]:
        """See `ReplyParser.feed`."""
        return self._pass_on(self._first.feed(text))

    def finish(self) -> Sequence[Delta]:
        """See `ReplyParser.finish`."""
        return [*self._pass_on(self._first.finish()), *self._second.finish()]

    def _pass_on(self, deltas: Sequence[Delta]) -> list[Delta]:
        passed: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, Content):
                passed += self._second.feed(delta.text)
            else:
                passed.append(delta)
        return passed


def reply_parser(
    thinking: Thinking, then: ReplyParser | None = None, *, tags: Tags = THINK
) -> ReplyParser | None:
    """The parser of one answer; None if its text is passed on as it is.

    Args:
        then: takes apart what is left beside the thinking.
    """
    if thinking is Thinking.NONE:
        return then
    first = ThinkingParser(opened=thinking is Thinking.OPENED, tags=tags)
    return first if then is None else Pipeline(first, then)
