"""The fields of ``POST /v1/responses``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from veneer_server.openai.fields import CommonFields, with_fractions

__all__ = ["ResponseFields", "TextFormat"]


class _Part(BaseModel):
    """As fields of a chat, but null members stay, which means that they are unset."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TextFormat(_Part):
    """The format that the answer must have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(_Part):
    """``text``."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(_Part):
    """``reasoning``."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


@with_fractions
class ResponseFields(CommonFields):
    """``POST /v1/responses``. Sampling options that a chat has are served here too.

    Attributes:
        input: a text, or items of a conversation; see `items`.
        previous_response_id, conversation, prompt: of what OpenAI stores; refused.
        include: only the log-probabilities have an effect.
    """

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=(1 << 32) - 1)] | None = None
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    include: Annotated[list[str], Field(fail_fast=True, max_length=64)] = []
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    max_tool_calls: int | None = None
    tools: list[Any] = []
    tool_choice: str | dict[str, Any] = "auto"
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
