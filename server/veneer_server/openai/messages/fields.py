"""The fields of ``POST /v1/messages``."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from veneer_server.openai.fields import RequestFields, with_fractions
from veneer_server.serving.checks import MAX_MESSAGES, MAX_STOP_LENGTH, MAX_STOPS
from veneer_server.text.templates.options import Effort

__all__ = ["MessageFields"]

_UINT32: Final = (1 << 32) - 1
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class Thinking(RequestFields):
    """``thinking``: whether the model thinks first, where its template lets a caller say so."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None
    display: str | None = None


class ToolChoice(RequestFields):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: str = ""
    disable_parallel_tool_use: bool = False


class OutputFormat(RequestFields):
    """``output_config.format``: a constraint."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestFields):
    """``output_config``."""

    effort: Effort | None = None
    format: OutputFormat | None = None


class Metadata(RequestFields):
    """``metadata``."""

    user_id: str | None = None


@with_fractions
class MessageFields(RequestFields):
    """``POST /v1/messages``, with our other fractions beside Anthropic's.

    Attributes:
        messages, system, tools: see `turns`.
    """

    model: str = Field(min_length=1, max_length=512)
    messages: Annotated[_Objects, Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=_UINT32)]
    system: str | _Objects = ""
    top_k: Annotated[int, Field(ge=0, le=_UINT32)] | None = None
    seed: Annotated[int, Field(ge=0, le=(1 << 64) - 1)] | None = None
    stop_sequences: Annotated[
        list[_Stop], Field(default_factory=list, fail_fast=True, max_length=MAX_STOPS)
    ]
    stream: bool = False
    tools: _Objects = Field(default_factory=list)
    tool_choice: ToolChoice = ToolChoice()
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    metadata: Metadata = Metadata()
    service_tier: str | None = None
    inference_geo: str | None = None
    cache_control: dict[str, Any] | None = None
