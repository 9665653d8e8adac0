"""Reads tools, and which of them to call, in both of OpenAI's forms.

Chats have ``{"type": "function", "function": {"name": ...}}``, responses
``{"type": "function", "name": ...}``, and the same in ``tool_choice``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from veneer_server.serving.checks import invalid, refuse
from veneer_server.serving.tools.use import MAX_TOOLS, Choice, Tool, ToolUse, check_tool

__all__ = ["Form", "Given", "named_function", "read_function", "read_tools", "use_of"]

_FLAT_MEMBERS: Final = ("name", "description", "parameters", "strict")
"""What a chat template sees of a tool in the flat form: the members that chats have."""


class Form(Enum):
    """Where the members of a tool and of a choice are."""

    NESTED = "nested"
    """In an object that is named like the type."""
    FLAT = "flat"
    """Beside the type."""

    def members(self, entry: Mapping[str, Any], kind: str, field: str) -> tuple[Any, str]:
        """The members, and their name in errors."""
        if self is Form.FLAT:
            return entry, field
        return entry.get(kind), f"{field}.{kind}"


@dataclass(frozen=True, slots=True)
class Given:
    """What a request says about tools.

    Attributes:
        parallel: whether an answer may hold several calls.
    """

    tools: Sequence[Mapping[str, Any]]
    choice: str | Mapping[str, Any] | None
    parallel: bool


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A choice that has been read.

    Attributes:
        how: None calls nothing.
        named: the tool that must be called.
        allowed: names of the tools that may be called; None: all.
    """

    how: Choice | None
    named: str = ""
    allowed: Sequence[str] | None = None


def use_of(given: Given, form: Form) -> ToolUse | None:
    """The tools that the answer may or must use; None for a request without tools, and for one
    that wants none of them to be called.

    Raises:
        InvalidField: a tool or the choice is not in OpenAI's form, or they do not fit.
    """
    tools = read_tools(given.tools, form)
    chosen = _chosen(given.choice, form)
    if not tools:
        if given.choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "needs tools: send them")
        return None
    if chosen.how is None:
        return None
    if chosen.allowed is not None:
        tools = _allowed(tools, chosen.allowed)
    return ToolUse(tuple(tools), chosen.how, chosen.named, given.parallel)


def read_tools(given: Sequence[Mapping[str, Any]], form: Form) -> list[Tool]:
    """The tools of a request. Raises InvalidField."""
    if len(given) > MAX_TOOLS:
        refuse("tools", f"has {len(given)} entries: send at most {MAX_TOOLS}")
    return [_tool(entry, f"tools[{at}]", form) for at, entry in enumerate(given)]


def read_function(function: object, field: str) -> Tool:
    """A function as chats have it. Raises InvalidField."""
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


def _tool(entry: object, field: str, form: Form) -> Tool:
    if not isinstance(entry, dict):
        refuse(field, "is not an object: give a function")
    _check_type(entry.get("type", "function"), f"{field}.type")
    function, where = form.members(entry, "function", field)
    if form is Form.FLAT:
        function = {name: function[name] for name in _FLAT_MEMBERS if name in function}
    return read_function(function, where)


def _check_type(kind: object, field: str) -> None:
    if kind == "function":
        return
    shown = kind[:40] if isinstance(kind, str) else None
    instead = "this server runs no tools: define a function that the caller runs"
    if kind == "custom":
        instead = "define a function with one parameter of type string"
    refuse(field, f"is {shown!r}, but only 'function' is supported: {instead}")


def _chosen(choice: str | Mapping[str, Any] | None, form: Form) -> _Chosen:
    field = "tool_choice"
    if choice is None or isinstance(choice, str):
        hows = {"none": None, "auto": Choice.AUTO, "required": Choice.REQUIRED}
        name = "auto" if choice is None else choice
        if name not in hows:
            refuse(field, f"is {name[:40]!r}: use none, auto or required, or name a function")
        return _Chosen(hows[name])
    kind = choice.get("type")
    if kind == "allowed_tools":
        return _Chosen(*_allowed_names(choice, form))
    if kind != "function":
        refuse(
            f"{field}.type",
            "must be 'function' or 'allowed_tools': other types of tools are not supported",
        )
    named, _ = form.members(choice, "function", field)
    return _Chosen(Choice.NAMED, named_function(named, field))


def _allowed_names(
    choice: Mapping[str, Any], form: Form
) -> tuple[Choice, str, tuple[str, ...]]:
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
        _check_type(entry.get("type", "function"), f"{where}.type")
        named, where = form.members(entry, "function", where)
        names.append(named_function(named, where))
    return Choice(mode), "", tuple(names)


def _allowed(tools: Sequence[Tool], names: Sequence[str]) -> list[Tool]:
    """The tools that a request allows: the model sees no other, so that it calls no other."""
    known = {tool.name for tool in tools}
    for name in names:
        if name not in known:
            refuse("tool_choice", f"allows {name[:60]!r}, which is not one of the tools")
    return [tool for tool in tools if tool.name in set(names)]
