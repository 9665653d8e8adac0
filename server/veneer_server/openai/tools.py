"""Tools and calls in OpenAI's forms: a request's tools, earlier calls, and an answer's calls.

Tools of other types than functions are left out, unless the request forces a call of one.

A tool is ``{"type": "function", "function": {"name": ...}}`` in chats, and
``{"type": "function", "name": ...}`` in responses; ``tool_choice`` differs likewise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from veneer_server.openai.extensions import Ignored
from veneer_server.openai.fields import ChatFields, MessageItem
from veneer_server.serving.checks import check_json_size, invalid, refuse
from veneer_server.serving.tool_history import (
    MAX_ARGUMENT_BYTES,
    History,
    PastCall,
    check_calls,
)
from veneer_server.serving.tool_use import MAX_TOOLS, CallChoice, Tool, ToolUse, check_tool
from veneer_server.text.replies import ReplyPart, ToolArguments, ToolCallBegun, joined

_FLAT_MEMBERS: Final = ("name", "description", "parameters", "strict")
"""Members of a tool in the flat form that a chat template sees: those that chats have too."""


_HOWS: Final = {
    "none": None,
    "auto": CallChoice.AUTO,
    "required": CallChoice.REQUIRED,
    "any": CallChoice.REQUIRED,
}
"""``any`` is Mistral's."""


