"""What it takes to find calls of tools in the text of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veneer_server.serving.tools.use import ToolUse
from veneer_server.text.detokenizer import TokenBytes
from veneer_server.text.replies.deltas import ReplyParser
from veneer_server.text.replies.tools.families import Family

__all__ = ["Shown", "ToolReader"]


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
    """Reads the samples of one request.

    Attributes:
        family: the template's format.
        tokens: those with which to read.
    """

    use: ToolUse
    family: Family | None
    tokens: TokenBytes

    def parser(self) -> ReplyParser:
        """For one sample. Raises InvalidField, see `ToolUse.parser`."""
        return self.use.parser(self.family)
