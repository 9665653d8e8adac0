"""OpenAI's ``/v1/responses``, including stored responses and token counts, and
``/v1/conversations``."""

from __future__ import annotations

import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

import msgspec
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.datastructures import QueryParams
from starlette.routing import Route
from veneer_registry.errors import DiskFull, InvalidField

from veneer_server.access.caller import Caller
from veneer_server.openai.choices import (
    SCORES_AT_ONCE,
    Answer,
    Json,
    Piece,
    Tally,
    TokenScore,
    scores_of,
)
from veneer_server.openai.core import ServingCore
from veneer_server.openai.errors import HttpFailure
from veneer_server.openai.extensions import Ignored, Verbosity, is_neutral, labels
from veneer_server.openai.fields import (
    CommonFields,
    RequestFields,
    parse_fields,
    with_fractions,
)
from veneer_server.openai.generate import GenerateEndpoint, GenerateJob
from veneer_server.openai.http.asgi import (
    BodyShare,
    Framing,
    Receive,
    Reply,
    Scope,
    Send,
    caller_of,
)
from veneer_server.openai.http.body import LONG_BODY, Many, dump
from veneer_server.openai.json_endpoint import Answering, JsonEndpoint, LongAnswer, in_pieces
from veneer_server.openai.requests import (
    ANY_OBJECT,
    CHAT_SCORES,
    common,
    json_constraint,
    template_variables,
)
from veneer_server.openai.response_store import (
    MAX_HISTORY,
    MAX_LISTED,
    FinishedResponse,
    ItemPage,
    ResponseDatabase,
    StoredItem,
    StoredResponses,
    listed,
    no_such,
)
from veneer_server.openai.tokens import tokenizing
from veneer_server.openai.tools import Form, read_tools, use_of
from veneer_server.serving.answer_room import AnswerForm
from veneer_server.serving.checks import MAX_MESSAGES, invalid
from veneer_server.serving.records import ChatMessages, GenerateCall
from veneer_server.serving.tool_history import History, PastCall, check_calls
from veneer_server.serving.tool_use import check_tools
from veneer_server.text.replies import (
    Content,
    Reasoning,
    ReplyPart,
    ToolArguments,
    ToolCallBegun,
)
from veneer_server.text.replies import ReplyPart as Part
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.text.turns import Effort, TemplateOptions, longer_as_json
from veneer_server.wire.messages import Constraint

# -------------------- fields

_Label = Annotated[str, Field(max_length=64)]
"""A text that a response repeats. Limited as by OpenAI, since each event may repeat it."""

_Id = Annotated[str, Field(min_length=1, max_length=128)]

_INT32: Final = (1 << 31) - 1


class TextFormat(RequestFields):
    """The format that the answer must have."""

    refused = None

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: _Label | None = None
    description: Annotated[str, Field(max_length=1 << 12)] | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(RequestFields):
    """``text``."""

    where = "text"

    format: TextFormat | None = None
    verbosity: Verbosity | None = None


class ReasoningFields(RequestFields):
    """``reasoning``."""

    where = "reasoning"

    effort: Effort | None = None
    context: str | None = None
    mode: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ConversationField(RequestFields):
    """``conversation``."""

    id: _Id


@with_fractions
class ResponseFields(CommonFields):
    """``POST /v1/responses``. A chat's sampling options are supported here too.

    Attributes:
        input: a text, or items of a conversation; see `messages_of`.
        max_tool_calls: limit for tools that OpenAI runs; no effect.
        image: how images are compressed; no effect.
        user: keeps a user on the same target of a canary; a response repeats it.
        safety_identifier, prompt_cache_key: no effect; a response repeats them.
        chat_template_kwargs, enable_thinking, include_reasoning: as for chats.
        truncation: ``auto``: the oldest turns of a conversation that is too long are left out.
        store: whether to store the response; None: if this server stores responses.
        previous_response_id: id of a stored response; its items go before the input.
        conversation: an id, or an object with it.
        prompt: a prompt that OpenAI stores; refused.
        metadata: the caller's notes, which a response repeats; see `metadata_of`.
        include: only the value for log-probabilities has an effect.
    """

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=(1 << 32) - 1)] | None = None
    text: TextOptions = TextOptions()
    reasoning: ReasoningFields = ReasoningFields()
    include: Annotated[list[str], Field(default_factory=list, fail_fast=True, max_length=64)]
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    truncation: Literal["auto", "disabled"] = "disabled"
    background: Literal[False] = False
    max_tool_calls: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    image: dict[str, Any] | None = None
    user: _Label | None = None
    safety_identifier: _Label | None = None
    prompt_cache_key: _Label | None = None
    tools: Annotated[list[dict[str, Any]], Field(default_factory=list, fail_fast=True)]
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    enable_thinking: bool | None = None
    include_reasoning: bool = True
    store: bool | None = None
    previous_response_id: _Id | None = None
    conversation: _Id | ConversationField | None = None
    prompt: Any = None
    metadata: Any = None


# -------------------- items
# Converts a conversation's items to messages for a chat template, and to their stored form.
#
# Answers of this server can be sent back unchanged: ids and states of items are ignored. An
# assistant's turn is one message of a chat, but several items: thinking, text and calls.

