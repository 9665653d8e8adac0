"""Which format of calls a chat template has, and the parser for it."""

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
# One call, written as a JSON object: ``{"name": ..., "arguments": {...}}``, as it arrives.

_ALPHABET: Final = string.ascii_letters + string.digits
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_STRING: Final = re.compile(r'[^"\\]*')
_STRUCTURE: Final = re.compile(r'[^"{}\[\]<]*')
_SCALAR: Final = re.compile(r"[^,}\s<]*")
_CLOSES: Final = {"{": "}", "[": "]"}


def new_id() -> str:
    """An id for a call: nine letters and digits, which is the form that Mistral's templates
    insist on."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class State(Enum):
    """How far a call is."""

    OPEN = "open"
    WHOLE = "whole"
    BROKEN = "broken"
    """It is not JSON, or not a call."""


class _At(Enum):
    """What comes next in the object."""

    BRACE = "brace"
    KEY = "key"
    COLON = "colon"
    VALUE = "value"
    COMMA = "comma"


class _Value:
    """A JSON value's text, up to its end. Nested values are only checked for their brackets.

    Each of its methods takes a text and a position, and returns the position that it reached.
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
        else:  # a tag, or a bracket that closes another kind
            self.ended = State.BROKEN
            return at
        return at + 1

    def _check(self) -> None:
        if not self._closers:
            self.ended = State.WHOLE


class CallObject:
    """Reads one object. The call begins with its arguments' first character, once its name is
    known; from then on it cannot be taken back.

    Attributes:
        state: whether the object has ended.
        begun: whether `ToolCallBegun` was given.
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
        index: of the call within the answer.
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
        """Read on from a position. Returns the one that was reached, and what is certain."""
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
        """Whether the current value is passed on as it comes."""
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
# What the parsers of all families share: text outside calls, and what became no call.


class ParserState(Enum):
    """Where a parser is."""

    TEXT = "text"
    """Before the first call."""
    CALL = "call"
    BETWEEN = "between"
    """After a call; text here is dropped, as vLLM does."""
    PLAIN = "plain"
    """What looked like the first call is none, so all of the answer is text."""
    SILENT = "silent"
    """No further call is wanted, or one was broken."""


class CallParser(ABC):
    """Finds calls in an answer's text. A `ReplyParser`, in time linear in the text.

    A call is given out once its name and its arguments' first character are known. What
    turns out to be no call before that is text, if no call came before it.
    """

    thinking: Final = False

    def __init__(
        self, *, parallel: bool = True, keys: Collection[str] = ("arguments",)
    ) -> None:
        """Args:
        parallel: give out all calls, rather than only the first one.
        keys: names that a call's arguments may have.
        """
        self._parallel = parallel
        self._keys = keys
        self._place = ParserState.TEXT
        self._calls = 0
        self._pending = ""
        """Text that is not understood without more of it."""
        self._raw: list[str] = []
        """Text of a call that has not begun."""
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
        """Read on from a position, at which there is a character. Returns the next position;
        at the end, text that must be read again goes into `_pending`."""

    def _outside(self, text: str, at: int, tags: Sequence[str], deltas: list[ReplyPart]) -> int:
        """Pass text on up to the first of ``tags``. Returns where that begins, or the text's
        end."""
        found = [place for tag in tags if (place := text.find(tag, at)) >= 0]
        end = min(found, default=len(text) - held_back(text, at, tags))
        if self._place is ParserState.TEXT:
            _say(deltas, text[at:end])
        if not found:
            self._pending = text[end:]
            return len(text)
        return end

    def _begin_object(self, opener: str) -> None:
        """An object begins, behind the text that announced it."""
        self._place = ParserState.CALL
        self._raw = [opener]
        self._object = CallObject(self._calls, self._keys)

    def _read_object(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        """Read on in an object. `State.BROKEN` before it began ends all calls."""
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
    """How many characters at the end of ``text[at:]`` may be the beginning of a tag."""
    longest = min(max(map(len, tags)) - 1, len(text) - at)
    for size in range(longest, 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return size
    return 0


def _say(deltas: list[ReplyPart], text: str) -> None:
    if text:
        deltas.append(Content(text))


# -------------------- forced
# Calls that a constraint made the model write: see `veneer_server.serving.tool_use`.


class NamedParser:
    """The answer is the arguments of one known tool."""

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
    """The answer is a list of calls."""

    def _step(self, text: str, at: int, deltas: list[ReplyPart]) -> int:
        if self._place is not ParserState.CALL:
            self._begin_object(text[at])
            return at + 1  # behind the list's bracket
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
        # Behind the object, or behind what made it broken.
        found = text.find(HERMES_CLOSE, at)
        if found < 0:
            self._pending = text[len(text) - held_back(text, at, [HERMES_CLOSE]) :]
            return len(text)
        self._after_call()
        return found + len(HERMES_CLOSE)


# -------------------- llama3
# ``{"name": ..., "parameters": ...}``, several separated by semicolons: Llama 3.
#
# ``<|python_tag|>`` may come first. An answer whose first ``{`` begins no call is text.

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
# ``[TOOL_CALLS]``, and then the calls: Mistral.
#
# Up to version 7 of its tokenizer they are a list, ``[{"name": ..., "arguments": ...}, ...]``,
# from version 11 on each follows a tag of its own, ``[TOOL_CALLS]name{...}`` or
# ``[TOOL_CALLS]name[ARGS]{...}``.

MISTRAL_TAG: Final = "[TOOL_CALLS]"
MISTRAL_ARGS: Final = "[ARGS]"

_LONGEST_NAME: Final = 256
"""Most characters before the arguments: otherwise a long text could be held back."""


class _Part(Enum):
    """What is read behind a tag."""

    FIRST = "first"
    """Its first character, which tells the format."""
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
    """A format, by vLLM's name for its parser."""

    HERMES = "hermes"
    LLAMA3 = "llama3_json"
    MISTRAL = "mistral"


_TOOLS: Final = re.compile(r"\btools\b")
_OTHERS: Final = ("<function=", "<arg_key>", "<｜tool", "<|channel|>")
"""Signs of formats that are not served, though some of them use Hermes' tags as well."""

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
    """The format in which a chat template asks for calls; None if it is not served.

    A template that does not know tools gets them in Hermes' format; see
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
    """Texts that announce calls. Where they are special tokens, they must be shown to the
    parser, though the text of an answer has none."""
    return _MARKERS[family]


def parser_of(family: CallFormat, *, parallel: bool) -> ReplyParser:
    """A parser for one answer.

    Args:
        parallel: give out all calls, rather than only the first one.
    """
    return _PARSERS[family](parallel=parallel)
