"""What it takes to find thinking and calls of tools in the text of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veneer_server.serving.tools.auto import auto_grammar
from veneer_server.serving.tools.use import ToolUse
from veneer_server.text.detokenizer import TokenBytes
from veneer_server.text.prompts import Prompt
from veneer_server.text.replies.deltas import ReplyParser
from veneer_server.text.replies.pipeline import reply_parser
from veneer_server.text.replies.thinking import THINK, Tags, Thinking
from veneer_server.text.replies.tools.families import Family, markers
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import Constraint

__all__ = ["Plan", "ReplyReader", "Shown"]


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
class Plan:
    """How one request's answers may look.

    Attributes:
        use: the tools that may be called, if any.
        family: the template's format of calls.
        constraint: what the output must match.
        free: whether it may begin with any text, thinking among it.
    """

    use: ToolUse | None
    family: Family | None
    constraint: Constraint | None
    free: bool

    @property
    def by_tools(self) -> bool:
        """Whether tools made the constraint."""
        return self.use is not None and self.constraint is not None

    @classmethod
    def of(
        cls,
        use: ToolUse | None,
        family: Family | None,
        wanted: Constraint | None,
        tokenizer: TextTokenizer,
    ) -> Plan:
        """Args:
        family: of the request's template.
        wanted: the constraint that the request asks for, or that forces a call.

        Raises:
            InvalidField: see `ToolUse.parser`.
        """
        if use is None:
            return cls(None, None, wanted, free=wanted is None)
        use.parser(family)
        if use.forced or (wanted is None and not any(tool.strict for tool in use.tools)):
            return cls(use, family, wanted, free=wanted is None)
        if family is not Family.HERMES:
            # Nothing tells a call from other output: an answer in a format holds none.
            return cls(use if wanted is None else None, family, wanted, free=wanted is None)
        special = bool(tokenizer.special_ids(markers(family)[:1]))
        grammar = auto_grammar(use, wanted, special=special)
        return cls(use, family, grammar, free=wanted is None)


@dataclass(frozen=True, slots=True)
class ReplyReader:
    """Reads the samples of one request.

    Attributes:
        tokens: those with which to read.
        tags: those of the thinking.
        use: the tools that may be called, if any.
        family: the template's format of calls.
    """

    tokens: TokenBytes
    thinking: Thinking = Thinking.NONE
    use: ToolUse | None = None
    family: Family | None = None
    tags: Tags = THINK

    @classmethod
    def of(cls, tokenizer: TextTokenizer, prompt: Prompt, plan: Plan) -> ReplyReader:
        """Of answers to a prompt, with the tags that are special tokens of the tokenizer shown
        to the parsers."""
        use, family = plan.use, plan.family
        thinking, tags = prompt.thinking, prompt.tags
        if not plan.free:  # output of a given format has no thinking in it
            thinking = Thinking.NONE
        read: tuple[str, ...] = ()
        if thinking is not Thinking.NONE:
            read = tags.open, tags.close
        if use is not None and family is not None and not use.forced:
            read += markers(family)
        special = tokenizer.special_ids(read) if read else {}
        tokens = Shown(tokenizer, special) if special else tokenizer
        return cls(tokens, thinking, use, family, tags)

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
        return reply_parser(self.thinking, calls, tags=self.tags)
