"""Reads the tools of a chat request, and the calls in its messages.

The older ``functions`` and ``function_call`` are the same in an older form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from veneer_server.serving.checks import invalid, refuse
from veneer_server.serving.tools.history import History, PastCall, check_calls
from veneer_server.serving.tools.use import MAX_TOOLS, Choice, Tool, ToolUse, check_tool

__all__ = ["ToolFields", "ToolMessage", "template_messages", "tools_of"]

_ROLES: Final = {"developer": "system", "function": "tool"}
"""OpenAI's newer and older role names. Templates do not know them; many drop such messages."""


class ToolMessage(Protocol):
    """A message's fields."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str | None: ...
    @property
    def name(self) -> str: ...
    @property
    def reasoning(self) -> str: ...
    @property
    def reasoning_content(self) -> str: ...
    @property
    def tool_calls(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def function_call(self) -> Mapping[str, Any] | None: ...
    @property
    def tool_call_id(self) -> str: ...


class ToolFields(Protocol):
    """A request's fields."""

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def tool_choice(self) -> str | Mapping[str, Any] | None: ...
    @property
    def parallel_tool_calls(self) -> bool: ...
    @property
    def functions(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def function_call(self) -> str | Mapping[str, Any] | None: ...


def tools_of(fields: ToolFields) -> ToolUse | None:
    """The tools that the answer may or must use; None for a request without tools, and for one
    that wants none of them to be called.

    Raises:
        InvalidField: a tool or the choice is not in OpenAI's form, or they do not fit.
    """
    if fields.functions:
        if fields.tools:
            raise invalid("functions", "conflicts with tools: send one of them")
        if fields.tool_choice is not None:
            raise invalid("tool_choice", "is not for functions: send function_call")
        given, field, choice = fields.functions, "functions", fields.function_call
        tools = [_tool(function, f"functions[{at}]") for at, function in _few(given, field)]
        parallel = False
    else:
        if fields.function_call not in (None, "none", "auto"):
            raise invalid("function_call", "needs functions: send them")
        given, field, choice = fields.tools, "tools", fields.tool_choice
        tools = [_tool_entry(entry, f"tools[{at}]") for at, entry in _few(given, field)]
        parallel = fields.parallel_tool_calls
    named = _choice_name(choice, "function_call" if field == "functions" else "tool_choice")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "needs tools: send them")
        return None
    if choice == "none":
        return None
    how = Choice.NAMED if named else Choice.REQUIRED if choice == "required" else Choice.AUTO
    return ToolUse(tuple(tools), how, named, parallel)


def _few(given: Sequence[Mapping[str, Any]], field: str) -> Sequence[tuple[int, Any]]:
    if len(given) > MAX_TOOLS:
        refuse(field, f"has {len(given)} entries: send at most {MAX_TOOLS}")
    return list(enumerate(given))


def _tool_entry(entry: Mapping[str, Any], field: str) -> Tool:
    kind = entry.get("type", "function")
    if kind != "function":
        shown = kind[:40] if isinstance(kind, str) else None
        refuse(f"{field}.type", f"is {shown!r}: only tools of type 'function' are served")
    return _tool(entry.get("function"), f"{field}.function")


def _tool(function: object, field: str) -> Tool:
    if not isinstance(function, dict):
        refuse(field, "is not an object: give the function's name and parameters")
    kept = {name: value for name, value in function.items() if value is not None}
    if not isinstance(kept.get("name"), str):
        refuse(f"{field}.name", "is missing or not a string: give the function's name")
    tool = Tool(kept)
    check_tool(tool, field)
    return tool


def _choice_name(choice: str | Mapping[str, Any] | None, field: str) -> str:
    """The tool that must be called; empty if the choice does not name one."""
    if choice is None or isinstance(choice, str):
        known = ("none", "auto", *(["required"] if field == "tool_choice" else []))
        if choice is not None and choice not in known:
            refuse(field, f"is {choice[:40]!r}: give one of {', '.join(known)}, or a function")
        return ""
    named: object = choice
    if field == "tool_choice":
        if choice.get("type") != "function":
            refuse(f"{field}.type", "must be 'function': only such tools are served")
        named = choice.get("function")
    name = named.get("name") if isinstance(named, Mapping) else None
    if not isinstance(name, str) or not name:
        refuse(field, "names no function: give its name")
    return name


def template_messages(messages: Sequence[ToolMessage]) -> tuple[Mapping[str, Any], ...]:
    """The messages as a chat template gets them.

    Raises:
        InvalidField: a message has neither content nor calls, or a call is not in OpenAI's
            form.
    """
    history, made = History(), []
    for at, message in enumerate(messages):
        field = f"messages[{at}]"
        calls: list[PastCall] = []
        check_calls(len(message.tool_calls), field)
        if message.tool_calls:
            calls = [_call(each, f"{field}.tool_calls") for each in message.tool_calls]
        elif message.function_call:
            function = message.function_call
            calls = [_call({"function": function}, f"{field}.function_call")]
        if message.content is None and not calls:
            refuse(f"{field}.content", "is missing: send it")
        role = _ROLES.get(message.role, message.role)
        made.append(
            history.message(
                role,
                message.content or "",
                calls,
                call_id=message.tool_call_id,
                name=message.name if role == "tool" else "",
                reasoning=message.reasoning or message.reasoning_content,
                field=field,
            )
        )
    return tuple(made)


def _call(given: Mapping[str, Any], field: str) -> PastCall:
    function = given.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        refuse(field, "has no function with a name: send calls as they were received")
    arguments = function.get("arguments")
    if isinstance(arguments, dict):  # some clients send what templates expect
        arguments = json.dumps(arguments)
    if not isinstance(arguments, str | None):
        refuse(field, "has arguments that are not a string: send calls as they were received")
    call_id = given.get("id")
    return PastCall(call_id if isinstance(call_id, str) else "", name, arguments or "")