_NUMBER: Final = re.compile(r"\[\d+\]")
_ROLES: Final = ("user", "assistant", "system", "developer")
_TEXTS: Final = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text, and the member that holds it."""

_IGNORED_PARTS: Final = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})
_IGNORED: Final = frozenset({"id", "status", "phase", "type"})
_CALL: Final = frozenset({"call_id", "name", "arguments", "caller", "namespace", "async"})
_OUTPUT: Final = frozenset({"call_id", "name", "output", "caller", "namespace"})


_PREFIXES: Final = {"reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
"""Prefixes of the ids of stored items, by type; other types use the prefix of messages."""


def messages_of(
    given: str | list[Any],
    instructions: str | None,
    before: Sequence[Any] = (),
    ignored: Ignored | None = None,
) -> tuple[Mapping[str, Any], ...]:
    """The messages of a conversation, instructions first.

    Args:
        before: stored items, which go before the given ones.
        ignored: collects unknown members of items; None: they are refused.

    Raises:
        InvalidField: an item is unsupported or malformed.
    """
    made = _Messages(Ignored("ignore"))  # stored items were checked when they came
    if instructions:
        made.say("system", instructions, "instructions")
    for item in before:
        made.take("input", item)
    made.ignored = ignored or Ignored()
    new = 1 if isinstance(given, str) else len(given)
    if (count := len(before) + new) > MAX_MESSAGES:
        those = " with those before" if before else ""
        raise invalid("input", f"has {count} items{those}: send at most {MAX_MESSAGES}")
    if isinstance(given, str):
        made.say("user", given, "input")
        return tuple(made.messages)
    for at, item in enumerate(given):
        made.take_given(f"input[{at}]", item)
    made.end_turn()
    if not made.messages:
        raise invalid("input", "is empty: send at least one message")
    return tuple(made.messages)


def check_items(given: list[Any], field: str, ignored: Ignored) -> None:
    """Raise InvalidField for unsupported or malformed items. Args: ignored: as in
    `messages_of`."""
    made = _Messages(ignored)
    if len(given) > MAX_MESSAGES:
        raise invalid(field, f"has {len(given)} items: send at most {MAX_MESSAGES}")
    for at, item in enumerate(given):
        made.take_given(f"{field}[{at}]", item)
    made.end_turn()


def stored_items(given: str | list[Any], name: str) -> list[StoredItem]:
    """Convert checked items to the form in which they are stored and listed. They get ids of
    our own, since a caller's may occur twice.

    Args:
        name: the unique part of the ids.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    made = []
    for at, item in enumerate(given):
        kind = item.get("type") or "message"
        own = f"{_PREFIXES.get(kind, 'msg')}_{name}_in{at}"
        shown = {"status": "completed", **item, "id": own, "type": kind}
        shown = {member: value for member, value in shown.items() if value is not None}
        if kind == "reasoning":
            shown.setdefault("summary", [])
        if kind == "message" and isinstance(item["content"], str):
            said = item["role"] == "assistant"
            part: dict[str, Any] = {"type": "output_text" if said else "input_text"}
            part |= {"text": item["content"]} | ({"annotations": []} if said else {})
            shown["content"] = [part]
        made.append(StoredItem(own, msgspec.json.encode(shown)))
    return made


