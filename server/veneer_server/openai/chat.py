"""The form of a chat completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from veneer_server.openai.answers import Answer, Choice, Json, Piece, TokenScore

__all__ = ["ChatAnswer"]


class ChatAnswer(Answer):
    """``chat.completion`` and its chunks."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def _whole_choice(self, at: int, text: str, choice: Choice) -> Json:
        return {
            "index": at,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprob_object(choice.tokens),
            "finish_reason": choice.finish,
        }

    def _choice_chunks(
        self, at: int, text: str, tokens: list[TokenScore], piece: Piece, choice: Choice
    ) -> Iterator[Json]:
        def chunk(delta: Mapping[str, str], logprobs: Json | None, finish: str | None) -> Json:
            return {
                "index": at,
                "delta": delta,
                "logprobs": logprobs,
                "finish_reason": finish,
            }

        if not choice.started:
            yield chunk({"role": "assistant", "content": ""}, None, None)
        if text or tokens:
            yield chunk({"content": text}, self._logprob_object(tokens), None)
        if piece.delta.finish is not None:
            yield chunk({}, None, piece.delta.finish)

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
