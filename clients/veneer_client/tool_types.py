"""Tools that a model may call, and its calls: frozen records, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["Tool", "ToolCall", "ToolCallDelta", "ToolMode"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; you run it, and send its result.

    Attributes:
        parameters: the JSON schema of an object; None if it has no arguments.
        strict: constrain the arguments to the schema even if the model need not call, provided
            that the chat template asks for calls in Hermes' format.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, object] | None = None
    strict: bool = False


class ToolMode(Enum):
    """Whether the model calls a tool."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model has made.

    Attributes:
        id: the call's id, which the message with its result repeats as ``tool_call_id``.
        arguments: JSON text as the model wrote it, which need not be valid unless the call
            was forced.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call in a stream: the first one has id and name, the others arguments.

    Attributes:
        index: number of the call within its answer, from 0.
    """

    index: int
    id: str
    name: str
    arguments: str