class _Messages:
    """Collects messages, and the assistant's unfinished turn."""

    def __init__(self, ignored: Ignored) -> None:
        self.ignored = ignored
        self.messages: list[Mapping[str, Any]] = []
        self._history = History()
        self._reasoning: list[str] = []
        self._text: str | None = None
        self._calls: list[PastCall] = []
        self._where = ""
        """Path of the turn's first item."""

    def take_given(self, where: str, item: object) -> None:
        """Add an item from the caller, which may be of any type."""
        if not isinstance(item, dict):
            raise invalid(where, "must be an object, such as a message")
        self.take(where, item)

    def take(self, where: str, item: Mapping[str, Any]) -> None:
        """Add an item."""
        match item.get("type", "message"):
            case "message":
                self._message(where, item)
            case "reasoning":
                self._think(where, item)
            case "function_call":
                self._call(where, item)
            case "function_call_output":
                self._output(where, item)
            case kind:
                raise _unserved(where, kind)

    def say(
        self, role: str, text: str, where: str, *, call_id: str = "", name: str = ""
    ) -> None:
        """Add a message that is not the assistant's; see `History.message`."""
        self.end_turn()
        role = "system" if role == "developer" else role
        made = self._history.message(role, text, call_id=call_id, name=name, field=where)
        self.messages.append(made)

    def end_turn(self) -> None:
        """End the assistant's turn. Thinking without text or calls is left out, as templates
        leave out the thinking of earlier turns."""
        if self._text is not None or self._calls:
            made = self._history.message(
                "assistant",
                self._text or "",
                self._calls,
                reasoning="".join(self._reasoning),
                field=self._where,
            )
            self.messages.append(made)
        self._reasoning, self._text, self._calls = [], None, []

    def _message(self, where: str, item: Mapping[str, Any]) -> None:
        self._check_members(where, item, {"role", "content"})
        role = item.get("role")
        if role not in _ROLES:
            raise invalid(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
        text = self._text_of(f"{where}.content", item.get("content"))
        if role != "assistant":
            self.say(role, text, where)
            return
        if self._text is not None or self._calls:
            self.end_turn()
        self._text, self._where = text, where

    def _think(self, where: str, item: Mapping[str, Any]) -> None:
        """Add the content of a reasoning item. Templates have no use for its summary and its
        encrypted content."""
        if self._text is not None or self._calls:
            self.end_turn()
        parts = item.get("content") or []
        if not isinstance(parts, list):
            raise invalid(f"{where}.content", "must be a list of parts")
        for at, part in enumerate(parts):
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str):
                raise invalid(f"{where}.content[{at}]", "must be a reasoning_text")
            self._reasoning.append(text)

    def _call(self, where: str, item: Mapping[str, Any]) -> None:
        self._check_members(where, item, _CALL)
        if not self._calls and self._text is None:
            self._where = where
        call_id, name, arguments = (
            _string(where, item, member) for member in ("call_id", "name", "arguments")
        )
        self._calls.append(PastCall(call_id, name, arguments))
        check_calls(len(self._calls), where)

    def _output(self, where: str, item: Mapping[str, Any]) -> None:
        self._check_members(where, item, _OUTPUT)
        text = self._text_of(f"{where}.output", item.get("output"))
        name = item.get("name")
        named = name if isinstance(name, str) else ""
        self.say("tool", text, where, call_id=_string(where, item, "call_id"), name=named)

    def _text_of(self, where: str, content: object) -> str:
        """The text of a string, or of a list of text parts."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise invalid(where, "must be a string or a list of parts")
        return "".join(self._part(f"{where}[{at}]", part) for at, part in enumerate(content))

    def _part(self, where: str, part: object) -> str:
        if not isinstance(part, dict):
            raise invalid(where, "must be an object, such as an input_text")
        kind = part.get("type")
        member = _TEXTS.get(kind) if isinstance(kind, str) else None
        if member is None:
            raise invalid(where, f"is of type {_shown(kind)}: only text is supported")
        self._check_members(where, part, {member} | _IGNORED_PARTS)
        return _string(where, part, member)

    def _check_members(
        self, where: str, given: Mapping[str, Any], known: set[str] | frozenset[str]
    ) -> None:
        for name, value in given.items():
            if name in known or name in _IGNORED or is_neutral(value):
                continue
            if self.ignored.strict:
                raise invalid(f"{where}.{name[:60]}", "is not a known field: leave it out")
            self.ignored.field(f"{_NUMBER.sub('[]', where)}.{name}")


def _string(where: str, item: Mapping[str, Any], member: str) -> str:
    text = item.get(member)
    if not isinstance(text, str):
        raise invalid(f"{where}.{member}", "must be a string")
    return text


def _unserved(where: str, kind: object) -> InvalidField:
    """The error for an unsupported item."""
    if kind == "item_reference":
        why = "has no id, or is a reference where none is supported: send the item itself"
    else:
        why = f"is of type {_shown(kind)}: send messages and function calls"
    return invalid(where, why)


def _shown(kind: object) -> str:
    return repr(kind[:40]) if isinstance(kind, str) else "unknown"


# -------------------- call

_LOGPROBS: Final = "message.output_text.logprobs"


def response_call(
    fields: ResponseFields,
    base: str,
    before: Sequence[Any] = (),
    ignored: Ignored | None = None,
) -> GenerateCall:
    """The call for a request.

    Args:
        before: stored items that go before the input.
        ignored: collects tools and members of items that have no effect; None: they are
            refused.

    Raises:
        InvalidField: a field is not supported, is outside its range or contradicts another.
    """
    check_served(fields)
    ignored = ignored or Ignored()
    messages = messages_of(fields.input, fields.instructions, before, ignored)
    use = use_of(
        fields.tools,
        fields.tool_choice,
        Form.FLAT,
        ignored,
        parallel=fields.parallel_tool_calls,
    )
    options = TemplateOptions.of(
        template_variables(
            fields.chat_template_kwargs,
            fields.enable_thinking,
            fields.text.verbosity,
            "text.verbosity",
        ),
        fields.reasoning.effort,
        None,
        False,
    )
    # A stream repeats scores in five events: one when the tokens come, and four at the end.
    scores = replace(
        CHAT_SCORES,
        copies=5 if fields.stream else 1,
        numbered=fields.return_tokens_as_token_ids,
    )
    return GenerateCall(
        input=ChatMessages(
            messages,
            options,
            () if use is None else use.tools,
            drop_oldest=fields.truncation == "auto",
        ),
        form=AnswerForm(scores),
        max_tokens=fields.max_output_tokens,
        open_ended=True,
        logprobs=_LOGPROBS in fields.include or fields.top_logprobs > 0,
        top_logprobs=fields.top_logprobs,
        **common(fields, base, use, _answer_constraint(fields)),
    )


def check_served(fields: ResponseFields) -> None:
    """Raise InvalidField for fields and values that are not supported."""
    if fields.prompt is not None:
        raise invalid("prompt", "is not supported: send its text as instructions or input")
    if fields.conversation is not None and fields.previous_response_id is not None:
        raise invalid("conversation", "conflicts with previous_response_id: send one of them")
    if fields.n != 1:
        raise invalid("n", "must be 1: a response has exactly one answer")
    for name in ("max_tokens", "response_format"):
        if name in fields.model_fields_set:
            other = "max_output_tokens" if name == "max_tokens" else "text.format"
            raise invalid(name, f"belongs to other endpoints: use {other}")
    if fields.return_token_ids or fields.prompt_logprobs is not None:
        name = "return_token_ids" if fields.return_token_ids else "prompt_logprobs"
        raise invalid(name, "belongs to other endpoints: use /v1/chat/completions")
    wanted = fields.text.format
    if wanted is not None and wanted.type == "json_schema" and wanted.schema_ is None:
        raise invalid("text.format.schema", "is missing: send it")


def _answer_constraint(fields: ResponseFields) -> dict[str, Constraint]:
    """The constraint on the answer, by the field that asks for it."""
    wanted = fields.text.format
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"text.format": ANY_OBJECT}
    assert wanted.schema_ is not None, "checked"
    return json_constraint(wanted.schema_, "text.format.schema")


def shown_tools(fields: ResponseFields, ignored: Ignored | None = None) -> dict[str, Any]:
    """A response's members about its request's tools. They show what was read of the tools, and
    are limited in size, since several events repeat them.

    Args:
        ignored: as in `response_call`.

    Raises:
        InvalidField: the tools are too long.
    """
    tools, choice = read_tools(fields.tools, Form.FLAT, ignored), fields.tool_choice
    if tools:
        check_tools(tools)
    shown = [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.function.get("description"),
            "parameters": tool.parameters,
            "strict": tool.strict,
        }
        for tool in tools
    ]
    if isinstance(choice, dict):
        named = choice.get("tools", ())
        choice = {name: choice[name] for name in ("type", "name", "mode") if name in choice}
        choice.setdefault("type", "function")
        if choice["type"] == "allowed_tools":
            choice["tools"] = [
                {"type": "function", "name": one["name"]}
                for one in named
                if one.get("type", "function") == "function"
            ]
    return {
        "tools": shown,
        "tool_choice": "required" if choice == "any" else choice,
        "parallel_tool_calls": fields.parallel_tool_calls,
    }


# -------------------- output
# Builds the items of a response's output; each change is an event.
#
# Thinking, text and each call are separate items. They follow each other, so only one is open
# at a time. A response that is not streamed is built by the same code as a stream's events.

Event = tuple[str, Json]
"""An event: its type without ``response.``, and its members."""

_Shown = Callable[..., Many]
"""Makes JSON of tokens' log-probabilities; see `Output`."""

_OPEN: Final = "in_progress"


class _Item(ABC):
    """One item of the output.

    Attributes:
        status: ``in_progress``, ``completed`` or ``incomplete``.
    """

    prefix: ClassVar[str]

    def __init__(self, request_id: str, index: int) -> None:
        """Args: index: its place in the output."""
        self.status = _OPEN
        self._id = f"{self.prefix}_{request_id}_{index}"
        self._index = index
        self._texts: list[str] = []

    @property
    @abstractmethod
    def told(self) -> Json:
        """The item as it is now."""

    @abstractmethod
    def begin(self) -> Iterator[Event]:
        """Yield the events that add the item."""

    @abstractmethod
    def _done(self) -> Iterator[Event]:
        """Yield the events with the complete text."""

    def end(self, status: str) -> Iterator[Event]:
        """Yield the events that end the item, complete or cut off."""
        self.status = status
        yield from self._done()
        yield "output_item.done", {"output_index": self._index, "item": self.told}

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    def _added(self, **empty: object) -> Event:
        return "output_item.added", {
            "output_index": self._index,
            "item": {**self.told, **empty},
        }

    def _event(self, kind: str, **more: object) -> Event:
        return kind, {"item_id": self._id, "output_index": self._index, **more}

    def _of_part(self, kind: str, **more: object) -> Event:
        return self._event(kind, content_index=0, **more)


