"""Finds a chat template's format of tool calls, and parses calls in that format."""

from __future__ import annotations

import json
import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import Enum, StrEnum
from typing import Final

from veneer_server.text.replies import (
    Content,
    ReplyParser,
    ReplyPart,
    ToolArguments,
    ToolCallBegun,
)

# -------------------- call object
# Parses one call, a JSON object ``{"name": ..., "arguments": {...}}``, as its text arrives.

_ALPHABET: Final = string.ascii_letters + string.digits
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_STRING: Final = re.compile(r'[^"\\]*')
_STRUCTURE: Final = re.compile(r'[^"{}\[\]<]*')
_SCALAR: Final = re.compile(r"[^,}\s<]*")
_CLOSES: Final = {"{": "}", "[": "]"}


def new_id() -> str:
    """Make an id for a call: nine letters and digits, as Mistral's templates require."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class State(Enum):
    """How much of a call or value has been read."""

    OPEN = "open"
    WHOLE = "whole"
    BROKEN = "broken"
    """The text is not JSON, or not a call."""


class _At(Enum):
    """The element that comes next in the object."""

    BRACE = "brace"
    KEY = "key"
    COLON = "colon"
    VALUE = "value"
    COMMA = "comma"


class _Value:
    """Finds the end of a JSON value. Of nested values, only the brackets are checked.

    The reading methods take a text and a position, and return the position that they reached.
    """

    __slots__ = ("_closers", "_escaped", "_in_string", "_scalar", "ended")

    def __init__(self, first: str) -> None:
        self.ended: State = State.OPEN
        self._closers: list[str] = []
        self._in_string = self._escaped = False
        self._scalar = first not in '{["'

    def feed(self, text: str, at: int) -> int:
        if self._scalar:
            at = _end(_SCALAR, text, at)
            if at < len(text):
                self.ended = State.WHOLE
            return at
        while at < len(text) and self.ended is State.OPEN:
            at = self._string(text, at) if self._in_string else self._outside(text, at)
        return at

    def _string(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        at = _end(_STRING, text, at)
        if at == len(text):
            return at
        if text[at] == "\\":
            self._escaped = True
        else:
            self._in_string = False
            self._check()
        return at + 1

    def _outside(self, text: str, at: int) -> int:
        at = _end(_STRUCTURE, text, at)
        if at == len(text):
            return at
        found = text[at]
        if found == '"':
            self._in_string = True
        elif found in _CLOSES:
            self._closers.append(_CLOSES[found])
        elif self._closers and found == self._closers[-1]:
            self._closers.pop()
            self._check()
        else:  # a tag, or a bracket that does not match the open one
            self.ended = State.BROKEN
            return at
        return at + 1

    def _check(self) -> None:
        if not self._closers:
            self.ended = State.WHOLE


class CallObject:
    """Reads the object of one call. The call begins at the first character of its arguments,
    once its name is known; from then on it cannot be taken back.

    Attributes:
        state: whether the object has ended.
        begun: whether `ToolCallBegun` was returned.
    """

    __slots__ = (
        "_at",
        "_buffered",
        "_index",
        "_key",
        "_keys",
        "_name",
        "_raw",
        "_value",
        "begun",
        "state",
    )

    def __init__(self, index: int, keys: Collection[str] = ("arguments",)) -> None:
        """Args:
        index: index of the call within the answer.
        keys: names that the arguments may have in the object.
        """
        self.state = State.OPEN
        self.begun = False
        self._index = index
        self._keys = keys
        self._at = _At.BRACE
        self._key = ""
        self._name = ""
        self._value: _Value | None = None
        self._raw: list[str] = []
        self._buffered: str | None = None
        """Arguments that came before the name."""

    def feed(self, text: str, at: int) -> tuple[int, list[ReplyPart]]:
        """Continue reading at a position. Returns the position that was reached, and the parts
        that are certain by then."""
        deltas: list[ReplyPart] = []
        while at < len(text) and self.state is State.OPEN:
            if self._value is not None:
                at = self._read_value(self._value, text, at, deltas)
                continue
            at = _end(_SPACE, text, at)
            if at < len(text):
                at = self._read_sign(text, at, deltas)
        return at, deltas

    def _read_sign(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        sign = text[at]
        match self._at, sign:
            case (_At.BRACE, "{"):
                self._at = _At.KEY
            case (_At.KEY, '"'):
                self._value = _Value(sign)
                return at
            case (_At.COLON, ":"):
                self._at = _At.VALUE
            case (_At.VALUE, _) if sign in '{["-tfn' or sign.isdigit():
                self._value = _Value(sign)
                if self._key in self._keys and self._name and not self.begun:
                    deltas += self._begin()
                return at
            case (_At.COMMA, ","):
                self._at = _At.KEY
            case (_At.COMMA, "}"):
                self._end(deltas)
            case _:
                self.state = State.BROKEN
                return at
        return at + 1

    def _read_value(self, value: _Value, text: str, at: int, deltas: list[ReplyPart]) -> int:
        end = value.feed(text, at)
        piece = text[at:end]
        if self._streams:
            if piece:
                deltas.append(ToolArguments(self._index, piece))
        else:
            self._raw.append(piece)
        if value.ended is State.BROKEN:
            self.state = State.BROKEN
        elif value.ended is State.WHOLE:
            self._value_ended()
        return end

    @property
    def _streams(self) -> bool:
        """Whether the current value is passed on as it arrives."""
        return self.begun and self._at is _At.VALUE and self._key in self._keys

    def _value_ended(self) -> None:
        streamed = self._streams
        raw, self._raw, self._value = "".join(self._raw), [], None
        if self._at is _At.KEY:
            self._key, self._at = _text_of(raw), _At.COLON
            return
        self._at = _At.COMMA
        if streamed:
            self._keys = ()  # a second value of the same name is not part of the call
        elif self._key == "name" and not self.begun:
            self._name = _text_of(raw)
            if not self._name:
                self.state = State.BROKEN
        elif self._key in self._keys and _is_json(raw):
            self._buffered = raw

    def _begin(self) -> Iterator[ReplyPart]:
        self.begun = True
        yield ToolCallBegun(self._index, new_id(), self._name)

    def _end(self, deltas: list[ReplyPart]) -> None:
        if not self.begun and self._name and self._buffered is not None:
            deltas += self._begin()
            deltas.append(ToolArguments(self._index, self._buffered))
        self.state = State.WHOLE if self.begun else State.BROKEN


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None, "the patterns match the empty string"
    return match.end()


def _text_of(raw: str) -> str:
    """The value of a JSON string; empty for anything else."""
    try:
        value: object = json.loads(raw)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def _is_json(raw: str) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


# -------------------- parsing
# Base class of all parsers: handles text outside calls, and text that turns out to be no call.


class ParserState(Enum):
    """The state of a parser."""

    TEXT = "text"
    """Before the first call."""
    CALL = "call"
    BETWEEN = "between"
    """After a call; text here is dropped, as in vLLM."""
    PLAIN = "plain"
    """The apparent first call was not a call, so the whole answer is text."""
    SILENT = "silent"
    """No further call is wanted, or one was broken."""


class CallParser(ABC):
    """Finds calls in an answer's text. A `ReplyParser`; takes time linear in the text.

    A call is reported once its name and the first character of its arguments are known. If the
    text turns out before that not to be a call, it is passed on as text, unless a call came
    before it.
    """

    thinking: Final = False

    def __init__(
        self, *, parallel: bool = True, keys: Collection[str] = ("arguments",)
    ) -> None:
        """Args:
        parallel: report all calls, not only the first one.
        keys: names that a call's arguments may have.
        """
        self._parallel = parallel
        self._keys = keys
        self._place = ParserState.TEXT
        self._calls = 0
        self._pending = ""
        """Text that cannot be interpreted before more of it arrives."""
        self._raw: list[str] = []
        """Text of a possible call that has not begun."""
        self._object = CallObject(0, keys)

    def feed(self, text: str) -> Sequence[ReplyPart]:
        """See `ReplyParser.feed`."""
        text, self._pending = self._pending + text, ""
        deltas: list[ReplyPart] = []
        at = 0
        while at < len(text):
            if self._place is ParserState.SILENT:
                break
            if self._place is ParserState.PLAIN:
                _say(deltas, text[at:])
                break
            at = self._step(text, at, deltas)
        return deltas

    def finish(self) -> Sequence[ReplyPart]:
        """See `ReplyParser.finish`."""
        deltas: list[ReplyPart] = []
        if self._place in (ParserState.TEXT, ParserState.PLAIN) or (
            self._raw and not self._calls
        ):
            _say(deltas, "".join(self._raw) + self._pending)
        self._raw, self._pending = [], ""
        return deltas

    @abstractmethod
    def _step(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        """Continue reading at a position before the text's end. Returns the next position. At
        the end of the text, the part that must be read again goes into `_pending`."""

    def _outside(self, text: str, at: int, tags: Sequence[str], deltas: list[ReplyPart]) -> int:
        """Pass on text up to the first of ``tags``. Returns the position of that tag, or the
        end of the text."""
        found = [place for tag in tags if (place := text.find(tag, at)) >= 0]
        end = min(found, default=len(text) - held_back(text, at, tags))
        if self._place is ParserState.TEXT:
            _say(deltas, text[at:end])
        if not found:
            self._pending = text[end:]
            return len(text)
        return end

    def _begin_object(self, opener: str) -> None:
        """Begin to read an object, after its ``opener``, the text that announces it."""
        self._place = ParserState.CALL
        self._raw = [opener]
        self._object = CallObject(self._calls, self._keys)

    def _read_object(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        """Continue reading the object. If it is broken before its call began, no more calls are
        read."""
        begun = self._object.begun
        end, more = self._object.feed(text, at)
        deltas += more
        if self._object.begun:
            self._raw = []
            self._calls += not begun
        else:
            self._raw.append(text[at:end])
            if self._object.state is State.BROKEN:
                self._no_call(deltas)
        return end

    def _no_call(self, deltas: list[ReplyPart]) -> None:
        raw, self._raw = "".join(self._raw), []
        if self._calls:
            self._place = ParserState.SILENT
        else:
            self._place = ParserState.PLAIN
            _say(deltas, raw)

    def _after_call(self) -> None:
        self._place = ParserState.BETWEEN if self._parallel else ParserState.SILENT


def held_back(text: str, at: int, tags: Sequence[str]) -> int:
    """Return how many characters at the end of ``text[at:]`` may be the beginning of a tag."""
    longest = min(max(map(len, tags)) - 1, len(text) - at)
    for size in range(longest, 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return size
    return 0


def _say(deltas: list[ReplyPart], text: str) -> None:
    if text:
        deltas.append(Content(text))


# -------------------- forced
# Calls that a constraint forces the model to write: see `veneer_server.serving.tool_use`.


class NamedParser:
    """Parser of an answer that consists of the arguments of one known tool."""

    thinking: Final = False

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def feed(self, text: str) -> Sequence[ReplyPart]:
        """See `ReplyParser.feed`."""
        return [*self._begin(), ToolArguments(0, text)] if text else ()

    def finish(self) -> Sequence[ReplyPart]:
        """See `ReplyParser.finish`."""
        return self._begin()

    def _begin(self) -> list[ReplyPart]:
        if self._begun:
            return []
        self._begun = True
        return [ToolCallBegun(0, new_id(), self._name)]


class RequiredParser(CallParser):
    """Parser of an answer that is a list of calls."""

    def _step(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        if self._place is not ParserState.CALL:
            self._begin_object(text[at])
            return at + 1  # after the list's bracket
        if self._object.state is State.OPEN:
            return self._read_object(text, at, deltas)
        if self._object.state is State.BROKEN:
            self._place = ParserState.SILENT
        elif text[at] == ",":
            self._begin_object("")
        return at + 1


# -------------------- hermes
# ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``: Hermes, Qwen and many others.

HERMES_OPEN: Final = "<tool_call>"
HERMES_CLOSE: Final = "</tool_call>"


class HermesParser(CallParser):
    """Parser of the Hermes family."""

    def _step(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        if self._place is not ParserState.CALL:
            at = self._outside(text, at, [HERMES_OPEN], deltas)
            if at < len(text):
                self._begin_object(HERMES_OPEN)
                at += len(HERMES_OPEN)
            return at
        if self._object.state is State.OPEN:
            return self._read_object(text, at, deltas)
        # After the object, or after the text that broke it.
        found = text.find(HERMES_CLOSE, at)
        if found < 0:
            self._pending = text[len(text) - held_back(text, at, [HERMES_CLOSE]) :]
            return len(text)
        self._after_call()
        return found + len(HERMES_CLOSE)


# -------------------- llama3
# ``{"name": ..., "parameters": ...}``, several separated by semicolons: Llama 3.
#
# ``<|python_tag|>`` may come first. If the first ``{`` does not begin a call, the whole answer
# is text.

LLAMA3_TAG: Final = "<|python_tag|>"


class Llama3Parser(CallParser):
    """Parser of the Llama 3 family."""

    def __init__(self, *, parallel: bool = True) -> None:
        super().__init__(parallel=parallel, keys=("arguments", "parameters"))

    def _step(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        if self._place is not ParserState.CALL:
            at = self._outside(text, at, [LLAMA3_TAG, "{"], deltas)
            if at < len(text):
                tag = LLAMA3_TAG if text[at] == "<" else ""
                self._begin_object(tag)
                at += len(tag)
            return at
        if self._object.state is State.OPEN:
            at = self._read_object(text, at, deltas)
        if self._object.state is State.WHOLE:
            self._after_call()
        elif self._object.state is State.BROKEN and self._place is ParserState.CALL:
            self._place = ParserState.SILENT
        return at


# -------------------- mistral
# ``[TOOL_CALLS]``, followed by the calls: Mistral.
#
# Up to version 7 of its tokenizer, the calls are a list, ``[{"name": ..., "arguments": ...},
# ...]``. From version 11 on, each call has a tag of its own, ``[TOOL_CALLS]name{...}`` or
# ``[TOOL_CALLS]name[ARGS]{...}``.

MISTRAL_TAG: Final = "[TOOL_CALLS]"
MISTRAL_ARGS: Final = "[ARGS]"

_LONGEST_NAME: Final = 256
"""Most characters before the arguments; without a limit, a long text could be held back."""


class _Part(Enum):
    """The element that is read after a tag."""

    FIRST = "first"
    """The first character, which tells the format."""
    LIST = "list"
    NAME = "name"
    ARGUMENTS = "arguments"


class MistralParser(CallParser):
    """Parser of the Mistral family."""

    def __init__(self, *, parallel: bool = True) -> None:
        super().__init__(parallel=parallel)
        self._part = _Part.FIRST

    def _step(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        if self._place is not ParserState.CALL:
            at = self._outside(text, at, [MISTRAL_TAG], deltas)
            if at < len(text):
                self._begin_object(MISTRAL_TAG)
                self._part = _Part.FIRST
                at += len(MISTRAL_TAG)
            return at
        match self._part:
            case _Part.FIRST:
                return self._first(text, at)
            case _Part.LIST:
                return self._list(text, at, deltas)
            case _Part.NAME:
                return self._name(text, at, deltas)
            case _Part.ARGUMENTS:
                return self._arguments(text, at, deltas)

    def _first(self, text: str, at: int) -> int:
        sign = text[at]
        if not sign.isspace():
            self._part = _Part.LIST if sign in "[{" else _Part.NAME
            if sign != "[":
                return at
        self._raw.append(sign)
        return at + 1

    def _list(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        if self._object.state is State.OPEN:
            at = self._read_object(text, at, deltas)
        if self._object.state is State.BROKEN and self._place is ParserState.CALL:
            self._place = ParserState.SILENT
        if self._object.state is not State.WHOLE or at == len(text):
            return at
        if text[at] == ",":
            if self._parallel:
                self._begin_object("")
            else:
                self._place = ParserState.SILENT
        elif not text[at].isspace():  # the list has ended
            self._place = ParserState.SILENT
        return at + 1

    def _name(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        end = text.find("{", at)
        self._raw.append(text[at : len(text) if end < 0 else end])
        fits = sum(map(len, self._raw)) <= _LONGEST_NAME
        if end < 0 and fits:
            return len(text)
        name = "".join(self._raw).removeprefix(MISTRAL_TAG).partition("[")[0].strip()
        if not fits or not name:
            self._no_call(deltas)
            return len(text) if end < 0 else end
        self._raw = []
        self._part = _Part.ARGUMENTS
        deltas.append(ToolCallBegun(self._calls, new_id(), name))
        self._calls += 1
        return end

    def _arguments(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        found = text.find(MISTRAL_TAG, at)
        end = len(text) - held_back(text, at, [MISTRAL_TAG]) if found < 0 else found
        if end > at:
            deltas.append(ToolArguments(self._calls - 1, text[at:end]))
        if found >= 0:
            self._after_call()
            return found
        self._pending = text[end:]
        return len(text)

    def finish(self) -> list[ReplyPart]:
        """See `ReplyParser.finish`."""
        deltas: list[ReplyPart] = []
        if self._place is ParserState.CALL and self._part is _Part.ARGUMENTS and self._pending:
            deltas.append(ToolArguments(self._calls - 1, self._pending))
        return [*deltas, *super().finish()]


class CallFormat(StrEnum):
    """A format of tool calls, with vLLM's name for its parser."""

    HERMES = "hermes"
    LLAMA3 = "llama3_json"
    MISTRAL = "mistral"


