"""Pieces of an answer, as they arrive: both doors, gRPC and OpenAI, send these on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = [
    "Content",
    "Delta",
    "Reasoning",
    "ReplyParser",
    "ToolArguments",
    "ToolCallBegun",
    "joined",
]


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's thinking; an empty one says that its end has been read."""

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

    @property
    def thinking(self) -> bool:
        """Whether what follows the text so far is thinking, unless it is a closing tag."""
        ...

    def feed(self, text: str) -> Sequence[Delta]:
        """The deltas that are certain after more text."""
        ...

    def finish(self) -> Sequence[Delta]:
        """The rest, when the answer has ended."""
        ...


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with pieces of one text as one delta, as far as they follow each other."""
    made: list[Delta] = []
    for delta in deltas:
        last = made[-1] if made else None
        if (isinstance(delta, Content) and isinstance(last, Content)) or (
            isinstance(delta, Reasoning) and isinstance(last, Reasoning)
        ):
            made[-1] = type(delta)(last.text + delta.text)
        elif (
            isinstance(delta, ToolArguments)
            and isinstance(last, ToolArguments)
            and delta.index == last.index
        ):
            made[-1] = ToolArguments(delta.index, last.text + delta.text)
        else:
            made.append(delta)
    return made