class _Message(_Item):
    prefix = "msg"

    def __init__(self, request_id: str, index: int, shown: _Shown) -> None:
        super().__init__(request_id, index)
        self._shown = shown
        self._scores: list[TokenScore] = []
        self._all: Many | None = None
        """All scores once the message has ended: four events repeat them."""

    @property
    def told(self) -> Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "status": self.status,
            "content": [self._part],
        }

    @property
    def _part(self) -> Json:
        return {
            "type": "output_text",
            "text": self._text,
            "annotations": [],
            "logprobs": self._all or self._shown(tuple(self._scores), keep=False),
        }

    def begin(self) -> Iterator[Event]:
        yield self._added(content=[])
        yield self._of_part("content_part.added", part=self._part)

    def more(self, text: str, scores: Sequence[TokenScore]) -> Event:
        self._texts.append(text)
        self._scores.extend(scores)
        shown = self._shown(scores, keep=False)
        return self._of_part("output_text.delta", delta=text, logprobs=shown)

    def _done(self) -> Iterator[Event]:
        self._all = self._shown(self._scores, keep=True)
        part = self._part
        yield self._of_part("output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._of_part("content_part.done", part=part)


class _Thinking(_Item):
    prefix = "rs"

    @property
    def told(self) -> Json:
        return {
            "id": self._id,
            "type": "reasoning",
            "summary": [],
            "content": [self._part],
            "encrypted_content": None,
            "status": self.status,
        }

    @property
    def _part(self) -> Json:
        return {"type": "reasoning_text", "text": self._text}

    def begin(self) -> Iterator[Event]:
        yield self._added(content=[])
        yield self._of_part("content_part.added", part=self._part)

    def more(self, text: str) -> Event:
        self._texts.append(text)
        return self._of_part("reasoning_text.delta", delta=text)

    def _done(self) -> Iterator[Event]:
        part = self._part
        yield self._of_part("reasoning_text.done", text=part["text"])
        yield self._of_part("content_part.done", part=part)


class _Call(_Item):
    prefix = "fc"

    def __init__(self, request_id: str, index: int, begun: ToolCallBegun) -> None:
        super().__init__(request_id, index)
        self._begun = begun

    @property
    def told(self) -> Json:
        return {
            "id": self._id,
            "type": "function_call",
            "status": self.status,
            "call_id": self._begun.id,
            "name": self._begun.name,
            "arguments": self._text,
        }

    def begin(self) -> Iterator[Event]:
        yield self._added()

    def more(self, text: str) -> Event:
        self._texts.append(text)
        return self._event("function_call_arguments.delta", delta=text)

    def _done(self) -> Iterator[Event]:
        yield self._event(
            "function_call_arguments.done", name=self._begun.name, arguments=self._text
        )


class Output:
    """Turns the model's output into items, and yields the events for their changes.

    A token's score belongs to the text that it completes. Scores of thinking and of calls are
    dropped: these items have no member for them.
    """

    def __init__(
        self, request_id: str, shown: _Shown, *, calls: bool, reasoning: bool = True
    ) -> None:
        """Args:
        shown: makes JSON of log-probabilities.
        calls: whether the model may call tools. If so, blanks before a call are dropped.
        reasoning: whether thinking is shown.
        """
        self._request_id = request_id
        self._shown = shown
        self._reasoning = reasoning
        self._may_call = calls
        self._items: list[_Item] = []
        self._scores: list[TokenScore] = []
        """Scores of tokens that have not completed any text yet."""
        self._blank: list[tuple[str, list[TokenScore]]] = []
        """Text that is dropped if a call follows."""

    @property
    def items(self) -> list[Json]:
        """The items as they are now."""
        return [item.told for item in self._items]

    def take(self, part: ReplyPart, scores: Sequence[TokenScore] = ()) -> Iterator[Event]:
        """Add a part of the answer, and yield its events.

        Args:
            scores: log-probabilities of the tokens that completed the part.
        """
        scores, self._scores = [*self._scores, *scores], []
        match part:
            case Content(text=text):
                yield from self._say(text, scores)
            case Reasoning(text=text):
                if self._reasoning and text:
                    yield from self._think(text)
            case ToolCallBegun():
                self._blank = []
                yield from self._add(_Call(self._request_id, len(self._items), part))
            case ToolArguments(text=text):
                call = self._open
                assert isinstance(call, _Call), "arguments follow the call that they belong to"
                yield call.more(text)

    def keep(self, scores: Sequence[TokenScore]) -> None:
        """Keep scores of tokens that have not completed any text yet."""
        self._scores.extend(scores)

    def end(self, status: str) -> Iterator[Event]:
        """End the answer, whose last item gets this status. If there are no items, add an empty
        text."""
        scores, self._scores = self._scores, []
        called = any(isinstance(item, _Call) for item in self._items)
        if self._blank and not called:
            yield from self._say_held()
        if not self._items:
            yield from self._add(_Message(self._request_id, 0, self._shown))
        last = self._items[-1]
        if scores and isinstance(last, _Message):
            yield last.more("", scores)
        yield from last.end(status)

    @property
    def _open(self) -> _Item | None:
        return self._items[-1] if self._items else None

    def _say(self, text: str, scores: list[TokenScore]) -> Iterator[Event]:
        message = self._open
        if not isinstance(message, _Message):
            if self._may_call and text.isspace():
                self._blank.append((text, scores))
                return
            yield from self._say_held()
            message = self._open
            if not isinstance(message, _Message):
                message = _Message(self._request_id, len(self._items), self._shown)
                yield from self._add(message)
        yield message.more(text, scores)

    def _say_held(self) -> Iterator[Event]:
        held, self._blank = self._blank, []
        if not held:
            return
        message = _Message(self._request_id, len(self._items), self._shown)
        yield from self._add(message)
        for text, scores in held:
            yield message.more(text, scores)

    def _think(self, text: str) -> Iterator[Event]:
        thinking = self._open
        if not isinstance(thinking, _Thinking):
            thinking = _Thinking(self._request_id, len(self._items))
            yield from self._add(thinking)
        yield thinking.more(text)

    def _add(self, item: _Item) -> Iterator[Event]:
        if (last := self._open) is not None:
            yield from last.end("completed")
        self._items.append(item)
        yield from item.begin()


# -------------------- answer
# Builds a response, whole or as events.
#
# An event's type is also its name. Events are numbered from 0 without gaps. A stream ends with
# ``response.completed`` or ``response.incomplete``, and one that fails with ``error`` and
# ``response.failed``.

_CODES: Final = {"rate_limit_exceeded", "server_error", "invalid_prompt"}
"""Codes of a failed response that OpenAI's clients know."""


class ResponseAnswer(Answer):
    """Builds a ``response`` or its events."""

    def __init__(
        self,
        fields: ResponseFields,
        call: GenerateCall,
        tokenizer: TextTokenizer,
        *,
        tools: Json,
        name: str,
        metadata: Mapping[str, str],
        store: bool = False,
        conversation: str | None = None,
    ) -> None:
        """Args:
        call: the call that was made from `fields`.
        tools: the response's members about tools; see `shown_tools`.
        name: the unique part of its ids.
        metadata: the caller's metadata, which the response repeats.
        store: whether the response is to be stored.
        conversation: id of the conversation to which its items are added.
        """
        self.id = f"resp_{name}"
        self.framing = Framing(_begin, b"", self._failure)
        self._tokenizer = tokenizer
        self._label = labels(fields, tokenizer)
        self._logprobs = call.logprobs
        self._tally = Tally()
        self._output = Output(
            name,
            self._shown,
            calls=call.tools is not None,
            reasoning=fields.include_reasoning,
        )
        self._streamed = fields.stream
        self._status = "in_progress"
        self._begun = False
        self._number = 0
        self._told: Final[Json] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": fields.model,
            "background": False,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": fields.max_tool_calls,
            "metadata": metadata,
            "previous_response_id": fields.previous_response_id,
            "conversation": None if conversation is None else {"id": conversation},
            "reasoning": {"effort": fields.reasoning.effort, "summary": None},
            "store": store,
            "temperature": getattr(fields, "temperature", None),
            "text": {
                "format": _shown_format(fields),
                "verbosity": fields.text.verbosity or "medium",
            },
            "top_logprobs": fields.top_logprobs,
            "top_p": getattr(fields, "top_p", None),
            "truncation": fields.truncation,
            "user": fields.user,
            "safety_identifier": fields.safety_identifier,
            "prompt_cache_key": fields.prompt_cache_key,
            **tools,
        }

    def add(self, piece: Piece) -> None:
        """See `Answer.add`."""
        for _ in self._events(piece):
            pass

    def whole(self) -> Json:
        """See `Answer.whole`."""
        return self._response

    def chunks(self, piece: Piece) -> list[Json]:
        """See `Answer.chunks`."""
        shown = [] if self._begun else list(self._begin())
        self._begun = True
        shown += [self._numbered(kind, **members) for kind, members in self._events(piece)]
        return shown

    def last_chunk(self) -> Json:
        """The event with the whole response."""
        return self._numbered(self._status, response=self._response)

    def not_stored(self) -> None:
        """Report from now on that the response is not stored."""
        self._told["store"] = False

    def stored(self) -> tuple[Json, list[Json]]:
        """The response without output, and its items, as they are stored: without
        log-probabilities, which can take megabytes."""
        head = {**self._response}
        del head["output"]
        return head, [_without_scores(item) for item in self._output.items]

    # ------------------------------------------------------------------------ events

    def _events(self, piece: Piece) -> Iterator[Event]:
        """Yield the events for a piece's changes to the output."""
        self._tally.take(piece)
        delta, output = piece.delta, self._output
        scores = scores_of(delta) if self._logprobs else []
        taken = 0
        for end, group in groupby(zip(delta.ends, delta.parts, strict=True), itemgetter(0)):
            parts = [part for _, part in group]
            for part, own in zip(parts, _shared(parts, scores[taken:end]), strict=True):
                yield from output.take(part, own)
            taken = end
        if delta.text and not delta.parts:  # the text is not taken apart
            yield from output.take(Content(delta.text), scores)
        else:
            output.keep(scores[taken:])
        if delta.finish is not None:
            whole = delta.finish in ("stop", "tool_calls")
            self._status = "completed" if whole else "incomplete"
            yield from output.end(self._status)

    def _begin(self) -> Iterator[Json]:
        begun = self._state("in_progress")
        yield self._numbered("created", response=begun)
        yield self._numbered("in_progress", response=begun)

    def _numbered(self, kind: str, **more: object) -> Json:
        number, self._number = self._number, self._number + 1
        return {"type": f"response.{kind}", "sequence_number": number, **more}

    def _failure(self, failure: HttpFailure) -> bytes:
        told = failure.body["error"]
        error = {
            **self._numbered(""),
            "type": "error",
            "code": told["code"],
            "message": told["message"],
            "param": told["param"],
        }
        code = told["code"] if told["code"] in _CODES else "server_error"
        self.not_stored()
        failed = {
            **self._state("failed"),
            "error": {"code": code, "message": told["message"]},
        }
        return _event(error) + _event(self._numbered("failed", response=failed))

    # ------------------------------------------------------------------------- parts

    def _state(self, status: str) -> Json:
        """A response without output."""
        return {
            **self._told,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }

    @property
    def _response(self) -> Json:
        cut = self._status == "incomplete"
        return {
            **self._state(self._status),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output.items,
            "usage": self._used,
        }

    @property
    def _used(self) -> Json:
        counts = self._tally.counts
        return {
            "input_tokens": counts.prompt,
            "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
            "output_tokens": counts.completion,
            "output_tokens_details": {"reasoning_tokens": counts.reasoning},
            "total_tokens": counts.prompt + counts.completion,
        }

    def _shown(self, scores: Sequence[TokenScore], *, keep: bool) -> Many:
        """JSON of log-probabilities; ``keep`` if several events repeat them."""
        count = len(scores)
        return Many(
            count,
            lambda: map(self._score, scores),
            at_once=SCORES_AT_ONCE,
            keep=keep and self._streamed,
        )

    def _score(self, token: TokenScore) -> Json:
        return {
            **self._entry(token.id, token.logprob),
            "top_logprobs": [self._entry(*top) for top in token.tops],
        }

    def _entry(self, token: int, logprob: float | None) -> Json:
        return {
            "token": self._label(token),
            "bytes": list(self._tokenizer.token_bytes(token)),
            "logprob": logprob,
        }


