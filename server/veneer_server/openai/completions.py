"""Builds text completions, whole or as chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from veneer_server.openai.choices import (
    SCORES_AT_ONCE,
    Choice,
    ChoiceAnswer,
    Json,
    Offsets,
    Piece,
    TokenScore,
)
from veneer_server.openai.http.body import Joined, Many
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import unpack_tops


class _Echoed:
    """Log-probabilities of an echoed prompt, with which each of its choices begins. Their JSON
    is made once. The prompt's first token has none."""

    def __init__(
        self,
        piece: Piece,
        tokenizer: TextTokenizer,
        label: Callable[[int], str],
        top_object: Callable[..., Json],
        *,
        several: bool,
    ) -> None:
        """Args: piece: the prompt's first piece. several: whether it has several choices."""
        prompt, delta = piece.generation.prompt, piece.delta
        ids, logprobs = prompt.ids, delta.prompt_logprobs
        assert logprobs is not None, "asked for with echo"
        tops = delta.prompt_top_logprobs or [b""] * len(logprobs)

        def many(items: Callable[[], Iterable[Any]], at_once: int = SCORES_AT_ONCE) -> Many:
            return Many(len(ids), items, at_once=at_once, keep=several)

        self.members = (
            many(lambda: map(label, ids), 512),
            many(lambda: chain((None,), logprobs), 512),
            many(
                lambda: chain(
                    (None,),
                    map(top_object, ids[1:], logprobs, map(unpack_tops, tops)),
                )
            ),
            many(lambda: map(Offsets(tokenizer, prompt=prompt.text).of, ids), 64),
        )


class CompletionAnswer(ChoiceAnswer):
    """Builds a ``text_completion``; its chunks have the same form."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._echoed: dict[int, _Echoed] = {}
        """By index of the prompt."""
        self._offsets: dict[int, Offsets] = {}
        """Offsets of the generated tokens, by index of the choice."""

    def _choice(self, piece: Piece) -> tuple[int, Choice]:
        at, choice = super()._choice(piece)
        if not choice.started and self._logprobs:
            begin = len(piece.generation.prompt.text) if self._echo else 0
            self._offsets[at] = Offsets(self._tokenizer, at=begin)
            # The prompt's scores come with the first piece of its first sample.
            if self._echo and piece.delta.prompt_logprobs is not None:
                self._echoed[piece.prompt] = _Echoed(
                    piece,
                    self._tokenizer,
                    self._label,
                    self._top_object,
                    several=self._n > 1,
                )
        return at, choice

    def _whole_choice(self, at: int, text: str, choice: Choice) -> Json:
        return {
            "index": at,
            "text": text,
            "logprobs": self._logprob_object(
                at, choice.tokens, self._echoed.get(at // self._n)
            ),
            "finish_reason": choice.finish,
            **self._additions.of_choice(at),
            **self._additions.of_prompt(at // self._n),
        }

    def _choice_chunks(
        self, at: int, text: str, tokens: list[TokenScore], piece: Piece, choice: Choice
    ) -> Iterator[Json]:
        finish, echoed = piece.delta.finish, None
        if not choice.started:
            echoed = self._echoed.get(piece.prompt)
        ids = self._additions.of_delta(piece.delta)
        if not choice.started:
            ids |= self._additions.of_start(piece.generation)
        if text or tokens or echoed or finish is not None or (ids and piece.delta.tokens):
            yield {
                "index": at,
                "text": text,
                "logprobs": self._logprob_object(at, tokens, echoed),
                "finish_reason": finish,
                **ids,
            }

    def _logprob_object(
        self, at: int, tokens: Sequence[TokenScore], echoed: _Echoed | None
    ) -> Json | None:
        """The ``logprobs`` of a choice's next tokens, after its prompt's if echoed."""
        if not self._logprobs:
            return None
        label, offsets, count = self._label, self._offsets[at], len(tokens)
        own = (
            Many(count, lambda: [label(token.id) for token in tokens]),
            Many(count, lambda: [token.logprob for token in tokens]),
            Many(
                count,
                lambda: (
                    self._top_object(token.id, token.logprob, token.tops) for token in tokens
                ),
                at_once=SCORES_AT_ONCE,
            ),
            # `Offsets` keeps state, which works because this is written once, and in order.
            Many(count, lambda: (offsets.of(token.id) for token in tokens), at_once=64),
        )
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        before = (None,) * len(names) if echoed is None else echoed.members
        return {
            name: many if first is None else Joined(first, many)
            for name, first, many in zip(names, before, own, strict=True)
        }

    def _top_object(
        self, token: int, logprob: float, tops: Iterable[tuple[int, float]]
    ) -> Json:
        """Label to log-probability, always including the chosen token."""
        return {self._label(other): score for other, score in (*tops, (token, logprob))}
