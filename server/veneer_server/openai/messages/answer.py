"""The form of a message, whole and as events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from veneer_server.openai.answers import Answer, Json, Piece, Tally
from veneer_server.openai.errors import HttpFailure
from veneer_server.openai.http.asgi import Framing
from veneer_server.openai.http.long_json import dump
from veneer_server.text.replies.deltas import Content, Delta, Reasoning, ToolCallBegun, joined

__all__ = ["MessageAnswer"]

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
    """``message`` and its events: one block of content at a time, each with a number."""

    def __init__(self, model: str, *, request_id: str) -> None:
        self.framing = Framing(_begin, b"", _failure)
        self._tally = Tally()
        self._blocks: list[Json] = []
        self._open = False
        """Whether the last block may grow."""
        self._arguments = ""
        """Of the call in the last block."""
        self._blank = ""
        """Text that may be nothing but white space around thinking and calls."""
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
        """None: the last event says nothing."""

    def _message(self, blocks: list[Json], reason: str | None) -> Json:
        said = {"content": blocks, "stop_reason": reason, "stop_sequence": None}
        return {**self._told, **said, "usage": self._usage}

    @property
    def _usage(self) -> Json:
        """As Anthropic counts, tokens that were cached are not among those of the input."""
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
        """What a piece changes in the content."""
        self._tally.take(piece)
        delta = piece.delta
        # A part for each, so that events do not depend on how the engine's outputs are joined.
        parts = joined(delta.parts) if delta.parts else [Content(delta.text)]
        for part in parts:
            yield from self._take(part)
        if delta.finish is not None:
            self._finish = delta.finish
            if self._blank and not self._blocks:
                yield from self._say("text", "")
            yield from self._close()

    def _take(self, part: Delta) -> Iterator[Json]:
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
        self._blocks.append(dict(block))  # grows, after the event may have been kept
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
    """A call's arguments; empty if they were cut, or are no object: the field has no place for
    anything else."""
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
