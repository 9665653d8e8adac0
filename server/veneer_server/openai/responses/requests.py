"""Makes a chat of a request for a response, so that both are served alike."""

from __future__ import annotations

from typing import Final

from veneer_registry.errors import InvalidField

from veneer_server.openai.fields import ChatFields, JsonSchema, ResponseFormat
from veneer_server.openai.responses.fields import ResponseFields
from veneer_server.openai.responses.items import messages_of
from veneer_server.serving.checks import invalid

__all__ = ["chat_fields"]

_LOGPROBS: Final = "message.output_text.logprobs"


def chat_fields(fields: ResponseFields) -> ChatFields:
    """The chat that answers a request.

    Raises:
        InvalidField: a field is not served, or contradicts another.
    """
    _check_served(fields)
    shared = fields.model_fields_set & ChatFields.model_fields.keys()
    given = {name: getattr(fields, name) for name in shared}
    given.update(
        messages=messages_of(fields.input, fields.instructions),
        logprobs=_LOGPROBS in fields.include or fields.top_logprobs > 0,
        top_logprobs=fields.top_logprobs,
    )
    if fields.max_output_tokens is not None:
        given["max_completion_tokens"] = fields.max_output_tokens
    if (wanted := _format(fields)) is not None:
        given["response_format"] = wanted
    return ChatFields.model_construct(**given)


def _check_served(fields: ResponseFields) -> None:
    """Refuses what needs a store, and what is not served yet: the one place for both."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(fields, name) is not None:
            raise invalid(
                name,
                "is not served, since this server stores nothing: send the whole "
                "conversation as input",
            )
    if fields.tools or fields.tool_choice not in ("auto", "none"):
        raise InvalidField(
            "tools are not served here: use /v1/chat/completions, or ask for JSON with "
            "text.format",
            metadata={"field": "tools" if fields.tools else "tool_choice"},
        )
    if fields.reasoning.effort not in (None, "none"):
        raise invalid("reasoning.effort", "is not served: say it in a message")
    if fields.n != 1:
        raise invalid("n", "must be 1: a response has one answer")
    for name in ("max_tokens", "response_format"):
        if name in fields.model_fields_set:
            other = "max_output_tokens" if name == "max_tokens" else "text.format"
            raise invalid(name, f"is of other endpoints: use {other}")


def _format(fields: ResponseFields) -> ResponseFormat | None:
    wanted = fields.text.format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ResponseFormat(type="json_object")
    if wanted.schema_ is None:
        raise invalid("text.format.schema", "is missing: send it")
    schema = JsonSchema(name=wanted.name, schema=wanted.schema_, strict=wanted.strict)
    return ResponseFormat(type="json_schema", json_schema=schema)
