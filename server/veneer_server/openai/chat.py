"""The form of a chat completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from veneer_server.openai.answers import Answer, Choice, Json, Piece, TokenScore

__all__ = ["ChatAnswer"]


def _reasoning(text: str) -> dict[str, str | None]:
    """What the model thought, under DeepSeek's name, which most programs know, and vLLM's."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


class ChatAnswer(Answer):
    """``chat.completion`` and its chunks."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def _whole_choice(self, at: int, text: str, choice: Choice) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": at,
            "message": message | _reasoning("".join(choice.reasoning)),
            "logprobs": self._logprob_object(choice.tokens),
            "finish_reason": choice.finish,
            **self._additions.of_choice(at),
        }

    def whole(self) -> Json:
        """See `Answer.whole`. What belongs to the one prompt is beside the choices."""
        return super().whole() | self._additions.of_prompt(0)

    def chunks(self, piece: Piece) -> list[Json]:
        """See `Answer.chunks`."""
        _, choice = self._choice(piece)
        started, shown = choice.started, super().chunks(piece)
        if not started and shown:
            shown[0] |= self._additions.of_start(piece.generation)
        return shown

    def _choice_chunks(
        self, at: int, text: str, tokens: list[TokenScore], piece: Piece, choice: Choice
    ) -> Iterator[Json]:
        def chunk(
            delta: Mapping[str, str | None], logprobs: Json | None, finish: str | None
        ) -> Json:
            return {
                "index": at,
                "delta": delta,
                "logprobs": logprobs,
                "finish_reason": finish,
            }

        if not choice.started:
            yield chunk({"role": "assistant", "content": ""}, None, None)
        # The tokens go with the first chunk that has any of their text.
        scores, ids = self._logprob_object(tokens), self._additions.of_delta(piece.delta)
        if reasoning := piece.delta.reasoning:
            yield chunk(_reasoning(reasoning), scores, None) | ids
            scores, ids = None, {}
        if text or (not reasoning and (tokens or (ids and piece.delta.tokens))):
            yield chunk({"content": text}, scores, None) | ids
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
            "token": self._label(token),
            "logprob": logprob,
            "bytes": list(data) if data else None,
        }