def _shared(
    parts: Sequence[Part], scores: Sequence[TokenScore]
) -> Iterator[Sequence[TokenScore]]:
    """Share scores among the parts that their last token completed. The last token's score goes
    to the first text part, if there is one, and the other scores to the first part."""
    text = next((at for at, part in enumerate(parts) if isinstance(part, Content)), 0)
    for at in range(len(parts)):
        begin = len(scores) - 1 if at and at == text else 0
        end = len(scores) - 1 if text > at else len(scores)
        yield scores[begin:end] if at in (0, text) else ()


def _without_scores(item: Json) -> Json:
    if item["type"] != "message":
        return item
    return {**item, "content": [{**part, "logprobs": []} for part in item["content"]]}


def _shown_format(fields: ResponseFields) -> Json:
    given = fields.text.format
    if given is None:
        return {"type": "text"}
    shown: Json = given.model_dump(by_alias=True, exclude_none=True)
    return shown


def _begin(event: Mapping[str, Any]) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\ndata: "


def _event(event: Mapping[str, Any]) -> bytes:
    return _begin(event) + dump(event) + b"\n\n"


# -------------------- endpoints

_MOST_METADATA: Final = 16
_LONGEST_KEY: Final = 64
_LONGEST_VALUE: Final = 512


def response_routes(core: ServingCore) -> list[Route]:
    """The routes of stored responses, and of counting tokens."""

    async def get_response(request: Request) -> Response:
        name, query = request.path_params["response"], request.query_params
        if query.get("stream", "false").lower() not in ("false", "0"):
            raise invalid("stream", "is not supported here: a stored response comes whole")
        for wanted in (*query.getlist("include"), *query.getlist("include[]")):
            if wanted == "message.output_text.logprobs":
                raise invalid("include", "asks for log-probabilities, which are not stored")
        with core.calls.running():
            tenant = caller_of(request.scope).tenant
            found = await storing(core).read(tenant, lambda db: db.response(tenant, name))
            if found is None:
                raise no_such("response", name)
            return StoredAnswer(core, found)

    async def delete_response(request: Request) -> Response:
        name = request.path_params["response"]
        with core.calls.running():
            tenant = caller_of(request.scope).tenant
            if not await storing(core).change(tenant, lambda db: db.delete(tenant, name)):
                raise no_such("response", name)
            return JSONResponse({"id": name, "object": "response", "deleted": True})

    async def list_input(request: Request) -> Response:
        name, page = request.path_params["response"], page_of(request.query_params)
        with core.calls.running():
            tenant = caller_of(request.scope).tenant
            found = await storing(core).read(
                tenant, lambda db: db.input_items(tenant, name, page)
            )
            return StoredAnswer(core, found)

    one = "/v1/responses/{response}"
    return [
        Route("/v1/responses/input_tokens", InputTokensEndpoint(core), methods=["POST"]),
        Route(one, get_response, methods=["GET"]),
        Route(one, delete_response, methods=["DELETE"]),
        Route(f"{one}/input_items", list_input, methods=["GET"]),
    ]


