"""Calls of tools in chat completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from veneer_server.text.replies.deltas import Delta, ToolArguments, ToolCallBegun, joined

__all__ = ["CallDeltas", "Calls"]

Json = dict[str, Any]


@dataclass(slots=True)
class Calls:
    """The calls of one choice so far.

    Attributes:
        legacy: in the form of the older ``functions``, which has one call.
    """

    legacy: bool = False
    _begun: list[ToolCallBegun] = field(default_factory=list)
    _arguments: list[list[str]] = field(default_factory=list)

    def add(self, parts: Iterable[Delta]) -> None:
        """Keep what belongs to calls."""
        for part in parts:
            if isinstance(part, ToolCallBegun):
                self._begun.append(part)
                self._arguments.append([])
            elif isinstance(part, ToolArguments):
                self._arguments[part.index].append(part.text)

    def __bool__(self) -> bool:
        return bool(self._begun)

    def whole(self) -> Json:
        """The message's members for them; none without calls."""
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
class CallDeltas:
    """Makes chunks' deltas: the name first, then pieces of the arguments."""

    legacy: bool = False

    def of(self, parts: Iterable[Delta]) -> Iterator[Json]:
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