class Form(Enum):
    """Where the members of a tool and of a choice are."""

    NESTED = "nested"
    """In a nested object named after the type."""
    FLAT = "flat"
    """Beside the type."""

    def members(self, entry: Mapping[str, Any], kind: str, field: str) -> tuple[Any, str]:
        """The members, and their path for error messages."""
        if self is Form.FLAT:
            return entry, field
        return entry.get(kind), f"{field}.{kind}"


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A parsed ``tool_choice``.

    Attributes:
        how: how tools may be called; None: not at all.
        named: the tool that must be called.
        allowed: names of the tools that may be called; None: all.
    """

    how: CallChoice | None
    named: str = ""
    allowed: Sequence[str] | None = None


def use_of(
    given: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any] | None,
    form: Form,
    ignored: Ignored | None = None,
    *,
    parallel: bool,
) -> ToolUse | None:
    """The tools that the answer may or must use; None if the request has no tools, or forbids
    their use.

    Args:
        given, choice: the request's tools and its choice.
        parallel: whether an answer may hold several calls.
        ignored: collects unsupported tools; None: they are refused.

    Raises:
        InvalidField: a tool or the choice is not in OpenAI's form, or they contradict each
            other.
    """
    ignored = ignored or Ignored()
    tools = read_tools(given, form, ignored)
    chosen = _chosen(choice, form, ignored)
    if not tools:
        if chosen.how is not None and choice not in (None, "auto"):
            needs = "tools that are functions" if given else "tools"
            raise invalid("tool_choice", f"needs {needs}: send them")
        return None
    if chosen.how is None:
        return None
    if chosen.allowed is not None:
        tools = _allowed(tools, chosen.allowed)
    return ToolUse(tuple(tools), chosen.how, chosen.named, parallel)


def read_tools(
    given: Sequence[Mapping[str, Any]], form: Form, ignored: Ignored | None = None
) -> list[Tool]:
    """The functions among the tools of a request.

    Args:
        ignored: collects the other tools.

    Raises:
        InvalidField: a tool is malformed, or of another type and may not be left out.
    """
    if len(given) > MAX_TOOLS:
        refuse("tools", f"has {len(given)} entries: send at most {MAX_TOOLS}")
    ignored, tools = ignored or Ignored(), []
    for at, entry in enumerate(given):
        where = f"tools[{at}]"
        if not isinstance(entry, dict):
            refuse(where, "is not an object: give a function")
        if not _left_out(entry, f"{where}.type", ignored):
            tools.append(_tool(entry, where, form))
    return tools


def read_function(function: object, field: str) -> Tool:
    """Read a function in the form of chats. Raises InvalidField."""
    if not isinstance(function, dict):
        refuse(field, "is not an object: give the function's name and parameters")
    kept = {name: value for name, value in function.items() if value is not None}
    if not isinstance(kept.get("name"), str):
        refuse(f"{field}.name", "is missing or not a string: give the function's name")
    tool = Tool(kept)
    check_tool(tool, field)
    return tool


def named_function(named: object, field: str) -> str:
    """The name in a choice of one function. Raises InvalidField."""
    name = named.get("name") if isinstance(named, Mapping) else None
    if not isinstance(name, str) or not name:
        refuse(field, "does not name a function: give its name")
    return name


def _tool(entry: Mapping[str, Any], field: str, form: Form) -> Tool:
    function, where = form.members(entry, "function", field)
    if form is Form.FLAT:
        function = {name: function[name] for name in _FLAT_MEMBERS if name in function}
    return read_function(function, where)


def _left_out(entry: Mapping[str, Any], field: str, ignored: Ignored) -> bool:
    """Whether a tool is left out because of its type. Raises InvalidField if it may not."""
    kind = entry.get("type", "function")
    if kind == "function":
        return False
    if ignored.strict or not isinstance(kind, str):
        shown = kind[:40] if isinstance(kind, str) else None
        instead = "this server runs no tools: define a function that the caller runs"
        if kind == "custom":
            instead = "define a function with one parameter of type string"
        refuse(field, f"is {shown!r}, but only 'function' is supported: {instead}")
    ignored.tool(kind)
    return True


def _chosen(choice: str | Mapping[str, Any] | None, form: Form, ignored: Ignored) -> _Chosen:
    field = "tool_choice"
    if choice is None or isinstance(choice, str):
        name = "auto" if choice is None else choice
        if name not in _HOWS:
            refuse(field, f"is {name[:40]!r}: use none, auto or required, or name a function")
        return _Chosen(_HOWS[name])
    kind = choice.get("type", "function")
    if kind == "allowed_tools":
        return _allowed_names(choice, form, ignored)
    if kind != "function":
        refuse(
            f"{field}.type",
            "must be 'function' or 'allowed_tools': other types of tools are not supported",
        )
    named, _ = form.members(choice, "function", field)
    return _Chosen(CallChoice.NAMED, named_function(named, field))


def _allowed_names(choice: Mapping[str, Any], form: Form, ignored: Ignored) -> _Chosen:
    given, field = form.members(choice, "allowed_tools", "tool_choice")
    if not isinstance(given, Mapping):
        refuse(field, "is not an object: give a mode and tools")
    mode, tools = given.get("mode"), given.get("tools")
    if mode not in ("auto", "required"):
        refuse(f"{field}.mode", "must be 'auto' or 'required'")
    if not isinstance(tools, list) or not tools:
        refuse(f"{field}.tools", "is not a list of tools: name at least one")
    if len(tools) > MAX_TOOLS:
        refuse(f"{field}.tools", f"has {len(tools)} entries: send at most {MAX_TOOLS}")
    names = []
    for at, entry in enumerate(tools):
        where = f"{field}.tools[{at}]"
        if not isinstance(entry, Mapping):
            refuse(where, "is not an object: give a function's name")
        if _left_out(entry, f"{where}.type", ignored):
            continue
        named, where = form.members(entry, "function", where)
        names.append(named_function(named, where))
    if not names and mode == "required":
        refuse(f"{field}.tools", "names no function: name at least one")
    return _Chosen(CallChoice(mode) if names else None, allowed=tuple(names))


def _allowed(tools: Sequence[Tool], names: Sequence[str]) -> list[Tool]:
    """The tools that a request allows. The model sees no others, so it cannot call them."""
    known = {tool.name for tool in tools}
    for name in names:
        if name not in known:
            refuse("tool_choice", f"allows {name[:60]!r}, which is not one of the tools")
    return [tool for tool in tools if tool.name in set(names)]


# -------------------- requests
# Reads the tools of a chat request, and the calls in its messages.
#
# ``functions`` and ``function_call`` mean the same in an older form.

ROLES: Final = {"developer": "system", "function": "tool"}
"""OpenAI's newer and older role names. Templates do not know them; many drop such messages."""


def tools_of(fields: ChatFields, ignored: Ignored | None = None) -> ToolUse | None:
    """The tools of a chat, see `use_of`.

    Args:
        ignored: collects unsupported tools; None: they are refused.

    Raises:
        InvalidField: a tool or the choice is not in OpenAI's form, or they contradict each
            other.
    """
    if fields.functions:
        return _functions_of(fields)
    if fields.function_call not in (None, "none", "auto"):
        raise invalid("function_call", "needs functions: send them")
    return use_of(
        fields.tools,
        fields.tool_choice,
        Form.NESTED,
        ignored,
        parallel=fields.parallel_tool_calls,
    )


