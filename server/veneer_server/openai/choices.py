"""Answers made of ``choices``: the code that chats and completions share.

`chat` and `completions` add what is specific to each.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from veneer_server.openai.extensions import Additions, labels
from veneer_server.openai.fields import CommonFields
from veneer_server.openai.http.asgi import DATA_ONLY, Framing
from veneer_server.serving.generation import Generation
from veneer_server.serving.samples import Delta
from veneer_server.text.detokenizer import Detokenizer
from veneer_server.text.replies import ReplyPart as Part
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import PackedTops, unpack_tops

# -------------------- answers
# Building blocks of every API's answers: pieces of output, counts and scores.

SCORES_AT_ONCE: Final = 8
"""Positions whose log-probabilities are encoded in one go. With 20 top tokens each, this takes
a fraction of a millisecond."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """New output of one choice.

    Attributes:
        prompt: index of the prompt within the request.
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
        # The token's first byte completes the last of these characters, or starts a new one.
        first = (self._decoder.held + data[:1]).decode(errors="replace")
        at = self._at + len(first) - 1
        self._at += len(self._decoder.feed([token]))
        return at


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A generated token with its log-probability.

    Attributes:
        packed: the top tokens at its position; packed, they take a tenth of the memory.
    """

    id: int
    logprob: float
    packed: PackedTops

    @property
    def tops(self) -> Iterator[tuple[int, float]]:
        """The top tokens at its position: id and log-probability of each."""
        return unpack_tops(self.packed)


def scores_of(delta: Delta) -> list[TokenScore]:
    """The new tokens with their log-probabilities; empty if these were not requested."""
    if delta.logprobs is None:
        return []
    tops = delta.top_logprobs or [b""] * len(delta.tokens)
    return [
        TokenScore(token, logprob, packed)
        for token, logprob, packed in zip(delta.tokens, delta.logprobs, tops, strict=True)
    ]


class Answer(ABC):
    """Builds the answer to one request. Pass in every piece, in order within each choice:
    either all to `add`, or all to `chunks`."""

    framing: Framing = DATA_ONLY
    """How a stream frames the chunks."""

    @abstractmethod
    def add(self, piece: Piece) -> None:
        """Keep a piece for `whole`."""

    @abstractmethod
    def whole(self) -> Json:
        """The complete answer, made of all added pieces."""

    @abstractmethod
    def chunks(self, piece: Piece) -> list[Json]:
        """The chunks to stream for a piece; empty if there is nothing to show yet."""

    @abstractmethod
    def last_chunk(self) -> Json | None:
        """The chunk to stream after the last piece, if any."""


@dataclass(frozen=True, slots=True)
class AnswerCounts:
    """Token counts of a request.

    Attributes:
        cached: prompt tokens that were in the prefix cache.
        reasoning: completion tokens spent on reasoning.
        accepted: completion tokens that speculation had drafted.
        rejected: tokens that it had drafted in vain.
    """

    prompt: int
    completion: int
    cached: int
    reasoning: int
    accepted: int
    rejected: int

    @property
    def predictions(self) -> Json:
        """What became of drafts, under OpenAI's names; empty if there were none."""
        if not (self.accepted or self.rejected):
            return {}
        return {
            "accepted_prediction_tokens": self.accepted,
            "rejected_prediction_tokens": self.rejected,
        }


class Tally:
    """Counts the tokens of all prompts and choices so far."""

    def __init__(self) -> None:
        self._generations: dict[int, Generation] = {}

    def take(self, piece: Piece) -> None:
        """Count a piece."""
        self._generations[piece.prompt] = piece.generation

    @property
    def counts(self) -> AnswerCounts:
        known = self._generations.values()
        return AnswerCounts(
            sum(len(generation.prompt.ids) for generation in known),
            sum(generation.completion_tokens for generation in known),
            sum(generation.cached_tokens for generation in known),
            sum(generation.reasoning_tokens for generation in known),
            sum(generation.accepted_tokens for generation in known),
            sum(generation.rejected_tokens for generation in known),
        )


@dataclass(slots=True)
class Choice:
    """The output of one choice so far.

    Attributes:
        started: whether its first piece has been processed.
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
    """Object type of a complete answer."""
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
        details = counts.predictions
        return {
            "prompt_tokens": counts.prompt,
            "completion_tokens": counts.completion,
            "total_tokens": counts.prompt + counts.completion,
            "prompt_tokens_details": {"cached_tokens": counts.cached},
            **({"completion_tokens_details": details} if details else {}),
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
        """One entry of a complete answer's ``choices``."""

    @abstractmethod
    def _choice_chunks(
        self, at: int, text: str, tokens: list[TokenScore], piece: Piece, choice: Choice
    ) -> Iterator[Json]:
        """Entries of ``choices``, each for a separate chunk."""
