"""Pieces of an answer, as they arrive: both doors, gRPC and OpenAI, send these on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Content", "Delta", "Reasoning", "ReplyParser", "ToolArguments", "ToolCallBegun"]


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegun:
    """A call of a tool begins; its arguments follow.

    Attributes:
        index: of the call within the answer, from 0.
        id: unique to the call; the tool's result refers to it.
        name: of the tool.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """More of a call's arguments, which are JSON when they are complete."""

    index: int
    text: str


Delta = Content | Reasoning | ToolCallBegun | ToolArguments


class ReplyParser(Protocol):
    """Takes an answer's text apart. However the text is cut into pieces, the deltas joined are
    the same."""

    def feed(self, text: str) -> Sequence[Delta]:
        """The deltas that are certain after more text."""
        ...

    def finish(self) -> Sequence[Delta]:
        """The rest, when the answer has ended."""
        ...
