"""Anthropic's API: ``POST /v1/messages``, and the count of its prompt's tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Final, Literal

from pydantic import Field
from veneer_registry.errors import InvalidField

from veneer_server.access.caller import Caller
from veneer_server.openai.choices import Answer, Json, Piece, Tally
from veneer_server.openai.errors import HttpFailure
from veneer_server.openai.extensions import Ignored, is_neutral
from veneer_server.openai.fields import RequestFields, parse_fields, with_fractions
from veneer_server.openai.generate import GenerateEndpoint, GenerateJob
from veneer_server.openai.http.asgi import Framing, Reply
from veneer_server.openai.http.body import dump
from veneer_server.openai.json_endpoint import Answering, JsonEndpoint
from veneer_server.openai.requests import (
    adapter_named,
    constrained,
    json_constraint,
    sampling_of,
    session_key,
)
from veneer_server.openai.tokens import tokenizing
from veneer_server.serving.checks import (
    MAX_MESSAGES,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    check_json_size,
    invalid,
    refuse,
)
from veneer_server.serving.records import ChatMessages, GenerateCall
from veneer_server.serving.tool_history import (
    MAX_ARGUMENT_BYTES,
    History,
    PastCall,
    check_calls,
)
from veneer_server.serving.tool_use import MAX_TOOLS, CallChoice, Tool, ToolUse, check_tool
from veneer_server.text.replies import Content, Reasoning, ReplyPart, ToolCallBegun, joined
from veneer_server.text.turns import Effort, TemplateOptions
from veneer_server.wire.messages import Constraint

# -------------------- fields

_UINT32: Final = (1 << 32) - 1
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class ThinkingFields(RequestFields):
    """``thinking``: whether the model thinks first, if its template has that option."""

    where = "thinking"

    type: Literal["enabled", "adaptive", "disabled", "between_tools"]
    budget_tokens: int | None = None
    display: str | None = None


class ToolChoice(RequestFields):
    """``tool_choice``."""

    refused = None

    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: str = ""
    disable_parallel_tool_use: bool = False


class OutputFormat(RequestFields):
    """``output_config.format``: a constraint."""

    refused = None

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfigFields(RequestFields):
    """``output_config``."""

    where = "output_config"

    effort: Effort | None = None
    format: OutputFormat | None = None


class Metadata(RequestFields):
    """``metadata``."""

    where = "metadata"

    user_id: str | None = None


@with_fractions
class MessageFields(RequestFields):
    """``POST /v1/messages``, with all our fractional sampling options, not only Anthropic's.

    Attributes:
        messages, system, tools: see `messages_of` and `tools_of`.
        output_format: the older name of ``output_config.format``.
        chat_template_kwargs, cache_salt: as for chats.
        thread: asks the API to keep the conversation; refused by the endpoint.
    """

    model: str = Field(min_length=1, max_length=512)
    messages: Annotated[_Objects, Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=_UINT32)]
    system: str | _Objects = ""
    top_k: Annotated[int, Field(ge=0, le=_UINT32)] | None = None
    seed: Annotated[int, Field(ge=0, le=(1 << 64) - 1)] | None = None
    stop_sequences: Annotated[
        list[_Stop], Field(default_factory=list, fail_fast=True, max_length=MAX_STOPS)
    ]
    stream: bool = False
    tools: _Objects = Field(default_factory=list)
    tool_choice: ToolChoice = ToolChoice()
    thinking: ThinkingFields | None = None
    output_config: OutputConfigFields = OutputConfigFields()
    output_format: OutputFormat | None = None
    metadata: Metadata = Metadata()
    thread: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    cache_salt: str = ""


class CountFields(MessageFields):
    """``POST /v1/messages/count_tokens``: a message's fields; only the prompt's matter.

    Attributes:
        max_tokens: no effect.
    """

    max_tokens: Annotated[int, Field(ge=1, le=_UINT32)] = 1


# -------------------- turns
# Converts a conversation's turns to messages for a chat template, and reads the tools.
#
# A user's turn may hold tool results, which are separate messages for a template. Members about
# caches or citations have no effect. Tools that Anthropic defines or runs are left out, unless
# the request forces a call of one.

_CHOICES: Final = {
    "auto": CallChoice.AUTO,
    "any": CallChoice.REQUIRED,
    "tool": CallChoice.NAMED,
}
_LONGEST_ID: Final = 256
_NUMBER: Final = re.compile(r"\[\d+\]")
_IGNORED: Final = frozenset({"type", "cache_control", "citations", "signature", "caller"})


def messages_of(
    turns: Sequence[Mapping[str, Any]],
    system: str | Sequence[Mapping[str, Any]],
    ignored: Ignored | None = None,
) -> tuple[Mapping[str, Any], ...]:
    """Convert turns to messages. System texts before the first turn become one message.

    Args:
        ignored: collects unknown members; None: they are refused.

    Raises:
        InvalidField: a turn is malformed, or has unsupported content.
    """
    return tuple(_Turns(ignored or Ignored()).messages(turns, system))


class _Turns:
    """Reads the turns of one request."""

    def __init__(self, ignored: Ignored) -> None:
        self._ignored = ignored
        self._history = History()

    def messages(
        self, turns: Sequence[Mapping[str, Any]], system: str | Sequence[Mapping[str, Any]]
    ) -> Iterator[Mapping[str, Any]]:
        first = [self._text_of("system", system)] if system else []
        begun = False
        for at, turn in enumerate(turns):
            where = f"messages[{at}]"
            self._check_members(where, turn, {"role", "content"})
            role, content = turn.get("role"), turn.get("content")
            if role == "system" and not begun:
                first.append(self._text_of(f"{where}.content", content))
                continue
            if first and not begun:
                yield self._system(first)
            begun = True
            match role:
                case "user":
                    yield from self._of_user(where, content)
                case "assistant":
                    yield self._of_assistant(where, content)
                case "system":
                    yield self._system([self._text_of(f"{where}.content", content)])
                case _:
                    raise invalid(f"{where}.role", "must be user, assistant or system")
        if not begun:
            raise invalid("messages", "hold no turn of the user: send one")

    def _system(self, texts: Sequence[str]) -> Mapping[str, Any]:
        return self._history.message("system", "\n\n".join(texts), field="system")

    def _of_user(self, where: str, content: object) -> Iterator[Mapping[str, Any]]:
        """Yield a user's messages. Tool results come first, as a template expects them right
        after the calls."""
        texts: list[str] = []
        for at, block in _blocks(f"{where}.content", content):
            if block["type"] == "text":
                texts.append(_member(at, block, "text"))
            elif block["type"] == "tool_result":
                self._check_members(at, block, {"tool_use_id", "content", "is_error"})
                text = self._text_of(f"{at}.content", block.get("content") or "")
                call = _id(at, block, "tool_use_id")
                yield self._history.message("tool", text, call_id=call, field=where)
            else:
                raise _unserved(at, block["type"])
        if texts:
            yield self._history.message("user", "".join(texts), field=where)

    def _of_assistant(self, where: str, content: object) -> Mapping[str, Any]:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[PastCall] = []
        for at, block in _blocks(f"{where}.content", content):
            match block["type"]:
                case "text":
                    texts.append(_member(at, block, "text"))
                case "thinking":
                    self._check_members(at, block, {"thinking"})
                    thoughts.append(_member(at, block, "thinking"))
                case "redacted_thinking":  # says nothing that a template could use
                    continue
                case "tool_use":
                    self._check_members(at, block, {"id", "name", "input"})
                    calls.append(_past_call(at, block))
                    check_calls(len(calls), f"{where}.content")
                case kind:
                    raise _unserved(at, kind)
        return self._history.message(
            "assistant",
            "".join(texts),
            calls,
            reasoning="".join(thoughts),
            field=f"{where}.content",
        )

    def _text_of(self, where: str, content: object) -> str:
        texts = []
        for at, block in _blocks(where, content):
            if block["type"] != "text":
                raise _unserved(at, block["type"])
            texts.append(_member(at, block, "text"))
        return "".join(texts)

    def _check_members(self, where: str, given: Mapping[str, Any], known: set[str]) -> None:
        for name, value in given.items():
            if name in known or name in _IGNORED or is_neutral(value):
                continue
            if self._ignored.strict:
                raise invalid(f"{where}.{name[:60]}", "is not a known field: leave it out")
            self._ignored.field(f"{_NUMBER.sub('[]', where)}.{name}")


def _past_call(where: str, block: Mapping[str, Any]) -> PastCall:
    given = block.get("input")
    if not isinstance(given, dict):
        raise invalid(f"{where}.input", "must be an object")
    check_json_size(f"{where}.input", given, MAX_ARGUMENT_BYTES)
    text = json.dumps(given, ensure_ascii=False)
    return PastCall(_id(where, block, "id"), _member(where, block, "name"), text)


def tools_of(
    given: Sequence[Mapping[str, Any]], choice: ToolChoice, ignored: Ignored | None = None
) -> ToolUse | None:
    """The tools that the answer may or must use; None if it may use none.

    Args:
        ignored: collects tools that Anthropic defines or runs; None: they are refused.

    Raises:
        InvalidField: a tool is malformed, or one that must be called is missing.
    """
    if len(given) > MAX_TOOLS:
        refuse("tools", f"has {len(given)} entries: send at most {MAX_TOOLS}")
    ignored, tools = ignored or Ignored(), []
    for at, tool in enumerate(given):
        kind = tool.get("type", "custom")
        forced = choice.type == "tool" and tool.get("name") == choice.name
        if isinstance(kind, str) and kind != "custom" and not (ignored.strict or forced):
            ignored.tool(kind)
        else:
            tools.append(_tool(tool, f"tools[{at}]"))
    if not tools and choice.type in ("any", "tool"):
        needs = "tools of your own" if given else "tools"
        raise invalid("tool_choice", f"needs {needs}: send them")
    if not tools or choice.type == "none":
        return None
    named = choice.name if choice.type == "tool" else ""
    parallel = not choice.disable_parallel_tool_use
    return ToolUse(tuple(tools), _CHOICES[choice.type], named, parallel)


def _tool(given: Mapping[str, Any], where: str) -> Tool:
    if given.get("type") not in (None, "custom"):
        raise _unserved(where, given["type"])
    function: dict[str, Any] = {"name": _member(where, given, "name")}
    if given.get("description") is not None:
        function["description"] = _member(where, given, "description")
    if given.get("input_schema") is not None:
        function["parameters"] = given["input_schema"]
    if given.get("strict") is True:
        function["strict"] = True
    check_tool(made := Tool(function), where, schema="input_schema")
    return made


def _blocks(where: str, content: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each block with its path for error messages. A string is one text block."""
    if isinstance(content, str):
        yield where, {"type": "text", "text": content}
        return
    if not isinstance(content, list) or not content:
        raise invalid(where, "must be a string or a list of blocks")
    for at, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise invalid(f"{where}[{at}]", "must be an object with a type, such as text")
        yield f"{where}[{at}]", block


