"""Converts tools and their calls to protobuf messages and back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from veneer_proto.v1 import inference_pb2

from veneer_client.tool_types import ToolCall, ToolMode
from veneer_client.types import ChatMessage, GenerateOptions

__all__ = ["add_message", "calls", "offer"]

_MODES: Final = {
    ToolMode.AUTO: inference_pb2.TOOL_MODE_UNSPECIFIED,
    ToolMode.NONE: inference_pb2.TOOL_MODE_NONE,
    ToolMode.REQUIRED: inference_pb2.TOOL_MODE_REQUIRED,
}


def add_message(chat: inference_pb2.ChatInput, message: ChatMessage) -> None:
    """Append a message to a chat."""
    added = chat.messages.add(
        role=message.role,
        content=message.content,
        reasoning=message.reasoning,
        tool_call_id=message.tool_call_id,
        tool_name=message.tool_name,
    )
    for call in message.tool_calls:
        added.tool_calls.add(id=call.id, name=call.name, arguments=call.arguments)


def offer(request: inference_pb2.GenerateRequest, options: GenerateOptions) -> None:
    """Set the tools of a request."""
    for tool in options.get("tools", ()):
        parameters = "" if tool.parameters is None else json.dumps(tool.parameters)
        request.tools.add(
            name=tool.name,
            description=tool.description,
            parameters=parameters,
            strict=tool.strict,
        )
    if "tool_choice" in options:
        choice = options["tool_choice"]
        if isinstance(choice, ToolMode):
            request.tool_choice.mode = _MODES[choice]
        else:
            request.tool_choice.name = choice
    if "parallel_tool_calls" in options:
        request.parallel_tool_calls = options["parallel_tool_calls"]


def calls(messages: Iterable[inference_pb2.ToolCall]) -> tuple[ToolCall, ...]:
    """The calls of an answer."""
    return tuple(ToolCall(call.id, call.name, call.arguments) for call in messages)
