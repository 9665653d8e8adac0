"""Parses answers into parts: splits off the reasoning, and passes the rest to another
parser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

# -------------------- deltas
# Pieces of an answer, as they arrive; both the gRPC API and the OpenAI API send them on.


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's reasoning; an empty text says that its end has been read."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegun:
    """The beginning of a tool call; its arguments follow.

    Attributes:
        index: index of the call within the answer, from 0.
        id: unique id of the call; the tool's result refers to it.
        name: name of the tool.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """More of a call's arguments, which are JSON when they are complete."""

    index: int
    text: str


ReplyPart = Content | Reasoning | ToolCallBegun | ToolArguments


class ReplyParser(Protocol):
    """Parses an answer's text into parts. The joined parts do not depend on how the text is cut
    into pieces."""

    @property
    def thinking(self) -> bool:
        """Whether the next text is reasoning, unless it is a closing tag."""
        ...

    def feed(self, text: str) -> Sequence[ReplyPart]:
        """Read more text. Returns the parts that are certain by then."""
        ...

    def finish(self) -> Sequence[ReplyPart]:
        """End the answer. Returns the remaining parts."""
        ...


def joined(deltas: Iterable[ReplyPart]) -> list[ReplyPart]:
    """Join consecutive pieces of the same text into one part."""
    made: list[ReplyPart] = []
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


# -------------------- thinking
# Splits reasoning in tags off the beginning of an answer, however its text is cut into pieces.
#
# Qwen3, DeepSeek-R1 and models trained like them write ``<think>...</think>``, Mistral's models
# write ``[THINK]...[/THINK]``. Some chat templates open the tag in the prompt; the answer then
# has only the closing tag.


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags with which reasoning begins and ends."""

    open: str
    close: str


THINK: Final = Tags("<think>", "</think>")

TAGS: Final[Mapping[str, Tags]] = {"think": THINK, "mistral": Tags("[THINK]", "[/THINK]")}
"""The tags by name; the names are roughly those of vLLM's parsers."""


class Thinking(Enum):
    """Which part of an answer may be reasoning."""

    NONE = "none"
    """No part: the answer is passed on unchanged."""
    TAGGED = "tagged"
    """Text in tags at the beginning of the answer."""
    OPENED = "opened"
    """Everything up to the closing tag: the prompt contains the opening tag."""


def tags_of(template: str | None) -> Tags | None:
    """Return the reasoning tags that a chat template names; None if it names none."""
    named = (tags for tags in TAGS.values() if template and tags.open in template)
    return next(named, None)


def thinking_of(prompt: str, begun: str = "", tags: Tags = THINK) -> Thinking:
    """Return which part of an answer to a prompt may be reasoning.

    Args:
        begun: the beginning of the answer, if the prompt ends with it.
    """
    if prompt.rstrip().endswith(tags.open) or begun.rfind(tags.open) > begun.rfind(tags.close):
        return Thinking.OPENED
    return Thinking.NONE if begun.strip() else Thinking.TAGGED


class _Where(Enum):
    BEFORE = 0
    THINKING = 1
    AFTER = 2


class ThinkingParser:
    """A `ReplyParser` that splits off the reasoning: all `Reasoning` comes before the first
    `Content`.

    Reasoning is only at the beginning of the answer; white space before its tag is dropped, and
    a later tag is ordinary text. If an answer ends before the closing tag, all of it is
    reasoning. No other character is changed, and each is examined a bounded number of times.
    """

    def __init__(self, *, opened: bool, tags: Tags = THINK) -> None:
        """Args: opened: the prompt ends with the opening tag."""
        self._tags = tags
        self._where = _Where.THINKING if opened else _Where.BEFORE
        self._blank: list[str] = []
        """White space before a possible opening tag."""
        self._held = ""
        """Text that may become a tag."""

    @property
    def thinking(self) -> bool:
        """See `ReplyParser.thinking`."""
        return self._where is _Where.THINKING

    def feed(self, text: str) -> Sequence[ReplyPart]:
        """See `ReplyParser.feed`."""
        deltas: list[ReplyPart] = []
        if self._where is _Where.BEFORE:
            text = self._begin(text)
        if self._where is _Where.THINKING:
            text = self._think(text, deltas)
        if text and self._where is _Where.AFTER:
            deltas.append(Content(text))
        return deltas

    def finish(self) -> Sequence[ReplyPart]:
        """See `ReplyParser.finish`."""
        rest, self._held = "".join(self._blank) + self._held, ""
        self._blank = []
        if not rest:
            return ()
        return (Reasoning(rest) if self._where is _Where.THINKING else Content(rest),)

    def _begin(self, text: str) -> str:
        """Look for the opening tag. Returns the text that remains to be parsed."""
        if not self._held:
            stripped = text.lstrip()
            self._blank.append(text[: len(text) - len(stripped)])
            text = stripped
        text, tag = self._held + text, self._tags.open
        if tag.startswith(text[: len(tag)]) and len(text) < len(tag):
            self._held = text
            return ""
        self._held = ""
        if text.startswith(tag):
            self._blank = []
            self._where = _Where.THINKING
            return text[len(tag) :]
        text = "".join(self._blank) + text
        self._blank = []
        self._where = _Where.AFTER
        return text

    def _think(self, text: str, deltas: list[ReplyPart]) -> str:
        """Take the reasoning out of a text. Returns the text after it."""
        text, tag = self._held + text, self._tags.close
        at = text.find(tag)
        if at >= 0:
            thought, text, self._held = text[:at], text[at + len(tag) :], ""
            self._where = _Where.AFTER
            deltas += [Reasoning(thought), Reasoning("")] if thought else [Reasoning("")]
        else:
            cut = len(text) - _overlap(text, tag)
            thought, self._held, text = text[:cut], text[cut:], ""
            if thought:
                deltas.append(Reasoning(thought))
        return text


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of a text that is the beginning of a tag."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0


class Pipeline:
    """A `ReplyParser` that chains two parsers: the second gets the `Content` of the first as
    its text."""

    def __init__(self, first: ReplyParser, second: ReplyParser) -> None:
        self._first = first
        self._second = second

    @property
    def thinking(self) -> bool:
        """See `ReplyParser.thinking`."""
        return self._first.thinking

    def feed(self, text: str) -> Sequence[ReplyPart]:
        """See `ReplyParser.feed`."""
        return self._pass_on(self._first.feed(text))

    def finish(self) -> Sequence[ReplyPart]:
        """See `ReplyParser.finish`."""
        return [*self._pass_on(self._first.finish()), *self._second.finish()]

    def _pass_on(self, deltas: Sequence[ReplyPart]) -> list[ReplyPart]:
        passed: list[ReplyPart] = []
        for delta in deltas:
            if isinstance(delta, Content):
                passed += self._second.feed(delta.text)
            else:
                passed.append(delta)
        return passed


def reply_parser(
    thinking: Thinking, then: ReplyParser | None = None, *, tags: Tags = THINK
) -> ReplyParser | None:
    """Make the parser of one answer; None if its text is passed on unchanged.

    Args:
        then: parser of the text without the reasoning.
    """
    if thinking is Thinking.NONE:
        return then
    first = ThinkingParser(opened=thinking is Thinking.OPENED, tags=tags)
    return first if then is None else Pipeline(first, then)
