"""Joins parsers: thinking is split off first, another parser gets the content that is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

# -------------------- deltas
# Pieces of an answer, as they arrive: both doors, gRPC and OpenAI, send these on.


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


ReplyPart = Content | Reasoning | ToolCallBegun | ToolArguments


class ReplyParser(Protocol):
    """Takes an answer's text apart. However the text is cut into pieces, the deltas joined are
    the same."""

    @property
    def thinking(self) -> bool:
        """Whether what follows the text so far is thinking, unless it is a closing tag."""
        ...

    def feed(self, text: str) -> Sequence[ReplyPart]:
        """The deltas that are certain after more text."""
        ...

    def finish(self) -> Sequence[ReplyPart]:
        """The rest, when the answer has ended."""
        ...


def joined(deltas: Iterable[ReplyPart]) -> list[ReplyPart]:
    """The same with pieces of one text as one delta, as far as they follow each other."""
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
# Splits thinking in tags off the beginning of an answer, however its text is cut.
#
# Qwen3, DeepSeek-R1 and models trained after them write ``<think>...</think>``, Mistral's
# ``[THINK]...[/THINK]``. Some chat templates open the tag in the prompt; the answer then has
# only the closing one.


@dataclass(frozen=True, slots=True)
class Tags:
    """What thinking begins and ends with."""

    open: str
    close: str


THINK: Final = Tags("<think>", "</think>")

TAGS: Final[Mapping[str, Tags]] = {"think": THINK, "mistral": Tags("[THINK]", "[/THINK]")}
"""By vLLM's name for their parser, roughly."""


class Thinking(Enum):
    """What may be thinking in an answer."""

    NONE = "none"
    """Nothing: the answer is passed on as it is."""
    TAGGED = "tagged"
    """What the answer itself opens, at its beginning."""
    OPENED = "opened"
    """The prompt has opened it: everything up to the closing tag."""


def tags_of(template: str | None) -> Tags | None:
    """The tags that a chat template names; None if it names none of them."""
    named = (tags for tags in TAGS.values() if template and tags.open in template)
    return next(named, None)


def thinking_of(prompt: str, begun: str = "", tags: Tags = THINK) -> Thinking:
    """What may be thinking in an answer to a prompt.

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
    """A `ReplyParser`: all `Reasoning` comes before the first `Content`.

    Thinking begins where the answer begins, white space before its tag is dropped; a tag
    further on is ordinary text. An answer that ends before the closing tag is all thinking.
    Otherwise not a character is changed. Each is looked at a bounded number of times.
    """

    def __init__(self, *, opened: bool, tags: Tags = THINK) -> None:
        """Args: opened: the prompt ends with the opening tag."""
        self._tags = tags
        self._where = _Where.THINKING if opened else _Where.BEFORE
        self._blank: list[str] = []
        """White space before a possible opening tag."""
        self._held = ""
        """What may become a tag."""

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
        """Look for the opening tag. Returns what is to be looked at further."""
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
        """Take the thinking out of a text. Returns what follows it."""
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
    """Length of the longest end of a text that begins a tag."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0


class Pipeline:
    """A `ReplyParser` of two: the second sees the first one's `Content` as its text."""

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
    """The parser of one answer; None if its text is passed on as it is.

    Args:
        then: takes apart what is left beside the thinking.
    """
    if thinking is Thinking.NONE:
        return then
    first = ThinkingParser(opened=thinking is Thinking.OPENED, tags=tags)
    return first if then is None else Pipeline(first, then)
