"""Reads the tools of a chat request, and the calls in its messages.

The older ``functions`` and ``function_call`` are the same in an older form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from veneer_server.openai.tools.definitions import (
    Form,
    Given,
    named_function,
    read_function,
    use_of,
)
from veneer_server.serving.checks import check_json_size, invalid, refuse
from veneer_server.serving.tools.history import (
    MAX_ARGUMENT_BYTES,
    History,
    PastCall,
    check_calls,
)
from veneer_server.serving.tools.use import MAX_TOOLS, Choice, ToolUse

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
    """The tools of a chat, see `use_of`.

    Raises:
        InvalidField: a tool or the choice is not in OpenAI's form, or they do not fit.
    """
    if fields.functions:
        return _functions_of(fields)
    if fields.function_call not in (None, "none", "auto"):
        raise invalid("function_call", "needs functions: send them")
    given = Given(fields.tools, fields.tool_choice, fields.parallel_tool_calls)
    return use_of(given, Form.NESTED)


def _functions_of(fields: ToolFields) -> ToolUse | None:
    """The tools of a request in the older form, whose answers hold one call."""
    if fields.tools:
        raise invalid("functions", "conflicts with tools: send one of them")
    if fields.tool_choice is not None:
        raise invalid("tool_choice", "is not for functions: send function_call")
    given, choice = fields.functions, fields.function_call
    if len(given) > MAX_TOOLS:
        refuse("functions", f"has {len(given)} entries: send at most {MAX_TOOLS}")
    tools = [read_function(one, f"functions[{at}]") for at, one in enumerate(given)]
    if choice == "none":
        return None
    if choice in (None, "auto"):
        return ToolUse(tuple(tools), Choice.AUTO, parallel=False)
    if isinstance(choice, str):
        refuse("function_call", f"is {choice[:40]!r}: give none or auto, or a function")
    named = named_function(choice, "function_call")
    return ToolUse(tuple(tools), Choice.NAMED, named, parallel=False)


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
        check_json_size(field, arguments, MAX_ARGUMENT_BYTES)
        arguments = json.dumps(arguments)
    if not isinstance(arguments, str | None):
        refuse(field, "has arguments that are not a string: send calls as they were received")
    call_id = given.get("id")
    return PastCall(call_id if isinstance(call_id, str) else "", name, arguments or "")
