"""Which format of calls a chat template has, and the parser for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final

from veneer_server.text.replies.deltas import ReplyParser
from veneer_server.text.replies.tools import hermes, llama3, mistral

__all__ = ["Family", "family_of", "knows_tools", "markers", "parser_of"]


class Family(StrEnum):
    """A format, by vLLM's name for its parser."""

    HERMES = "hermes"
    LLAMA3 = "llama3_json"
    MISTRAL = "mistral"


_TOOLS: Final = re.compile(r"\btools\b")
_OTHERS: Final = ("<function=", "<arg_key>", "<｜tool", "<|channel|>")
"""Signs of formats that are not served, though some of them use Hermes' tags as well."""

_MARKERS: Final[Mapping[Family, tuple[str, ...]]] = {
    Family.HERMES: (hermes.OPEN, hermes.CLOSE),
    Family.LLAMA3: (llama3.TAG,),
    Family.MISTRAL: (mistral.TAG, mistral.ARGS),
}

_PARSERS: Final[Mapping[Family, Callable[..., ReplyParser]]] = {
    Family.HERMES: hermes.HermesParser,
    Family.LLAMA3: llama3.Llama3Parser,
    Family.MISTRAL: mistral.MistralParser,
}


def knows_tools(template: str | None) -> bool:
    """Whether a chat template shows tools to the model."""
    return template is not None and _TOOLS.search(template) is not None


def family_of(template: str | None) -> Family | None:
    """The format in which a chat template asks for calls; None if it is not served.

    A template that does not know tools gets them in Hermes' format; see
    `veneer_server.text.templates.tool_words`.
    """
    if template is None or not knows_tools(template):
        return Family.HERMES
    if any(sign in template for sign in _OTHERS):
        return None
    if mistral.TAG in template:
        return Family.MISTRAL
    if hermes.OPEN in template:
        return Family.HERMES
    if llama3.TAG in template or "<|start_header_id|>" in template:
        return Family.LLAMA3
    return None


def markers(family: Family) -> tuple[str, ...]:
    """Texts that announce calls. Where they are special tokens, they must be shown to the
    parser, though the text of an answer has none."""
    return _MARKERS[family]


def parser_of(family: Family, *, parallel: bool) -> ReplyParser:
    """A parser for one answer.

    Args:
        parallel: give out all calls, rather than only the first one.
    """
    return _PARSERS[family](parallel=parallel)