def _functions_of(fields: ChatFields) -> ToolUse | None:
    """The tools of a request in the older form, in which an answer holds at most one call."""
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
        return ToolUse(tuple(tools), CallChoice.AUTO, parallel=False)
    if isinstance(choice, str):
        refuse("function_call", f"is {choice[:40]!r}: give none or auto, or a function")
    named = named_function(choice, "function_call")
    if named not in {tool.name for tool in tools}:
        refuse("function_call", f"names {named[:60]!r}, which is not one of the functions")
    return ToolUse(tuple(tools), CallChoice.NAMED, named, parallel=False)


def template_messages(messages: Sequence[MessageItem]) -> tuple[Mapping[str, Any], ...]:
    """Convert messages to the form that a chat template takes.

    Raises:
        InvalidField: a message has neither content nor calls, or a call is not in OpenAI's
            form.
    """
    history, made = History(), []
    for at, message in enumerate(messages):
        field = f"messages[{at}]"
        calls: list[PastCall] = []
        called = f"{field}.tool_calls"
        check_calls(len(message.tool_calls), called)
        if message.tool_calls:
            calls = [past_call(each, called) for each in message.tool_calls]
        elif message.function_call:
            called = f"{field}.function_call"
            calls = [past_call({"function": message.function_call}, called)]
        if message.content is None and not calls:
            refuse(f"{field}.content", "is missing: send it")
        role = ROLES.get(message.role, message.role)
        made.append(
            history.message(
                role,
                message.content or "",
                calls,
                call_id=message.tool_call_id,
                name=message.name if role == "tool" else "",
                reasoning=message.reasoning or message.reasoning_content,
                field=called,
            )
        )
    return tuple(made)


def past_call(given: Mapping[str, Any], field: str) -> PastCall:
    """Read a call of an earlier answer. Raises InvalidField."""
    function = given.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        refuse(field, "has no function with a name: send calls as they were received")
    arguments = function.get("arguments")
    if isinstance(arguments, dict):  # some clients send the object that templates expect
        check_json_size(field, arguments, MAX_ARGUMENT_BYTES)
        arguments = json.dumps(arguments)
    if not isinstance(arguments, str | None):
        refuse(field, "has arguments that are not a string: send calls as they were received")
    call_id = given.get("id")
    return PastCall(call_id if isinstance(call_id, str) else "", name, arguments or "")


# -------------------- answers
# Calls of tools in chat completions, whole and in chunks.

Json = dict[str, Any]


@dataclass(slots=True)
class ToolCalls:
    """The calls of one choice so far.

    Attributes:
        legacy: whether they are in the form of the older ``functions``, which has one call.
    """

    legacy: bool = False
    _begun: list[ToolCallBegun] = field(default_factory=list)
    _arguments: list[list[str]] = field(default_factory=list)

    def add(self, parts: Iterable[ReplyPart]) -> None:
        """Keep the parts that belong to calls."""
        for part in parts:
            if isinstance(part, ToolCallBegun):
                self._begun.append(part)
                self._arguments.append([])
            elif isinstance(part, ToolArguments):
                self._arguments[part.index].append(part.text)

    def __bool__(self) -> bool:
        return bool(self._begun)

    def whole(self) -> Json:
        """The message's members for the calls; empty if there are none."""
        functions = [
            {"name": call.name, "arguments": "".join(arguments)}
            for call, arguments in zip(self._begun, self._arguments, strict=True)
        ]
        if not functions:
            return {}
        if self.legacy:
            return {"function_call": functions[0]}
        return {
            "tool_calls": [
                {"id": call.id, "type": "function", "function": function}
                for call, function in zip(self._begun, functions, strict=True)
            ]
        }


@dataclass(frozen=True, slots=True)
class ToolCallDeltas:
    """Makes chunks' deltas: the name first, then pieces of the arguments."""

    legacy: bool = False

    def of(self, parts: Iterable[ReplyPart]) -> Iterator[Json]:
        for part in joined(parts):
            if isinstance(part, ToolCallBegun):
                function = {"name": part.name, "arguments": ""}
                begun = {"index": part.index, "id": part.id, "type": "function"}
                yield self._delta(begun, function)
            elif isinstance(part, ToolArguments):
                yield self._delta({"index": part.index}, {"arguments": part.text})

    def _delta(self, call: Json, function: Json) -> Json:
        if self.legacy:
            return {"function_call": function}
        return {"tool_calls": [{**call, "function": function}]}
