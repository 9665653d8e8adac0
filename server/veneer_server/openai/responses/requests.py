"""Makes the call of a request for a response by way of a chat's, so that both are served
alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from veneer_server.openai.fields import ChatFields, JsonSchema, ResponseFormat
from veneer_server.openai.requests import CHAT_SCORES, conversation_call
from veneer_server.openai.responses.fields import ResponseFields
from veneer_server.openai.responses.items import messages_of
from veneer_server.openai.tools.definitions import Form, Given, read_tools, use_of
from veneer_server.serving.answer_room import AnswerForm
from veneer_server.serving.checks import invalid
from veneer_server.serving.records import GenerateCall
from veneer_server.serving.tools.use import check_tools

__all__ = ["chat_fields", "response_call", "shown_tools"]

_OWN: Final = frozenset({"tools", "tool_choice", "parallel_tool_calls", "include_reasoning"})
"""Fields with the names of a chat's that are in another form, or have effect on the answer's
form only."""

_LOGPROBS: Final = "message.output_text.logprobs"


def response_call(fields: ResponseFields, chat: ChatFields, base: str) -> GenerateCall:
    """The call for a request.

    Args:
        chat: what `chat_fields` made of the request.

    Raises:
        InvalidField: fields contradict each other, or one is outside its range.
    """
    given = Given(fields.tools, fields.tool_choice, fields.parallel_tool_calls)
    messages = messages_of(fields.input, fields.instructions)
    # A stream's events repeat them: that of the tokens, and four when all is complete.
    form = AnswerForm(
        replace(
            CHAT_SCORES,
            copies=5 if fields.stream else 1,
            numbered=fields.return_tokens_as_token_ids,
        )
    )
    return conversation_call(chat, messages, use_of(given, Form.FLAT), base, form)


def chat_fields(fields: ResponseFields) -> ChatFields:
    """Everything but messages and tools, as a chat has it.

    Raises:
        InvalidField: a field is not served, or contradicts another.
    """
    _check_served(fields)
    shared = fields.model_fields_set & ChatFields.model_fields.keys()
    given = {name: getattr(fields, name) for name in shared - _OWN}
    given.update(
        messages=[],
        reasoning_effort=fields.reasoning.effort,
        logprobs=_LOGPROBS in fields.include or fields.top_logprobs > 0,
        top_logprobs=fields.top_logprobs,
    )
    if fields.max_output_tokens is not None:
        given["max_completion_tokens"] = fields.max_output_tokens
    if (wanted := _format(fields)) is not None:
        given["response_format"] = wanted
    return ChatFields.model_construct(**given)


def shown_tools(fields: ResponseFields) -> dict[str, Any]:
    """What a response says about its request's tools: what was read of them, in bounds, since
    several events repeat it.

    Raises:
        InvalidField: they are too long.
    """
    tools, choice = read_tools(fields.tools, Form.FLAT), fields.tool_choice
    if tools:
        check_tools(tools)
    shown = [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.function.get("description"),
            "parameters": tool.parameters,
            "strict": tool.strict,
        }
        for tool in tools
    ]
    if isinstance(choice, dict):
        named = choice.get("tools", ())
        choice = {name: choice[name] for name in ("type", "name", "mode") if name in choice}
        if choice["type"] == "allowed_tools":
            choice["tools"] = [{"type": "function", "name": one["name"]} for one in named]
    return {
        "tools": shown,
        "tool_choice": choice,
        "parallel_tool_calls": fields.parallel_tool_calls,
    }


def _check_served(fields: ResponseFields) -> None:
    """Refuses what needs a store, and what is not served: the one place for both."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(fields, name) is not None:
            raise invalid(
                name,
                "is not supported because this server stores nothing: send the whole "
                "conversation as input",
            )
    if fields.n != 1:
        raise invalid("n", "must be 1: a response has exactly one answer")
    for name in ("max_tokens", "response_format"):
        if name in fields.model_fields_set:
            other = "max_output_tokens" if name == "max_tokens" else "text.format"
            raise invalid(name, f"belongs to other endpoints: use {other}")
    if fields.return_token_ids or fields.prompt_logprobs is not None:
        name = "return_token_ids" if fields.return_token_ids else "prompt_logprobs"
        raise invalid(name, "belongs to other endpoints: use /v1/chat/completions")


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
