"""The form of a chat completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from veneer_server.openai.answers import Answer, Choice, Json, Piece, TokenScore
from veneer_server.openai.fields import ChatFields
from veneer_server.openai.tools.answers import CallDeltas, Calls

__all__ = ["ChatAnswer"]


class ChatAnswer(Answer):
    """``chat.completion`` and its chunks."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, fields: ChatFields, *args: Any, **options: Any) -> None:
        super().__init__(fields, *args, **options)
        self._legacy = bool(fields.functions)

    def _whole_choice(self, at: int, text: str, choice: Choice) -> Json:
        calls = Calls(self._legacy)
        calls.add(choice.parts)
        content = None if calls and not text else text
        return {
            "index": at,
            "message": {
                "role": "assistant",
                "content": content,
                "refusal": None,
                **calls.whole(),
            },
            "logprobs": self._logprob_object(choice.tokens),
            "finish_reason": self._finish(choice.finish),
        }

    def _finish(self, reason: str | None) -> str | None:
        return "function_call" if self._legacy and reason == "tool_calls" else reason

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
        calls = CallDeltas(self._legacy).of(piece.delta.parts)
        deltas = [*([{"content": text}] if text else []), *calls]
        if tokens and not deltas:
            deltas = [{"content": ""}]
        for number, delta in enumerate(deltas):
            scores = None if number else self._logprob_object(tokens)
            yield chunk(delta, scores, None)
        if piece.delta.finish is not None:
            yield chunk({}, None, self._finish(piece.delta.finish))

    def _logprob_object(self, tokens: Sequence[TokenScore]) -> Json | None:
        if not self._logprobs:
            return None
        content = [
            {
                **self._entry(token.id, token.logprob),
                "top_logprobs": [self._entry(*top) for top in token.tops],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> Json:
        data = self._tokenizer.token_bytes(token)
        return {
            "token": self._tokenizer.token_label(token),
            "logprob": logprob,
            "bytes": list(data) if data else None,
        }
