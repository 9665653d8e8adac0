"""The form of a response, whole and as events.

Events have a type, which is their name too, and numbers from 0 without a gap. A stream ends
with ``response.completed`` or ``response.incomplete``, and one that fails with ``error`` and
``response.failed``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

from veneer_server.openai.answers import (
    SCORES_AT_ONCE,
    Answer,
    Json,
    Piece,
    Tally,
    TokenScore,
    scores_of,
)
from veneer_server.openai.errors import HttpFailure
from veneer_server.openai.extensions.answers import labels
from veneer_server.openai.fields import ChatFields
from veneer_server.openai.http.asgi import Framing
from veneer_server.openai.http.long_json import Many, dump
from veneer_server.openai.responses.fields import ResponseFields
from veneer_server.openai.responses.output import Event, Output
from veneer_server.serving.records import GenerateCall
from veneer_server.text.replies.deltas import Content
from veneer_server.text.replies.deltas import Delta as Part
from veneer_server.text.tokenizer import TextTokenizer

__all__ = ["ResponseAnswer"]

_CODES: Final = {"rate_limit_exceeded", "server_error", "invalid_prompt"}
"""Codes of a failed response that OpenAI's clients know."""


class ResponseAnswer(Answer):
    """``response`` and its events."""

    def __init__(
        self,
        fields: ResponseFields,
        chat: ChatFields,
        call: GenerateCall,
        tokenizer: TextTokenizer,
        *,
        tools: Json,
        request_id: str,
        metadata: Mapping[str, str],
    ) -> None:
        """Args:
        chat, call: what `fields` became.
        tools: what it says about them; see `shown_tools`.
        metadata: the caller's, which the response repeats.
        """
        self.framing = Framing(_begin, b"", self._failure)
        self._tokenizer = tokenizer
        self._label = labels(chat, tokenizer)
        self._logprobs = call.logprobs
        self._tally = Tally()
        self._output = Output(
            request_id,
            self._shown,
            calls=call.tools is not None,
            reasoning=fields.include_reasoning,
        )
        self._streamed = fields.stream
        self._status = "in_progress"
        self._begun = False
        self._number = 0
        self._told: Final[Json] = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": fields.model,
            "background": False,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": fields.max_tool_calls,
            "metadata": metadata,
            "previous_response_id": None,
            "reasoning": {"effort": fields.reasoning.effort, "summary": None},
            "store": False,
            "temperature": getattr(chat, "temperature", None),
            "text": {"format": _shown_format(fields), "verbosity": "medium"},
            "top_logprobs": fields.top_logprobs,
            "top_p": getattr(chat, "top_p", None),
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
        if self._status != "in_progress":
            shown.append(self._numbered(self._status, response=self._response))
        return shown

    def last_chunk(self) -> None:
        """None: the last event has the usage."""

    # ------------------------------------------------------------------------ events

    def _events(self, piece: Piece) -> Iterator[Event]:
        """What a piece changes in the output."""
        self._tally.take(piece)
        delta, output = piece.delta, self._output
        scores = scores_of(delta) if self._logprobs else []
        taken = 0
        for end, group in groupby(zip(delta.ends, delta.parts, strict=True), itemgetter(0)):
            parts = [part for _, part in group]
            for part, own in zip(parts, _shared(parts, scores[taken:end]), strict=True):
                yield from output.take(part, own)
            taken = end
        if delta.text and not delta.parts:  # it is not taken apart
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
        """Log-probabilities; ``keep`` for those that several events repeat."""
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
    """Shares scores among the parts that their last token completed: that token's own belongs
    to text, if any of them is, the others to the first part."""
    text = next((at for at, part in enumerate(parts) if isinstance(part, Content)), 0)
    for at in range(len(parts)):
        begin = len(scores) - 1 if at and at == text else 0
        end = len(scores) - 1 if text > at else len(scores)
        yield scores[begin:end] if at in (0, text) else ()


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
