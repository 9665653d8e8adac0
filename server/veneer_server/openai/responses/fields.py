"""The fields of ``POST /v1/responses``."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from veneer_server.openai.fields import CommonFields, RequestFields, with_fractions
from veneer_server.text.templates.options import Effort

__all__ = ["ResponseFields", "TextFormat"]

_Label = Annotated[str, Field(max_length=64)]
"""Of what a response repeats, in OpenAI's bounds: each of its events may."""

_INT32: Final = (1 << 31) - 1


class TextFormat(RequestFields):
    """The format that the answer must have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: _Label | None = None
    description: Annotated[str, Field(max_length=1 << 12)] | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(RequestFields):
    """``text``."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(RequestFields):
    """``reasoning``."""

    effort: Effort | None = None
    context: str | None = None
    mode: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


@with_fractions
class ResponseFields(CommonFields):
    """``POST /v1/responses``. Sampling options that a chat has are served here too.

    Attributes:
        input: a text, or items of a conversation; see `items`.
        max_tool_calls: of tools that OpenAI runs; without effect.
        user, safety_identifier, prompt_cache_key: without effect; a response repeats them.
        chat_template_kwargs, include_reasoning: as chats have them.
        previous_response_id, conversation, prompt: of what OpenAI stores; refused.
        include: only the log-probabilities have an effect.
    """

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=(1 << 32) - 1)] | None = None
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    include: Annotated[list[str], Field(default_factory=list, fail_fast=True, max_length=64)]
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    max_tool_calls: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    user: _Label | None = None
    safety_identifier: _Label | None = None
    prompt_cache_key: _Label | None = None
    tools: Annotated[list[dict[str, Any]], Field(default_factory=list, fail_fast=True)]
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    include_reasoning: bool = True
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
