"""``POST /v1/messages``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from veneer_server.logs import REQUEST_ID
from veneer_server.openai.fields import ChatFields, JsonSchema, ResponseFormat, parse_fields
from veneer_server.openai.generate import GenerateEndpoint, Job
from veneer_server.openai.messages.answer import MessageAnswer
from veneer_server.openai.messages.fields import MessageFields
from veneer_server.openai.messages.turns import messages_of, tools_of
from veneer_server.openai.requests import conversation_call

__all__ = ["MessagesEndpoint"]

_OWN: Final = frozenset({"messages", "tools", "tool_choice", "metadata"})
"""Fields with the names of a chat's that are in another form."""


class MessagesEndpoint(GenerateEndpoint):
    """A chat in Anthropic's form, by way of a chat's call, so that both are served alike."""

    method = "POST /v1/messages"

    def _parse(self, body: object) -> Job:
        fields = parse_fields(MessageFields, body)
        messages = messages_of(fields.messages, fields.system)
        chat = _chat_fields(fields, answering=messages[-1])
        use = tools_of(fields.tools, fields.tool_choice)
        call = conversation_call(chat, messages, use, self._core.base.name)
        answer = MessageAnswer(fields.model, request_id=REQUEST_ID.get())
        return Job([call], answer, fields.stream)


def _chat_fields(fields: MessageFields, answering: Mapping[str, Any]) -> ChatFields:
    """Everything but messages and tools, as a chat has it.

    Args:
        answering: the last message. The answer continues the assistant's, as with Anthropic.
    """
    shared = fields.model_fields_set & ChatFields.model_fields.keys()
    given = {name: getattr(fields, name) for name in shared - _OWN}
    begun = answering["role"] == "assistant" and "tool_calls" not in answering
    disabled = fields.thinking is not None and fields.thinking.type == "disabled"
    config = fields.output_config
    if config.format is not None:
        schema = JsonSchema(schema=config.format.schema_)
        given["response_format"] = ResponseFormat(type="json_schema", json_schema=schema)
    return ChatFields.model_construct(
        messages=[],
        stop=fields.stop_sequences,
        user=fields.metadata.user_id,
        continue_final_message=begun,
        reasoning_effort="none" if disabled else config.effort,
        **given,
    )
