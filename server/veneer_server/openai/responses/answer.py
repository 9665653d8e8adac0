"""The form of a response, whole and as events.

Events have a type, which is their name too, and numbers from 0 without a gap. A stream ends
with ``response.completed`` or ``response.incomplete``, and one that fails with ``error`` and
``response.failed``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from veneer_server.openai.answers import Answer, Choice, Json, Piece, TokenScore
from veneer_server.openai.errors import HttpFailure
from veneer_server.openai.fields import ChatFields
from veneer_server.openai.http.asgi import Framing, dump
from veneer_server.openai.responses.fields import ResponseFields
from veneer_server.text.tokenizer import TextTokenizer

__all__ = ["ResponseAnswer"]

_CODES: Final = {"rate_limit_exceeded", "server_error", "invalid_prompt"}
"""Codes of a failed response that OpenAI's clients know."""


class ResponseAnswer(Answer):
    """``response`` and its events."""

    kind = "response"
    chunk_kind = "response"
    id_prefix = "resp"

    def __init__(
        self,
        fields: ResponseFields,
        chat: ChatFields,
        tokenizer: TextTokenizer,
        *,
        request_id: str,
        fingerprint: str,
        metadata: Mapping[str, str],
    ) -> None:
        """Args:
        chat: what `fields` became.
        metadata: the caller's, which the response repeats.
        """
        super().__init__(
            chat,
            tokenizer,
            prompts=1,
            logprobs=chat.logprobs,
            echo=False,
            request_id=request_id,
            fingerprint=fingerprint,
        )
        self.framing = Framing(_event, b"", self._failure)
        self._number = 0
        self._item_id = f"msg_{request_id}"
        self._text_format = fields.text.format
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
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": getattr(chat, "temperature", None),
            "text": {"format": _shown_format(fields), "verbosity": "medium"},
            "tool_choice": fields.tool_choice,
            "tools": [],
            "top_logprobs": fields.top_logprobs,
            "top_p": getattr(chat, "top_p", None),
            "truncation": fields.truncation,
            "user": fields.user,
        }

    def whole(self) -> Json:
        """The response made of all added pieces."""
        [choice] = self._choices
        return self._response(choice, "".join(choice.text), choice.tokens)

    def chunks(self, piece: Piece) -> list[Json]:
        """The events of a piece."""
        _, choice = self._choice(piece)
        text = piece.delta.text
        tokens = list(self._tokens(piece, choice)) if self._logprobs else []
        choice.text.append(text)
        choice.tokens.extend(tokens)
        choice.finish = piece.delta.finish
        shown = [] if choice.started else list(self._begin())
        choice.started = True
        if text or tokens:
            scores = self._scores(tokens)
            shown.append(self._of_part("output_text.delta", delta=text, logprobs=scores))
        if choice.finish is not None:
            shown += self._end(choice)
        return shown

    def usage_chunk(self) -> None:
        """None: the last event has the usage."""

    # ------------------------------------------------------------------------ events

    def _begin(self) -> Iterator[Json]:
        begun = self._state("in_progress")
        yield self._numbered("response.created", response=begun)
        yield self._numbered("response.in_progress", response=begun)
        item = {**self._item("", [], "in_progress"), "content": []}
        yield self._numbered("response.output_item.added", output_index=0, item=item)
        yield self._of_part("content_part.added", part=self._part("", []))

    def _end(self, choice: Choice) -> Iterator[Json]:
        text = "".join(choice.text)
        yield self._of_part("output_text.done", text=text, logprobs=self._scores(choice.tokens))
        yield self._of_part("content_part.done", part=self._part(text, choice.tokens))
        response = self._response(choice, text, choice.tokens)
        [item] = response["output"]
        yield self._numbered("response.output_item.done", output_index=0, item=item)
        yield self._numbered(f"response.{response['status']}", response=response)

    def _of_part(self, kind: str, **more: object) -> Json:
        return self._numbered(
            f"response.{kind}",
            item_id=self._item_id,
            output_index=0,
            content_index=0,
            **more,
        )

    def _numbered(self, kind: str, **more: object) -> Json:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **more}

    def _failure(self, failure: HttpFailure) -> bytes:
        told = failure.body["error"]
        error = self._numbered(
            "error", code=told["code"], message=told["message"], param=told["param"]
        )
        code = told["code"] if told["code"] in _CODES else "server_error"
        failed = {
            **self._state("failed"),
            "error": {"code": code, "message": told["message"]},
        }
        return _event(error) + _event(self._numbered("response.failed", response=failed))

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

    def _response(self, choice: Choice, text: str, tokens: Sequence[TokenScore]) -> Json:
        whole = choice.finish == "stop"
        status = "completed" if whole else "incomplete"
        return {
            **self._state(status),
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "output": [self._item(text, tokens, status)],
            "usage": self._used(),
        }

    def _used(self) -> Json:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    def _item(self, text: str, tokens: Sequence[TokenScore], status: str) -> Json:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part(text, tokens)],
        }

    def _part(self, text: str, tokens: Sequence[TokenScore]) -> Json:
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": self._scores(tokens),
        }

    def _scores(self, tokens: Sequence[TokenScore]) -> list[Json]:
        return [
            {
                **self._score(token.id, token.logprob),
                "top_logprobs": [self._score(*top) for top in token.tops],
            }
            for token in tokens
        ]

    def _score(self, token: int, logprob: float | None) -> Json:
        return {
            "token": self._tokenizer.token_label(token),
            "bytes": list(self._tokenizer.token_bytes(token)),
            "logprob": logprob,
        }

    def _whole_choice(self, at: int, text: str, choice: Choice) -> Json:
        raise NotImplementedError("a response has items, not choices")

    def _choice_chunks(
        self, at: int, text: str, tokens: list[TokenScore], piece: Piece, choice: Choice
    ) -> Iterator[Json]:
        raise NotImplementedError("a response has items, not choices")


def _shown_format(fields: ResponseFields) -> Json:
    given = fields.text.format
    if given is None:
        return {"type": "text"}
    shown: Json = given.model_dump(by_alias=True, exclude_none=True)
    return shown


def _event(event: Mapping[str, Any]) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + dump(event) + b"\n\n"
