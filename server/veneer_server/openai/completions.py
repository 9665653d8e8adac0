"""The form of a text completion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from veneer_server.openai.answers import Json, Piece, TokenScore
from veneer_server.openai.choices import Choice, ChoiceAnswer

__all__ = ["CompletionAnswer"]


class CompletionAnswer(ChoiceAnswer):
    """``text_completion``; its chunks have the same form."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def _whole_choice(self, at: int, text: str, choice: Choice) -> Json:
        return {
            "index": at,
            "text": text,
            "logprobs": self._logprob_object(choice.tokens),
            "finish_reason": choice.finish,
            **self._additions.of_choice(at),
            **self._additions.of_prompt(at // self._n),
        }

    def _choice_chunks(
        self, at: int, text: str, tokens: list[TokenScore], piece: Piece, choice: Choice
    ) -> Iterator[Json]:
        finish = piece.delta.finish
        ids = self._additions.of_delta(piece.delta)
        if not choice.started:
            ids |= self._additions.of_start(piece.generation)
        if text or tokens or finish is not None or (ids and piece.delta.tokens):
            yield {
                "index": at,
                "text": text,
                "logprobs": self._logprob_object(tokens),
                "finish_reason": finish,
                **ids,
            }

    def _logprob_object(self, tokens: Sequence[TokenScore]) -> Json | None:
        if not self._logprobs:
            return None
        return {
            "tokens": [self._label(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top_object(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top_object(self, token: TokenScore) -> Json | None:
        """Label to log-probability, always including the chosen token."""
        if token.logprob is None:
            return None
        scores = (*token.tops, (token.id, token.logprob))
        return {self._label(other): logprob for other, logprob in scores}