def storing(core: ServingCore) -> StoredResponses:
    """The stored responses. Raises InvalidField if this server stores none."""
    if core.responses is None:
        raise invalid(
            "store",
            "is off on this server (--store-responses): send the whole conversation as input",
        )
    return core.responses


class StoredAnswer(LongAnswer):
    """An answer with JSON that was read from the store."""

    def __init__(self, core: ServingCore, data: bytes) -> None:
        headers = {"content-type": "application/json", "content-length": str(len(data))}
        super().__init__(in_pieces(data), core.reader_limit_s, headers)
        self._stored = storing(core)
        self._size = len(data)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stored.sending(caller_of(scope).tenant, self._size):
            await super().__call__(scope, receive, send)


def page_of(query: QueryParams) -> ItemPage:
    """The page that a query asks for. Raises InvalidField."""
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_LISTED):
        raise invalid("limit", f"must be 1 to {MAX_LISTED}")
    if order not in ("asc", "desc"):
        raise invalid("order", "must be asc or desc")
    return ItemPage(query.get("after", ""), int(limit), order == "desc")


@dataclass(frozen=True, slots=True)
class _Asked:
    """A checked request, without the stored items that go before its input.

    Attributes:
        metadata: the caller's metadata.
        conversation: the conversation's id.
        ignored: the request's fields and tools that have no effect.
    """

    fields: ResponseFields
    metadata: Mapping[str, str]
    conversation: str | None
    ignored: Ignored

    @classmethod
    def of(
        cls, body: object, ignored: Ignored, kind: type[ResponseFields] = ResponseFields
    ) -> _Asked:
        fields = parse_fields(kind, body, ignored)
        if not isinstance(fields.input, str) and len(fields.input) > MAX_MESSAGES:
            many = len(fields.input)
            raise invalid("input", f"has {many} items: send at most {MAX_MESSAGES}")
        given = fields.conversation
        named = given if isinstance(given, str) or given is None else given.id
        return cls(fields, metadata_of(fields.metadata), named, ignored)

    @property
    def continues(self) -> bool:
        """Whether it needs stored items."""
        named = self.fields.previous_response_id is not None or self.conversation is not None
        return named or bool(self.references)

    @property
    def references(self) -> list[tuple[int, str]]:
        """Positions of the input's references to stored items, with the items' ids."""
        given = self.fields.input
        return [
            (at, item["id"])
            for at, item in enumerate(() if isinstance(given, str) else given)
            if isinstance(item, dict)
            and item.get("type") == "item_reference"
            and isinstance(item.get("id"), str)
        ]

    def stored(self, database: ResponseDatabase, tenant: str) -> tuple[bytes, bytes]:
        """The items that go before the input, and those that it refers to, as JSON. Raises
        HttpError, InvalidField."""
        before, names = b"[]", [name for _, name in self.references]
        if self.conversation is not None:
            before = database.conversation_history(tenant, self.conversation)
        elif self.fields.previous_response_id is not None:
            before = database.history(tenant, self.fields.previous_response_id)
        return before, b"[" + b",".join(database.referred(tenant, names)) + b"]"

    def with_items(self, items: Sequence[Any]) -> _Asked:
        """The same request with these items in place of references."""
        if not items:
            return self
        given = list(self.fields.input)
        for (at, _), item in zip(self.references, items, strict=True):
            given[at] = item
        return replace(self, fields=self.fields.model_copy(update={"input": given}))


class _Continued(NamedTuple):
    """A request with the items that go before its input.

    Attributes:
        long: whether the items are too long to be processed on the event loop.
    """

    asked: _Asked
    before: Sequence[Any]
    long: bool


async def _continued(
    core: ServingCore, asked: _Asked, tenant: str, share: BodyShare
) -> _Continued:
    """Get the stored items of a request. Their bytes count as a body's do.

    Raises:
        HttpError: there is no such response, conversation or item.
        InvalidField: the items are too many, or this server stores nothing.
        QueueFull: other bodies leave no room for them.
    """
    field = "conversation" if asked.conversation is not None else "previous_response_id"
    if asked.conversation is None and asked.fields.previous_response_id is None:
        field = f"input[{asked.references[0][0]}]"
    if core.responses is None:
        raise invalid(
            field,
            "is not supported because this server stores nothing (--store-responses): send "
            "the whole conversation as input",
        )
    before, referred = await core.responses.read(tenant, lambda db: asked.stored(db, tenant))
    size = len(before) + len(referred)
    share(size)
    long = size >= LONG_BODY or longer_as_json(asked.fields.input, LONG_BODY)
    try:
        items: Any = await core.bodies.parse(before)
        own: Any = await core.bodies.parse(referred)
    except (ValueError, RecursionError) as error:
        raise invalid(field, f"cannot be continued: {str(error)[:200]}") from error
    return _Continued(asked.with_items(own), items, long)


