"""Tools and their calls: protobuf to records and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer_proto.v1 import inference_pb2

from veneer_server.serving.checks import invalid, refuse
from veneer_server.serving.tools.history import History, PastCall, check_calls, read_json
from veneer_server.serving.tools.use import (
    MAX_TOOL_BYTES,
    MAX_TOOLS,
    Choice,
    Tool,
    ToolUse,
    check_tool,
)
from veneer_server.text.replies.deltas import Delta, ToolArguments, ToolCallBegun, joined

__all__ = ["call_deltas", "calls", "messages", "tool_use"]


def tool_use(request: inference_pb2.GenerateRequest) -> ToolUse | None:
    """The tools that the answer may or must use.

    Raises:
        InvalidField: they are not valid, too many, or do not fit the choice.
    """
    choice = request.tool_choice
    named = choice.name if choice.WhichOneof("choice") == "name" else ""
    if choice.mode not in inference_pb2.ToolMode.values():
        refuse("tool_choice.mode", f"has the unknown value {choice.mode}: leave it unset")
    required = choice.mode == inference_pb2.TOOL_MODE_REQUIRED
    if not request.tools:
        if named or required:
            refuse("tool_choice", "needs tools: send them")
        return None
    if request.WhichOneof("input") != "messages":
        refuse("tools", "needs messages: the chat template shows tools to the model")
    if choice.mode == inference_pb2.TOOL_MODE_NONE:
        return None
    if len(request.tools) > MAX_TOOLS:  # before they are parsed
        refuse("tools", f"has {len(request.tools)} entries: send at most {MAX_TOOLS}")
    if sum(len(tool.parameters) for tool in request.tools) > MAX_TOOL_BYTES:
        refuse("tools", f"has more than {MAX_TOOL_BYTES} bytes: shorten descriptions")
    parallel = request.parallel_tool_calls or not request.HasField("parallel_tool_calls")
    how = Choice.NAMED if named else Choice.REQUIRED if required else Choice.AUTO
    tools = tuple(_tool(tool, f"tools[{at}]") for at, tool in enumerate(request.tools))
    return ToolUse(tools, how, named, parallel)


def _tool(tool: inference_pb2.Tool, field: str) -> Tool:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        try:
            parameters = read_json(tool.parameters)
        except ValueError as error:
            raise invalid(f"{field}.parameters", f"is not valid JSON: {error}") from error
        function["parameters"] = parameters
    if tool.strict:
        function["strict"] = True
    made = Tool(function)
    check_tool(made, field)
    return made


def messages(chat: Iterable[inference_pb2.ChatMessage]) -> tuple[Mapping[str, Any], ...]:
    """Messages as a chat template gets them. Raises InvalidField, see `History`."""
    history, made = History(), []
    for at, message in enumerate(chat):
        field = f"messages[{at}]"
        check_calls(len(message.tool_calls), field)
        calls = [PastCall(call.id, call.name, call.arguments) for call in message.tool_calls]
        made.append(
            history.message(
                message.role,
                message.content,
                calls,
                call_id=message.tool_call_id,
                name=message.tool_name,
                reasoning=message.reasoning,
                field=field,
            )
        )
    return tuple(made)


def call_deltas(parts: Iterable[Delta]) -> list[inference_pb2.ToolCallDelta]:
    """The pieces of calls among an answer's parts."""
    pieces = []
    for part in joined(parts):
        if isinstance(part, ToolCallBegun):
            pieces.append(
                inference_pb2.ToolCallDelta(index=part.index, id=part.id, name=part.name)
            )
        elif isinstance(part, ToolArguments):
            pieces.append(inference_pb2.ToolCallDelta(index=part.index, arguments=part.text))
    return pieces


def calls(parts: Sequence[Delta]) -> list[inference_pb2.ToolCall]:
    """The calls of a whole answer."""
    begun = [part for part in parts if isinstance(part, ToolCallBegun)]
    texts: dict[int, list[str]] = {call.index: [] for call in begun}
    for part in parts:
        if isinstance(part, ToolArguments):
            texts[part.index].append(part.text)
    return [
        inference_pb2.ToolCall(id=call.id, name=call.name, arguments="".join(texts[call.index]))
        for call in begun
    ]
