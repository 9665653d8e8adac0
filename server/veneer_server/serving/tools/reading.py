"""What it takes to find thinking and calls of tools in the text of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veneer_server.serving.tools.use import ToolUse
from veneer_server.text.detokenizer import TokenBytes
from veneer_server.text.replies.deltas import ReplyParser
from veneer_server.text.replies.pipeline import reply_parser
from veneer_server.text.replies.thinking import CLOSE, OPEN, Thinking
from veneer_server.text.replies.tools.families import Family, markers
from veneer_server.text.tokenizer import TextTokenizer

__all__ = ["ReplyReader", "Shown"]


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
class ReplyReader:
    """Reads the samples of one request.

    Attributes:
        tokens: those with which to read.
        use: the tools that may be called, if any.
        family: the template's format of calls.
    """

    tokens: TokenBytes
    thinking: Thinking = Thinking.NONE
    use: ToolUse | None = None
    family: Family | None = None

    @classmethod
    def of(
        cls,
        tokenizer: TextTokenizer,
        thinking: Thinking,
        use: ToolUse | None,
        family: Family | None,
    ) -> ReplyReader:
        """With the tags that are special tokens of the tokenizer shown to the parsers."""
        tags: tuple[str, ...] = () if thinking is Thinking.NONE else (OPEN, CLOSE)
        if use is not None and family is not None and not use.forced:
            tags += markers(family)
        special = tokenizer.special_ids(tags) if tags else {}
        tokens = Shown(tokenizer, special) if special else tokenizer
        return cls(tokens, thinking, use, family)

    @property
    def ends_with_calls(self) -> bool:
        """See `ToolUse.ends_with_calls`."""
        return self.use is not None and self.use.ends_with_calls

    def parser(self) -> ReplyParser | None:
        """For one sample; None if its text is passed on as it is.

        Raises:
            InvalidField: see `ToolUse.parser`.
        """
        calls = None if self.use is None else self.use.parser(self.family)
        return reply_parser(self.thinking, calls)