class ResponsesEndpoint(GenerateEndpoint):
    """``POST /v1/responses``. A response is stored before its end is sent."""

    def _check(self, body: object, caller: Caller) -> Answering:
        asked = _Asked.of(body, self._ignored())
        if not asked.continues:
            return self._answering(self._job(asked, (), caller.tenant), caller)
        check_served(asked.fields)  # before anything is read
        if asked.fields.input == []:
            raise invalid("input", "is empty: send at least one message")
        return Answering(partial(self._continue, [asked], caller))

    def _parse(self, body: object, caller: Caller) -> GenerateJob:
        return self._job(_Asked.of(body, self._ignored()), (), caller.tenant)

    async def _continue(self, asked: list[_Asked], caller: Caller, reply: Reply) -> None:
        """Args: asked: a list with the request. It is taken out, so that nothing keeps the
        parsed input while the answer is made."""
        with self._core.bodies.share() as share:
            job = await self._made(asked.pop(), caller.tenant, share)
            self._tell(job.ignored, reply)
            await self._answering(job, caller).run(reply)

    async def _made(self, asked: _Asked, tenant: str, share: BodyShare) -> GenerateJob:
        found = await _continued(self._core, asked, tenant, share)
        make = partial(self._job, found.asked, found.before, tenant)
        return await self._core.bodies.thread(make) if found.long else make()

    def _job(self, asked: _Asked, before: Sequence[Any], tenant: str) -> GenerateJob:
        core, fields = self._core, asked.fields
        call = response_call(fields, core.base.name, before, asked.ignored)
        name = uuid.uuid4().hex  # not the request's id, which a caller can choose, and guess
        store = core.responses is not None and fields.store is not False
        answer = ResponseAnswer(
            fields,
            call,
            core.generator.prompts.tokenizer,
            tools=shown_tools(fields, asked.ignored),
            name=name,
            metadata=asked.metadata,
            store=store,
            conversation=asked.conversation,
        )
        finish = None
        if store or asked.conversation is not None:
            finish = partial(
                self._finish,
                answer,
                stored_items(fields.input, name),
                tenant=tenant,
                previous=fields.previous_response_id,
                conversation=asked.conversation,
                store=store,
            )
        return GenerateJob([call], answer, fields.stream, asked.ignored, finish)

    async def _finish(
        self,
        answer: ResponseAnswer,
        own: Sequence[StoredItem],
        *,
        tenant: str,
        previous: str | None,
        conversation: str | None,
        store: bool,
    ) -> None:
        """Store a response that is complete, and add its items to its conversation.

        Args:
            own: the response's input.

        Raises:
            DiskFull, DiskFailed, HttpError: the items cannot be added to the conversation.
                Otherwise it would be continued as if this turn had never happened.
        """
        stored = storing(self._core)
        head, output = answer.stored()

        def make() -> FinishedResponse:
            items = [StoredItem(item["id"], msgspec.json.encode(item)) for item in output]
            return FinishedResponse(
                id=answer.id,
                previous=previous,
                conversation=conversation,
                head=msgspec.json.encode(head),
                input=own,
                output=items,
            )

        if conversation is None:
            if not await stored.keep(tenant, make):
                answer.not_stored()
            return

        def add(database: ResponseDatabase) -> bool:
            response = make()
            if store:
                return database.put(tenant, response)
            items = [*response.input, *response.output]
            database.add_items(tenant, conversation, items, most=None)
            return True

        if not await stored.write(add):
            raise DiskFull(
                "the items of this response could not be added to its conversation, as there "
                "is no room for them: delete some"
            )


class InputTokenFields(ResponseFields):
    """``POST /v1/responses/input_tokens``. Attributes: model: the base if it is left out."""

    model: str = ""
    input: str | list[Any] = Field(default_factory=list)


class InputTokensEndpoint(JsonEndpoint):
    """``POST /v1/responses/input_tokens``: counts the tokens that a response's prompt would
    have."""

    def _check(self, body: object, caller: Caller) -> Answering:
        asked = _Asked.of(body, self._ignored(), InputTokenFields)
        if asked.continues:
            check_served(asked.fields)
            return Answering(partial(self._continue, asked, caller))
        count = partial(self._count, self._chat(asked, ()), caller)
        return Answering(count, ignored=asked.ignored)

    def _chat(self, asked: _Asked, before: Sequence[Any]) -> tuple[str, ChatMessages]:
        """The adapter (empty for the base), and the chat to count."""
        base, fields = self._core.base.name, asked.fields
        fields = fields.model_copy(update={"model": fields.model or base})
        call = response_call(fields, base, before, asked.ignored)
        assert isinstance(call.input, ChatMessages), "made of items"
        return call.adapter, call.input

    async def _continue(self, asked: _Asked, caller: Caller, reply: Reply) -> None:
        with self._core.bodies.share() as share:
            found = await _continued(self._core, asked, caller.tenant, share)
            make = partial(self._chat, found.asked, found.before)
            chat = await self._core.bodies.thread(make) if found.long else make()
            self._tell(found.asked.ignored, reply)
            await self._count(chat, caller, reply)

    async def _count(
        self, chat: tuple[str, ChatMessages], caller: Caller, reply: Reply
    ) -> None:
        adapter, given = chat
        count = await tokenizing(self._core).count(given, adapter, caller)
        await reply.json(200, {"object": "response.input_tokens", "input_tokens": count}, {})


def metadata_of(given: object) -> Mapping[str, str]:
    """Check the caller's notes against OpenAI's limits, which matter as each event may repeat
    the notes. Raises InvalidField."""
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > _MOST_METADATA:
        raise invalid("metadata", f"must be an object of at most {_MOST_METADATA} members")
    for key, value in given.items():
        if len(key) > _LONGEST_KEY:
            raise invalid(
                "metadata",
                f"has a key of {len(key)} characters: give at most {_LONGEST_KEY}",
            )
        if not isinstance(value, str) or len(value) > _LONGEST_VALUE:
            raise invalid(
                f"metadata.{key}", f"is not a string of at most {_LONGEST_VALUE} characters"
            )
    return given


