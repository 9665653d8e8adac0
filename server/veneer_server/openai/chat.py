"""Builds chat completions, whole or as chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from veneer_server.openai.choices import (
    SCORES_AT_ONCE,
    Choice,
    ChoiceAnswer,
    Json,
    Piece,
    TokenScore,
)
from veneer_server.openai.fields import ChatFields
from veneer_server.openai.http.body import Many
from veneer_server.openai.tools import ToolCallDeltas, ToolCalls


def _reasoning(text: str) -> dict[str, str | None]:
    """The model's reasoning under DeepSeek's name, which most programs know, and vLLM's."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


class ChatAnswer(ChoiceAnswer):
    """Builds a ``chat.completion`` or its chunks."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    _legacy = False
    """Whether calls take the form of the older ``functions``, because the request used it."""

    def __init__(self, fields: ChatFields, *args: Any, **options: Any) -> None:
        super().__init__(fields, *args, **options)
        self._legacy = bool(fields.functions)

    def _whole_choice(self, at: int, text: str, choice: Choice) -> Json:
        calls = ToolCalls(self._legacy)
        calls.add(choice.parts)
        message = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "refusal": None,
        }
        return {
            "index": at,
            "message": message | _reasoning("".join(choice.reasoning)) | calls.whole(),
            "logprobs": self._logprob_object(choice.tokens),
            "finish_reason": self._finish(choice.finish),
            **self._additions.of_choice(at),
        }

    def _finish(self, reason: str | None) -> str | None:
        return "function_call" if self._legacy and reason == "tool_calls" else reason

    def whole(self) -> Json:
        """See `Answer.whole`. A chat has one prompt; its members go beside the choices."""
        return super().whole() | self._additions.of_prompt(0)

    def chunks(self, piece: Piece) -> list[Json]:
        """See `Answer.chunks`."""
        _, choice = self._choice(piece)
        started, shown = choice.started, super().chunks(piece)
        if not started and shown:
            shown[0] |= self._additions.of_start(piece.generation)
        return shown

    def _usage(self) -> Json:
        counts = self._tally.counts
        details = {"reasoning_tokens": counts.reasoning, **counts.predictions}
        return super()._usage() | {"completion_tokens_details": details}

    def _choice_chunks(
        self, at: int, text: str, tokens: list[TokenScore], piece: Piece, choice: Choice
    ) -> Iterator[Json]:
        def chunk(delta: Mapping[str, Any], logprobs: Json | None, finish: str | None) -> Json:
            return {
                "index": at,
                "delta": delta,
                "logprobs": logprobs,
                "finish_reason": finish,
            }

        if not choice.started:
            yield chunk({"role": "assistant", "content": ""}, None, None)
        # The first of these chunks carries the scores and the token ids.
        scores, ids = self._logprob_object(tokens), self._additions.of_delta(piece.delta)
        deltas: list[Mapping[str, Any]] = []
        if reasoning := piece.delta.reasoning:
            deltas.append(_reasoning(reasoning))
        if text:
            deltas.append({"content": text})
        deltas += ToolCallDeltas(self._legacy).of(piece.delta.parts)
        if not deltas and (tokens or (ids and piece.delta.tokens)):
            deltas.append({"content": ""})
        for delta in deltas:
            yield chunk(delta, scores, None) | ids
            scores, ids = None, {}
        if piece.delta.finish is not None:
            yield chunk({}, None, self._finish(piece.delta.finish))

    def _logprob_object(self, tokens: Sequence[TokenScore]) -> Json | None:
        if not self._logprobs:
            return None
        content = Many(len(tokens), lambda: map(self._score, tokens), at_once=SCORES_AT_ONCE)
        return {"content": content, "refusal": None}

    def _score(self, token: TokenScore) -> Json:
        tops = [self._entry(*top) for top in token.tops]
        return {**self._entry(token.id, token.logprob), "top_logprobs": tops}

    def _entry(self, token: int, logprob: float) -> Json:
        data = self._tokenizer.token_bytes(token)
        return {
            "token": self._label(token),
            "logprob": logprob,
            "bytes": list(data) if data else None,
        }
