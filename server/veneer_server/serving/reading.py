"""Takes the text of an answer apart, if its request asks for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veneer_server.serving.records import FinishReason
from veneer_server.serving.tools.use import ToolUse
from veneer_server.text.detokenizer import TokenBytes
from veneer_server.text.replies.deltas import Content, Delta, ReplyParser, ToolCallBegun
from veneer_server.text.replies.tools.families import Family

__all__ = ["Reading", "Shown", "ToolReader"]


class Reading:
    """Reads one answer."""

    def __init__(self, parser: ReplyParser, *, ends_with_calls: bool) -> None:
        """Args: ends_with_calls: see `ToolUse`."""
        self._parser = parser
        self._ends_with_calls = ends_with_calls
        self._called = False

    def read(
        self, text: str, finish: FinishReason | None
    ) -> tuple[str, Sequence[Delta], FinishReason | None]:
        """More of the answer, and why it ended: the text for the user, all parts, and the
        reason to report."""
        parts = list(self._parser.feed(text)) if text else []
        if finish is not None:
            parts += self._parser.finish()
        self._called = self._called or any(isinstance(part, ToolCallBegun) for part in parts)
        if finish == "stop" and self._called and self._ends_with_calls:
            finish = "tool_calls"
        content = "".join(part.text for part in parts if isinstance(part, Content))
        return content, parts, finish


class Shown:
    """A tokenizer's bytes, with some special tokens shown as text."""

    def __init__(self, tokens: TokenBytes, special: Mapping[int, bytes]) -> None:
        self._tokens = tokens
        self._special = special
        self.strip_first_space = tokens.strip_first_space

    def token_bytes(self, token: int) -> bytes:
        """See `TokenBytes`."""
        return self._special.get(token) or self._tokens.token_bytes(token)


@dataclass(frozen=True, slots=True)
class ToolReader:
    """Makes the readers of one request's samples.

    Attributes:
        family: the template's format.
        tokens: those with which to read.
    """

    use: ToolUse
    family: Family | None
    tokens: TokenBytes

    def reading(self) -> Reading:
        """For one sample. Raises InvalidField, see `ToolUse.parser`."""
        return Reading(self.use.parser(self.family), ends_with_calls=self.use.ends_with_calls)
