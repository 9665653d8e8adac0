"""Answers that are choices: what chats and completions share.

`chat` and `completions` hold their own forms.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from veneer_server.openai.answers import Answer, Json, Piece, Tally, TokenScore, scores_of
from veneer_server.openai.extensions.answers import Additions, labels
from veneer_server.openai.fields import CommonFields
from veneer_server.text.replies.deltas import Delta as Part
from veneer_server.text.tokenizer import TextTokenizer

__all__ = ["Choice", "ChoiceAnswer"]


@dataclass(slots=True)
class Choice:
    """The output of one choice so far.

    Attributes:
        started: whether a chunk has been made from it.
    """

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    tokens: list[TokenScore] = field(default_factory=list)
    finish: str | None = None
    started: bool = False


class ChoiceAnswer(Answer):
    """An object with ``choices``, whole or in chunks."""

    kind: str
    """Object type of a whole answer."""
    chunk_kind: str
    id_prefix: str

    def __init__(
        self,
        fields: CommonFields,
        tokenizer: TextTokenizer,
        *,
        prompts: int,
        logprobs: bool,
        echo: bool,
        request_id: str,
        fingerprint: str,
    ) -> None:
        """Args:
        prompts: how many prompts the request holds.
        fingerprint: hash of the base model's weights.
        """
        self._tokenizer = tokenizer
        self._additions = Additions(fields, tokenizer, several=fields.n > 1)
        self._label = labels(fields, tokenizer)
        self._tally = Tally()
        self._logprobs = logprobs
        self._echo = echo
        self._n = fields.n
        self._options = fields.stream_options
        self._choices = [Choice() for _ in range(prompts * fields.n)]
        self._head: Final[Json] = {
            "id": f"{self.id_prefix}-{request_id}",
            "created": int(time.time()),
            "model": fields.model,
            "system_fingerprint": f"fp_{fingerprint[:12]}",
        }

    # ------------------------------------------------------------- a whole answer

    def add(self, piece: Piece) -> None:
        """See `Answer.add`."""
        at, choice = self._choice(piece)
        self._additions.add(at, piece.prompt, piece.generation, piece.delta)
        choice.text.append(self._text(piece, choice))
        choice.reasoning.append(piece.delta.reasoning)
        choice.parts.extend(piece.delta.parts)
        if self._logprobs:
            choice.tokens.extend(scores_of(piece.delta))
        choice.finish = piece.delta.finish
        choice.started = True

    def whole(self) -> Json:
        """See `Answer.whole`."""
        choices = [
            self._whole_choice(at, "".join(choice.text), choice)
            for at, choice in enumerate(self._choices)
        ]
        return {
            **self._head,
            "object": self.kind,
            "choices": choices,
            "usage": self._usage(),
        }

    # ------------------------------------------------------------------- a stream

    def chunks(self, piece: Piece) -> list[Json]:
        """See `Answer.chunks`."""
        at, choice = self._choice(piece)
        text = self._text(piece, choice)
        tokens = scores_of(piece.delta) if self._logprobs else []
        shown = [
            self._chunk([one]) for one in self._choice_chunks(at, text, tokens, piece, choice)
        ]
        choice.started = True
        return shown

    def last_chunk(self) -> Json | None:
        """The usage, if it was requested."""
        if not self._options.include_usage:
            return None
        return {**self._chunk([]), "usage": self._usage()}

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head, "object": self.chunk_kind, "choices": choices}
        if self._options.include_usage:
            continuous = self._options.continuous_usage_stats
            chunk["usage"] = self._usage() if continuous else None
        return chunk

    # ---------------------------------------------------------------------- both

    def _usage(self) -> Json:
        counts = self._tally.counts
        return {
            "prompt_tokens": counts.prompt,
            "completion_tokens": counts.completion,
            "total_tokens": counts.prompt + counts.completion,
            "prompt_tokens_details": {"cached_tokens": counts.cached},
        }

    def _choice(self, piece: Piece) -> tuple[int, Choice]:
        self._tally.take(piece)
        at = piece.prompt * self._n + piece.delta.index
        return at, self._choices[at]

    def _text(self, piece: Piece, choice: Choice) -> str:
        if self._echo and not choice.started:
            return piece.generation.prompt.text + piece.delta.text
        return piece.delta.text

    @abstractmethod
    def _whole_choice(self, at: int, text: str, choice: Choice) -> Json:
        """One entry of a whole answer's ``choices``."""

    @abstractmethod
    def _choice_chunks(
        self, at: int, text: str, tokens: list[TokenScore], piece: Piece, choice: Choice
    ) -> Iterator[Json]:
        """Entries of ``choices``, each for a separate chunk."""