def _member(where: str, block: Mapping[str, Any], name: str) -> str:
    text = block.get(name)
    if not isinstance(text, str):
        raise invalid(f"{where}.{name}", "must be a string")
    return text


def _id(where: str, block: Mapping[str, Any], name: str) -> str:
    if len(text := _member(where, block, name)) > _LONGEST_ID:
        raise invalid(f"{where}.{name}", f"has more than {_LONGEST_ID} characters")
    return text


def _unserved(where: str, kind: object) -> Exception:
    shown = repr(kind[:40]) if isinstance(kind, str) else "unknown"
    return invalid(f"{where}.type", f"is {shown}: only text and your own tools are supported")


# -------------------- call


def message_call(fields: MessageFields, base: str, ignored: Ignored) -> GenerateCall:
    """Make the generate call for a message.

    Args:
        ignored: collects members and tools that have no effect.

    Raises:
        InvalidField: fields contradict each other, or one is outside its range.
    """
    _check_no_thread(fields)
    messages = messages_of(fields.messages, fields.system, ignored)
    use = tools_of(fields.tools, fields.tool_choice, ignored)
    disabled = fields.thinking is not None and fields.thinking.type == "disabled"
    # The answer continues the assistant's last message, as with Anthropic.
    begun = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    options = TemplateOptions.of(
        fields.chat_template_kwargs,
        "none" if disabled else fields.output_config.effort,
        None,
        begun,
    )
    return GenerateCall(
        adapter=adapter_named(fields.model, base),
        input=ChatMessages(messages, options, () if use is None else use.tools),
        sampling=sampling_of(dict(fields)),
        max_tokens=fields.max_tokens,
        open_ended=True,
        clamped=True,  # Claude Code asks for 32,000, however large the model's context is
        stops=tuple(fields.stop_sequences),
        cache_salt=fields.cache_salt,
        session_key=session_key(fields.metadata.user_id),
        **constrained(use, _answer_constraint(fields), {}),
    )


