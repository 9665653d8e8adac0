"""What every answer is made from, whatever its form: pieces of output, counts and scores.

`choices` makes chats' and completions' answers of them, `responses.answer` responses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from veneer_server.openai.http.asgi import DATA_ONLY, Framing
from veneer_server.serving.generation import Delta, Generation
from veneer_server.text.detokenizer import Detokenizer
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import PackedTops, unpack_tops

__all__ = [
    "SCORES_AT_ONCE",
    "Answer",
    "Counts",
    "Json",
    "Offsets",
    "Piece",
    "Tally",
    "TokenScore",
    "scores_of",
]

SCORES_AT_ONCE: Final = 8
"""Positions whose log-probabilities are made in one go: with 20 likely tokens beside each, a
fraction of a millisecond."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """New output of one choice.

    Attributes:
        prompt: index of the request's prompt.
    """

    prompt: int
    generation: Generation
    delta: Delta


class Offsets:
    """Computes where each token's text begins, in characters of the whole text."""

    def __init__(self, tokenizer: TextTokenizer, *, at: int = 0, prompt: str | None = None):
        """Args:
        at: offset of the first token.
        prompt: the prompt's text, if the tokens are the prompt's; None if they continue
            it. Special tokens have no text, but a prompt sent as text may hold their names.
        """
        self._tokenizer = tokenizer
        self._decoder = Detokenizer(tokenizer, continues=prompt is None)
        self._prompt = prompt
        self._at = at

    def of(self, token: int) -> int:
        """The next token's offset. Tokens that form one character share its offset."""
        data = self._tokenizer.token_bytes(token)
        if not data:
            name, at = self._tokenizer.token_name(token), self._at
            if self._prompt is not None and self._prompt.startswith(name, at):
                self._at += len(name)
            return at
        # The first byte ends the last of these characters, or is one of its own.
        first = (self._decoder.held + data[:1]).decode(errors="replace")
        at = self._at + len(first) - 1
        self._at += len(self._decoder.feed([token]))
        return at


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One of an answer's tokens with its log-probability.

    Attributes:
        packed: the likely tokens beside it, which take a tenth of the memory so.
    """

    id: int
    logprob: float
    packed: PackedTops

    @property
    def tops(self) -> Iterator[tuple[int, float]]:
        """The likely tokens beside it."""
        return unpack_tops(self.packed)


def scores_of(delta: Delta) -> list[TokenScore]:
    """New tokens with their log-probabilities; none where they were not asked for."""
    if delta.logprobs is None:
        return []
    tops = delta.top_logprobs or [b""] * len(delta.tokens)
    return [
        TokenScore(token, logprob, packed)
        for token, logprob, packed in zip(delta.tokens, delta.logprobs, tops, strict=True)
    ]


class Answer(ABC):
    """Builds what answers one request. Pass in every piece, each choice's in order: all of
    them to `add`, or all to `chunks`."""

    framing: Framing = DATA_ONLY
    """Of its chunks."""

    @abstractmethod
    def add(self, piece: Piece) -> None:
        """Keep a piece for `whole`."""

    @abstractmethod
    def whole(self) -> Json:
        """The answer made of all added pieces."""

    @abstractmethod
    def chunks(self, piece: Piece) -> list[Json]:
        """What a stream shows of a piece; nothing if it has nothing to show yet."""

    @abstractmethod
    def last_chunk(self) -> Json | None:
        """What a stream shows after the last piece, if anything."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of a request.

    Attributes:
        cached: those of the prompts that were in the prefix cache.
        reasoning: those of the completions that are thinking.
    """

    prompt: int
    completion: int
    cached: int
    reasoning: int


class Tally:
    """Counts the tokens of all prompts and choices so far."""

    def __init__(self) -> None:
        self._generations: dict[int, Generation] = {}

    def take(self, piece: Piece) -> None:
        """Count a piece."""
        self._generations[piece.prompt] = piece.generation

    @property
    def counts(self) -> Counts:
        known = self._generations.values()
        return Counts(
            sum(len(generation.prompt.ids) for generation in known),
            sum(generation.completion_tokens for generation in known),
            sum(generation.cached_tokens for generation in known),
            sum(generation.reasoning_tokens for generation in known),
        )
