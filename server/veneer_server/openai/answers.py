"""Converts generated output to OpenAI's objects: whole answers and stream chunks.

This module holds what both kinds share; `chat` and `completions` hold their own forms.
"""

from __future__ import annotations

import codecs
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from veneer_server.openai.extensions.answers import Additions, labels
from veneer_server.openai.fields import CommonFields
from veneer_server.openai.http.asgi import DATA_ONLY, Framing
from veneer_server.serving.generation import Delta, Generation
from veneer_server.text.detokenizer import Detokenizer
from veneer_server.text.replies.deltas import Delta as Part
from veneer_server.text.tokenizer import TextTokenizer

__all__ = ["Answer", "Choice", "Json", "Piece", "TokenScore"]

Json = dict[str, Any]
Tops = Sequence[tuple[int, float]]

_FRAGMENTS: Final = codecs.getincrementaldecoder("utf-8")
"""Leaves out a character that is not complete, where `bytes.decode` shows U+FFFD."""


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
        text = self._decoder.feed([token])
        # What its own bytes alone would show by now: the excess comes from earlier bytes that
        # never became a character.
        own = len(_FRAGMENTS(errors="replace").decode(data))
        at = self._at + max(0, len(text) - own)
        self._at += len(text)
        return at


@dataclass(slots=True)
class Choice:
    """The output of one choice so far.

    Attributes:
        offsets: those of its tokens, once it has any.
        started: whether a chunk has been made from it.
    """

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    tokens: list[TokenScore] = field(default_factory=list)
    finish: str | None = None
    offsets: Offsets | None = None
    started: bool = False


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
    """Builds the objects of one request. Pass in every piece, each choice's in order."""

    kind: str
    """Object type of a whole answer."""
    chunk_kind: str
    id_prefix: str
    framing: Framing = DATA_ONLY
    """Of its chunks."""

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
        self._additions = Additions(fields, tokenizer)
        self._label = labels(fields, tokenizer)
        self._logprobs = logprobs
        self._echo = echo
        self._n = fields.n
        self._options = fields.stream_options
        self._choices = [Choice() for _ in range(prompts * fields.n)]
        self._generations: dict[int, Generation] = {}
        self._echoed: dict[int, list[TokenScore]] = {}
        self._head: Final[Json] = {
            "id": f"{self.id_prefix}-{request_id}",
            "created": int(time.time()),
            "model": fields.model,
            "system_fingerprint": f"fp_{fingerprint[:12]}",
        }

    # ------------------------------------------------------------- a whole answer

    def add(self, piece: Piece) -> None:
        """Keep a piece for `whole`."""
        at, choice = self._choice(piece)
        self._additions.add(at, piece.prompt, piece.generation, piece.delta)
        choice.text.append(self._text(piece, choice))
        choice.reasoning.append(piece.delta.reasoning)
        choice.parts.extend(piece.delta.parts)
        if self._logprobs:
            choice.tokens.extend(self._tokens(piece, choice))
        choice.finish = piece.delta.finish
        choice.started = True

    def whole(self) -> Json:
        """The answer made of all added pieces."""
        choices = [
            self._whole_choice(at, "".join(choice.text), choice)
            for at, choice in enumerate(self._choices)
        ]
        return {
            **self._head,
            "object": self.kind,
            "choices": choices,
            "usage": self.usage(),
        }

    # ------------------------------------------------------------------- a stream

    def chunks(self, piece: Piece) -> list[Json]:
        """The chunks of a piece; none if it has nothing to show yet."""
        at, choice = self._choice(piece)
        text = self._text(piece, choice)
        tokens = list(self._tokens(piece, choice)) if self._logprobs else []
        shown = [
            self._chunk([one]) for one in self._choice_chunks(at, text, tokens, piece, choice)
        ]
        choice.started = True
        return shown

    def usage_chunk(self) -> Json | None:
        """The last chunk of a stream, if requested."""
        if not self._options.include_usage:
            return None
        return {**self._chunk([]), "usage": self.usage()}

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head, "object": self.chunk_kind, "choices": choices}
        if self._options.include_usage:
            continuous = self._options.continuous_usage_stats
            chunk["usage"] = self.usage() if continuous else None
        return chunk

    # ---------------------------------------------------------------------- both

    def usage(self) -> Json:
        """Token counts over all prompts and choices so far."""
        known = self._generations.values()
        prompt = sum(len(generation.prompt.ids) for generation in known)
        completion = sum(generation.completion_tokens for generation in known)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(generation.cached_tokens for generation in known)
            },
        }

    def _choice(self, piece: Piece) -> tuple[int, Choice]:
        self._generations[piece.prompt] = piece.generation
        at = piece.prompt * self._n + piece.delta.index
        return at, self._choices[at]

    def _text(self, piece: Piece, choice: Choice) -> str:
        if self._echo and not choice.started:
            return piece.generation.prompt.text + piece.delta.text
        return piece.delta.text

    def _tokens(self, piece: Piece, choice: Choice) -> Iterator[TokenScore]:
        delta, prompt = piece.delta, piece.generation.prompt
        if delta.prompt_logprobs is not None and self._echo:
            offsets = Offsets(self._tokenizer, prompt=prompt.text)
            self._echoed[piece.prompt] = [
                TokenScore(prompt.ids[0], offsets.of(prompt.ids[0]), None, ()),
                *_joined(
                    prompt.ids[1:], offsets, delta.prompt_logprobs, delta.prompt_top_logprobs
                ),
            ]
        if choice.offsets is None:
            # Computed once for all samples of a prompt; the first sample comes first.
            yield from self._echoed.get(piece.prompt, ())
            at = len(prompt.text) if self._echo else 0
            choice.offsets = Offsets(self._tokenizer, at=at)
        if delta.logprobs is not None:
            yield from _joined(delta.tokens, choice.offsets, delta.logprobs, delta.top_logprobs)

    @abstractmethod
    def _whole_choice(self, at: int, text: str, choice: Choice) -> Json:
        """One entry of a whole answer's ``choices``."""

    @abstractmethod
    def _choice_chunks(
        self, at: int, text: str, tokens: list[TokenScore], piece: Piece, choice: Choice
    ) -> Iterator[Json]:
        """Entries of ``choices``, each for a separate chunk."""


def _joined(
    ids: Sequence[int],
    offsets: Offsets,
    logprobs: Sequence[float],
    tops: Sequence[Tops] | None,
) -> Iterator[TokenScore]:
    for at, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        likely = tops[at] if tops is not None else ()
        yield TokenScore(token, offsets.of(token), logprob, likely)