# -------------------- conversations
# ``/v1/conversations``: lists of items that their callers keep on the server.


class UpdateFields(RequestFields):
    """``POST /v1/conversations/{id}``."""

    metadata: Any = None


class ConversationFields(RequestFields):
    """``POST /v1/conversations``. Attributes: metadata: the caller's notes: `metadata_of`."""

    items: list[Any] | None = None
    metadata: Any = None


class ItemsFields(RequestFields):
    """``POST /v1/conversations/{id}/items``."""

    items: list[Any]


def conversation_routes(core: ServingCore) -> list[Route]:
    """The routes of conversations."""

    async def get_conversation(request: Request) -> Response:
        with core.calls.running():
            name, tenant = request.path_params["conversation"], caller_of(request.scope).tenant
            return JSONResponse(await _told(core, tenant, name))

    async def delete_conversation(request: Request) -> Response:
        name, tenant = request.path_params["conversation"], caller_of(request.scope).tenant
        with core.calls.running():
            await storing(core).change(tenant, lambda db: db.delete_conversation(tenant, name))
            return JSONResponse({"id": name, "object": "conversation.deleted", "deleted": True})

    async def list_items(request: Request) -> Response:
        name, tenant = request.path_params["conversation"], caller_of(request.scope).tenant
        page = page_of(request.query_params)
        with core.calls.running():
            found = await storing(core).read(tenant, lambda db: db.items(tenant, name, page))
            return StoredAnswer(core, found)

    async def get_item(request: Request) -> Response:
        given, tenant = request.path_params, caller_of(request.scope).tenant
        name, item = given["conversation"], given["item"]
        with core.calls.running():
            found = await storing(core).read(tenant, lambda db: db.item(tenant, name, item))
            return StoredAnswer(core, found)

    async def delete_item(request: Request) -> Response:
        given, tenant = request.path_params, caller_of(request.scope).tenant
        name, item = given["conversation"], given["item"]
        with core.calls.running():
            await storing(core).change(tenant, lambda db: db.delete_item(tenant, name, item))
            return JSONResponse(await _told(core, tenant, name, changed=True))

    one = "/v1/conversations/{conversation}"
    return [
        Route("/v1/conversations", CreateEndpoint(core), methods=["POST"]),
        Route(one, get_conversation, methods=["GET"]),
        Route(one, delete_conversation, methods=["DELETE"]),
        Route(one, _Of(core, UpdateEndpoint), methods=["POST"]),
        Route(f"{one}/items", list_items, methods=["GET"]),
        Route(f"{one}/items", _Of(core, AddEndpoint), methods=["POST"]),
        Route(f"{one}/items/{{item}}", get_item, methods=["GET"]),
        Route(f"{one}/items/{{item}}", delete_item, methods=["DELETE"]),
    ]


async def _told(
    core: ServingCore, tenant: str, name: str, *, changed: bool = False
) -> Mapping[str, Any]:
    """A conversation as callers see it. Raises HttpError if there is none. Args: changed:
    whether this request has changed it."""
    created, metadata = await storing(core).read(
        tenant, lambda db: db.conversation(tenant, name), changed=changed
    )
    return {
        "id": name,
        "object": "conversation",
        "created_at": created,
        "metadata": msgspec.json.decode(metadata),
    }


def _checked(given: Sequence[Any], name: str, ignored: Ignored) -> list[StoredItem]:
    """Check items, and convert them to their stored form. Raises InvalidField."""
    check_items(list(given), "items", ignored)
    return stored_items(list(given), name)


class CreateEndpoint(JsonEndpoint):
    """``POST /v1/conversations``."""

    def _check(self, body: object, caller: Caller) -> Answering:
        ignored, own = self._ignored(), uuid.uuid4().hex
        fields = parse_fields(ConversationFields, body, ignored)
        items = _checked(fields.items or (), own, ignored)
        metadata = metadata_of(fields.metadata)
        create = partial(self._create, caller.tenant, f"conv_{own}", metadata, items)
        return Answering(create, ignored=ignored)

    async def _create(
        self,
        tenant: str,
        name: str,
        metadata: Mapping[str, str],
        items: Sequence[StoredItem],
        reply: Reply,
    ) -> None:
        told = msgspec.json.encode(metadata)
        await storing(self._core).change(
            tenant, lambda db: db.begin_conversation(tenant, name, told, items)
        )
        await reply.json(200, await _told(self._core, tenant, name, changed=True), {})


class _Of:
    """An ASGI application for a path with a conversation's id."""

    def __init__(self, core: ServingCore, kind: type[_OfConversation]) -> None:
        self._core = core
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._kind(self._core, scope["path_params"]["conversation"])
        await endpoint(scope, receive, send)


class _OfConversation(JsonEndpoint):
    """A POST about one conversation."""

    def __init__(self, core: ServingCore, name: str) -> None:
        super().__init__(core)
        self._name = name


class UpdateEndpoint(_OfConversation):
    """``POST /v1/conversations/{id}``: replaces the metadata."""

    def _check(self, body: object, caller: Caller) -> Answering:
        ignored = self._ignored()
        fields = parse_fields(UpdateFields, body, ignored)
        if fields.metadata is None:
            raise invalid("metadata", "is missing: send it")
        update = partial(self._update, caller.tenant, metadata_of(fields.metadata))
        return Answering(update, ignored=ignored)

    async def _update(self, tenant: str, metadata: Mapping[str, str], reply: Reply) -> None:
        name, told = self._name, msgspec.json.encode(metadata)
        await storing(self._core).change(
            tenant, lambda db: db.describe_conversation(tenant, name, told)
        )
        await reply.json(200, await _told(self._core, tenant, name, changed=True), {})


class AddEndpoint(_OfConversation):
    """``POST /v1/conversations/{id}/items``."""

    def _check(self, body: object, caller: Caller) -> Answering:
        ignored = self._ignored()
        fields = parse_fields(ItemsFields, body, ignored)
        if not fields.items:
            raise invalid("items", "is empty: send at least one item")
        items = _checked(fields.items, uuid.uuid4().hex, ignored)
        return Answering(partial(self._add, caller.tenant, items), ignored=ignored)

    async def _add(self, tenant: str, items: Sequence[StoredItem], reply: Reply) -> None:
        name = self._name
        await storing(self._core).change(
            tenant, lambda db: db.add_items(tenant, name, items, most=MAX_HISTORY)
        )
        await reply.made_json(listed(items, more=False))
