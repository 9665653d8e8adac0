"""What every answer is made from, whatever its form: pieces of output, counts and scores.

`choices` makes chats' and completions' answers of them, `responses.answer` responses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from veneer_server.openai.http.asgi import DATA_ONLY, Framing
from veneer_server.serving.generation import Delta, Generation
from veneer_server.text.detokenizer import Detokenizer
from veneer_server.text.tokenizer import TextTokenizer

__all__ = ["Answer", "Counts", "Json", "Piece", "Scores", "Tally", "TokenScore"]

Json = dict[str, Any]
Tops = Sequence[tuple[int, float]]


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
    """One token with its log-probability; a prompt's first token has none.

    Attributes:
        offset: where its text begins in the choice's text.
    """

    id: int
    offset: int
    logprob: float | None
    tops: Tops


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


class Scores:
    """Gives the tokens of pieces with their log-probabilities and places in the text."""

    def __init__(self, tokenizer: TextTokenizer, *, echo: bool = False) -> None:
        """Args: echo: the prompt's tokens come first."""
        self._tokenizer = tokenizer
        self._echo = echo
        self._offsets: dict[tuple[int, int], Offsets] = {}
        """Those of each choice, by its prompt and sample."""
        self._echoed: dict[int, list[TokenScore]] = {}

    def of(self, piece: Piece) -> Iterator[TokenScore]:
        """The tokens of a piece."""
        delta, prompt = piece.delta, piece.generation.prompt
        if delta.prompt_logprobs is not None and self._echo:
            offsets = Offsets(self._tokenizer, prompt=prompt.text)
            self._echoed[piece.prompt] = [
                TokenScore(prompt.ids[0], offsets.of(prompt.ids[0]), None, ()),
                *_joined(
                    prompt.ids[1:], offsets, delta.prompt_logprobs, delta.prompt_top_logprobs
                ),
            ]
        at = piece.prompt, delta.index
        if at not in self._offsets:
            # Computed once for all samples of a prompt; the first sample comes first.
            yield from self._echoed.get(piece.prompt, ())
            begin = len(prompt.text) if self._echo else 0
            self._offsets[at] = Offsets(self._tokenizer, at=begin)
        if delta.logprobs is not None:
            yield from _joined(
                delta.tokens, self._offsets[at], delta.logprobs, delta.top_logprobs
            )


def _joined(
    ids: Sequence[int],
    offsets: Offsets,
    logprobs: Sequence[float],
    tops: Sequence[Tops] | None,
) -> Iterator[TokenScore]:
    for at, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        likely = tops[at] if tops is not None else ()
        yield TokenScore(token, offsets.of(token), logprob, likely)