_TOOLS: Final = re.compile(r"\btools\b")
_OTHERS: Final = ("<function=", "<arg_key>", "<｜tool", "<|channel|>")
"""Text in templates with unsupported formats; some of these use Hermes' tags as well."""

_MARKERS: Final[Mapping[CallFormat, tuple[str, ...]]] = {
    CallFormat.HERMES: (HERMES_OPEN, HERMES_CLOSE),
    CallFormat.LLAMA3: (LLAMA3_TAG,),
    CallFormat.MISTRAL: (MISTRAL_TAG, MISTRAL_ARGS),
}

_PARSERS: Final[Mapping[CallFormat, Callable[..., ReplyParser]]] = {
    CallFormat.HERMES: HermesParser,
    CallFormat.LLAMA3: Llama3Parser,
    CallFormat.MISTRAL: MistralParser,
}


def knows_tools(template: str | None) -> bool:
    """Whether a chat template shows tools to the model."""
    return template is not None and _TOOLS.search(template) is not None


def family_of(template: str | None) -> CallFormat | None:
    """Return the format in which a chat template asks for calls; None if it is not supported.

    For a template that does not show tools, they are added to the chat in Hermes' format; see
    `veneer_server.text.template`.
    """
    if template is None or not knows_tools(template):
        return CallFormat.HERMES
    if any(sign in template for sign in _OTHERS):
        return None
    if MISTRAL_TAG in template:
        return CallFormat.MISTRAL
    if HERMES_OPEN in template:
        return CallFormat.HERMES
    if LLAMA3_TAG in template or "<|start_header_id|>" in template:
        return CallFormat.LLAMA3
    return None


def markers(family: CallFormat) -> tuple[str, ...]:
    """Return the texts that mark calls. If these are special tokens, they must be shown to the
    parser, although an answer's text normally has no special tokens."""
    return _MARKERS[family]


def parser_of(family: CallFormat, *, parallel: bool) -> ReplyParser:
    """Make a parser for one answer.

    Args:
        parallel: report all calls, not only the first one.
    """
    return _PARSERS[family](parallel=parallel)
