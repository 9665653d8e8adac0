"""How a request may use its tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import msgspec
from veneer_registry.errors import InvalidField, VeneerError

from veneer_server.serving.checks import check_json_size, invalid, refuse
from veneer_server.serving.tools.schema import arguments_schema, calls_schema
from veneer_server.text.replies.deltas import ReplyParser
from veneer_server.text.replies.tools.families import Family, parser_of
from veneer_server.text.replies.tools.forced import NamedParser, RequiredParser
from veneer_server.wire.messages import Constraint

__all__ = ["Choice", "Tool", "ToolUse", "about_tools", "check_tool", "check_tools"]

MAX_TOOLS: Final = 128
MAX_TOOL_BYTES: Final = 128 << 10
MAX_TOOL_NAME: Final = 256


class Choice(Enum):
    """Whether the model calls a tool. A request that may call none has no `ToolUse`."""

    AUTO = "auto"
    """As it sees fit."""
    REQUIRED = "required"
    """At least one."""
    NAMED = "named"
    """One, which the request names."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool, as chat templates get it.

    Attributes:
        function: has a ``name``; perhaps ``description``, ``parameters`` (a JSON schema) and
            whatever else the caller says.
    """

    function: Mapping[str, Any]

    @property
    def name(self) -> str:
        name: str = self.function["name"]
        return name

    @property
    def parameters(self) -> Mapping[str, Any] | None:
        return self.function.get("parameters")

    @property
    def strict(self) -> bool:
        """Whether the arguments must fit the schema of `parameters`, forced or not."""
        return self.function.get("strict") is True

    def for_template(self) -> dict[str, Any]:
        """In OpenAI's form, which templates expect."""
        return {"type": "function", "function": self.function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request.

    Attributes:
        named: the tool that must be called, if ``choice`` says so.
        parallel: whether an answer may hold several calls.
    """

    tools: tuple[Tool, ...]
    choice: Choice = Choice.AUTO
    named: str = ""
    parallel: bool = True

    def __post_init__(self) -> None:
        check_tools(self.tools)
        if self.choice is Choice.NAMED and self._named_tool is None:
            refuse("tool_choice", f"names {self.named[:60]!r}, which is not one of the tools")

    @property
    def forced(self) -> bool:
        """Whether a call is certain, and does not depend on the template's format."""
        return self.choice is not Choice.AUTO

    @property
    def ends_with_calls(self) -> bool:
        """Whether an answer that ends by itself after a call reports calls as the reason.
        After the one call that was asked for by name the reason is a stop, as with OpenAI and
        vLLM."""
        return self.choice is not Choice.NAMED

    def constraint(self) -> Constraint | None:
        """What makes the model call; None if it is free not to."""
        match self.choice:
            case Choice.AUTO:
                return None
            case Choice.REQUIRED:
                tools = [(tool.name, tool.parameters) for tool in self.tools]
                return Constraint("json_schema", calls_schema(tools, parallel=self.parallel))
            case Choice.NAMED:
                tool = self._named_tool
                assert tool is not None, "checked at the beginning"
                return Constraint("json_schema", json.dumps(arguments_schema(tool.parameters)))

    def parser(self, family: Family | None) -> ReplyParser:
        """A parser for one answer.

        Args:
            family: the format of the chat template.

        Raises:
            InvalidField: the model may call, but nobody could read its calls.
        """
        match self.choice:
            case Choice.REQUIRED:
                return RequiredParser()
            case Choice.NAMED:
                return NamedParser(self.named)
            case Choice.AUTO if family is not None:
                return parser_of(family, parallel=self.parallel)
        raise invalid(
            "tool_choice",
            "is auto, but the server does not recognize the tool-call format of this chat "
            "template: set it to 'required', or start the server with --tool-parser",
        )

    @property
    def _named_tool(self) -> Tool | None:
        return next((tool for tool in self.tools if tool.name == self.named), None)


def about_tools(error: VeneerError) -> VeneerError:
    """An error about a constraint that tools made, in the words of its request."""
    field = error.metadata.get("field", "")
    if not isinstance(error, InvalidField) or not field.startswith("constraint"):
        return error
    message = error.message.replace(field, "the combined schema of the tools")
    return InvalidField(message, metadata={**error.metadata, "field": "tools"})


def check_tool(tool: Tool, field: str) -> None:
    """Raises InvalidField for a name or parameters that cannot be used.

    Args:
        field: the function's name in errors.
    """
    if not 1 <= len(tool.name) <= MAX_TOOL_NAME:
        refuse(f"{field}.name", f"has {len(tool.name)} characters: give 1 to {MAX_TOOL_NAME}")
    if not isinstance(tool.parameters, dict | None):
        refuse(f"{field}.parameters", "is not an object: give a JSON schema")


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises InvalidField for no tools, too many, or too long ones."""
    if not tools:
        refuse("tools", "is empty: send at least one, or leave it out")
    if len(tools) > MAX_TOOLS:
        refuse("tools", f"has {len(tools)} entries: send at most {MAX_TOOLS}")
    size = 0
    for tool in tools:
        check_json_size("tools", tool.function, MAX_TOOL_BYTES)
        size += len(msgspec.json.encode(tool.function))
        if size > MAX_TOOL_BYTES:
            refuse("tools", f"has more than {MAX_TOOL_BYTES} bytes: shorten descriptions")