def _check_no_thread(fields: MessageFields) -> None:
    """Refuse a thread with the error that makes the SDKs' tool runners send the whole
    conversation instead. Ignoring ``create`` would not do: the next request would continue the
    thread."""
    if fields.thread is not None:
        raise InvalidField(
            "thread is not supported, because conversations are not kept: leave it out, and "
            "send the whole conversation",
            metadata={"field": "thread", "error_code": "thread_unsupported_request"},
        )


def _answer_constraint(fields: MessageFields) -> dict[str, Constraint]:
    """The constraint on the answer, by the field that asks for it."""
    newer, older = fields.output_config.format, fields.output_format
    if newer is None:
        return {} if older is None else json_constraint(older.schema_, "output_format.schema")
    if older not in (None, newer):
        raise invalid("output_format", "differs from output_config.format: send one")
    return json_constraint(newer.schema_, "output_config.format.schema")


# -------------------- answer
# Builds a message, whole or as events.

_TEXT: Final = {"text": "text_delta", "thinking": "thinking_delta"}
_ERRORS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessageAnswer(Answer):
    """Builds a ``message`` or its events. Blocks of content are numbered, and sent one at a
    time."""

    def __init__(self, model: str, *, request_id: str) -> None:
        self.framing = Framing(_begin, b"", _failure)
        self._tally = Tally()
        self._blocks: list[Json] = []
        self._open = False
        """Whether the last block may grow."""
        self._arguments = ""
        """Arguments so far of the call in the last block."""
        self._blank = ""
        """White space held back, as it may be mere padding around thinking and calls."""
        self._finish: str | None = None
        self._begun = False
        self._told: Final[Json] = {
            "id": f"msg_{request_id}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }

    def add(self, piece: Piece) -> None:
        """See `Answer.add`."""
        for _ in self._events(piece):
            pass

    def whole(self) -> Json:
        """See `Answer.whole`."""
        return self._message(self._blocks, self._stop_reason)

    def chunks(self, piece: Piece) -> list[Json]:
        """See `Answer.chunks`."""
        events = list(self._events(piece))
        if not self._begun:
            self._begun = True
            begun = self._message([], None)
            begun["usage"] |= {"output_tokens": 0}
            events.insert(0, {"type": "message_start", "message": begun})
        if self._finish is not None:
            stop = {"stop_reason": self._stop_reason, "stop_sequence": None}
            events.append({"type": "message_delta", "delta": stop, "usage": self._usage})
            events.append({"type": "message_stop"})
        return events

    def last_chunk(self) -> None:
        """None: `chunks` has sent the last event already."""

    def _message(self, blocks: list[Json], reason: str | None) -> Json:
        said = {"content": blocks, "stop_reason": reason, "stop_sequence": None}
        return {**self._told, **said, "usage": self._usage}

    @property
    def _usage(self) -> Json:
        """Token counts as Anthropic counts them: ``input_tokens`` excludes cached tokens."""
        counts = self._tally.counts
        return {
            "input_tokens": counts.prompt - counts.cached,
            "cache_read_input_tokens": counts.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": counts.completion,
            "output_tokens_details": {"thinking_tokens": counts.reasoning},
        }

    @property
    def _stop_reason(self) -> str:
        if self._finish == "length":
            return "max_tokens"
        called = any(block["type"] == "tool_use" for block in self._blocks)
        return "tool_use" if called else "end_turn"

    # ------------------------------------------------------------------------ events

    def _events(self, piece: Piece) -> Iterator[Json]:
        """Yield the events for a piece's changes to the content."""
        self._tally.take(piece)
        delta = piece.delta
        # Adjacent parts of one kind become one event, however finely the text was taken apart.
        parts = joined(delta.parts) if delta.parts else [Content(delta.text)]
        for part in parts:
            yield from self._take(part)
        if delta.finish is not None:
            self._finish = delta.finish
            if self._blank and not self._blocks:
                yield from self._say("text", "")
            yield from self._close()

    def _take(self, part: ReplyPart) -> Iterator[Json]:
        match part:
            case Content(text) if text:
                yield from self._say("text", text)
            case Reasoning(text) if text:
                yield from self._say("thinking", text)
            case ToolCallBegun():
                self._blank = ""
                call = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
                yield from self._add(call)
            case Content() | Reasoning():
                return
            case _:
                self._arguments += part.text
                yield self._more({"type": "input_json_delta", "partial_json": part.text})

    def _say(self, kind: str, text: str) -> Iterator[Json]:
        last = self._blocks[-1] if self._open else None
        if last is None or last["type"] != kind:
            if kind == "text":
                text, self._blank = self._blank + text, ""
            if kind == "text" and text.isspace() and self._finish is None:
                self._blank = text
                return
            signed = {"signature": ""} if kind == "thinking" else {}
            yield from self._add({"type": kind, kind: "", **signed})
            last = self._blocks[-1]
        last[kind] += text
        yield self._more({"type": _TEXT[kind], kind: text})

    def _add(self, block: Json) -> Iterator[Json]:
        yield from self._close()
        self._blocks.append(dict(block))  # a copy: it grows, and the event must not
        self._open = True
        yield self._numbered("start", content_block=block)

    def _close(self) -> Iterator[Json]:
        if not self._open:
            return
        self._open = False
        if self._blocks[-1]["type"] == "tool_use":
            self._blocks[-1]["input"] = _object(self._arguments)
            self._arguments = ""
        yield self._numbered("stop")

    def _more(self, delta: Json) -> Json:
        return self._numbered("delta", delta=delta)

    def _numbered(self, kind: str, **more: Any) -> Json:
        return {"type": f"content_block_{kind}", "index": len(self._blocks) - 1, **more}


def _object(arguments: str) -> Json:
    """Parse a call's arguments. Empty if they were cut off or are not an object: the field can
    hold nothing else."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _begin(event: Json) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\ndata: "


def _event(event: Json) -> bytes:
    return _begin(event) + dump(event) + b"\n\n"


def _failure(failure: HttpFailure) -> bytes:
    kind = _ERRORS.get(failure.status, "api_error")
    error = {"type": kind, "message": failure.body["error"]["message"]}
    return _event({"type": "error", "error": error})


# -------------------- endpoints


class MessagesEndpoint(GenerateEndpoint):
    """``POST /v1/messages``."""

    def _parse(self, body: object, caller: Caller) -> GenerateJob:
        ignored = self._ignored()
        fields = parse_fields(MessageFields, body, ignored)
        call = message_call(fields, self._core.base.name, ignored)
        answer = MessageAnswer(fields.model, request_id=caller.request_id)
        return GenerateJob([call], answer, fields.stream, ignored)


class CountEndpoint(JsonEndpoint):
    """``POST /v1/messages/count_tokens``: counts the tokens of a message's prompt. Nothing is
    generated."""

    def _check(self, body: object, caller: Caller) -> Answering:
        ignored = self._ignored()
        fields = parse_fields(CountFields, body, ignored)
        call = message_call(fields, self._core.base.name, ignored)
        assert isinstance(call.input, ChatMessages), "made of messages"
        return Answering(
            partial(self._count, call.input, call.adapter, caller), ignored=ignored
        )

    async def _count(
        self, chat: ChatMessages, adapter: str, caller: Caller, reply: Reply
    ) -> None:
        count = await tokenizing(self._core).count(chat, adapter, caller)
        await reply.json(200, {"input_tokens": count}, {})
