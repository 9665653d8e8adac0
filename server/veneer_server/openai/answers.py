"""What the core generated, as OpenAI's objects: whole answers and chunks of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from veneer_server.openai.fields import CommonFields
from veneer_server.rpc.generation import Delta, Generation
from veneer_server.text.tokenizer import TextTokenizer

__all__ = ["Answer", "ChatAnswer", "CompletionAnswer", "Piece"]

Json = dict[str, Any]
Tops = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Piece:
    """What came for one choice.

    Attributes:
        prompt: which of the request's prompts.
    """

    prompt: int
    generation: Generation
    delta: Delta


@dataclass(slots=True)
class _Choice:
    """What one choice has given so far.

    Attributes:
        offset: characters of all tokens so far, for `text_offset`.
        started: a chunk was made of it.
    """

    text: list[str] = field(default_factory=list)
    tokens: list[_Token] = field(default_factory=list)
    finish: str | None = None
    offset: int = 0
    started: bool = False


@dataclass(frozen=True, slots=True)
class _Token:
    """One token with its log-probability; the first of a prompt has none."""

    id: int
    logprob: float | None
    tops: Tops


class Answer(ABC):
    """Builds the objects of one request. Feed it every piece, in order of a choice."""

    kind: str
    """Of the whole answer."""
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
        prompts: how many the request holds.
        fingerprint: of the base model's weights.
        """
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._echo = echo
        self._n = fields.n
        self._options = fields.stream_options
        self._choices = [_Choice() for _ in range(prompts * fields.n)]
        self._generations: dict[int, Generation] = {}
        self._echoed: dict[int, list[_Token]] = {}
        self._head: Final[Json] = {
            "id": f"{self.id_prefix}-{request_id}",
            "created": int(time.time()),
            "model": fields.model,
            "system_fingerprint": f"fp_{fingerprint[:12]}",
        }

    # ------------------------------------------------------------- a whole answer

    def add(self, piece: Piece) -> None:
        """Keep a piece for `whole`."""
        _, choice = self._choice(piece)
        choice.text.append(self._text(piece, choice))
        if self._logprobs:
            choice.tokens.extend(self._tokens(piece, choice))
        choice.finish = piece.delta.finish
        choice.started = True

    def whole(self) -> Json:
        """All that was added."""
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
        """The chunks of a piece; none where it holds nothing to show yet."""
        at, choice = self._choice(piece)
        text = self._text(piece, choice)
        tokens = list(self._tokens(piece, choice)) if self._logprobs else []
        shown = [
            self._chunk([one]) for one in self._choice_chunks(at, text, tokens, piece, choice)
        ]
        choice.started = True
        return shown

    def usage_chunk(self) -> Json | None:
        """The last chunk of a stream, if it was asked for."""
        if not self._options.include_usage:
            return None
        return {**self._chunk([]), "usage": self.usage()}

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head, "object": self.chunk_kind, "choices": choices}
        if self._options.include_usage:
            continuous = self._options.continuous_usage_stats
            chunk["usage"] = self.usage() if continuous else None
        return chunk

    # ------------------------------------------------------------------- of both

    def usage(self) -> Json:
        """Tokens of all prompts and choices so far."""
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

    def _choice(self, piece: Piece) -> tuple[int, _Choice]:
        self._generations[piece.prompt] = piece.generation
        at = piece.prompt * self._n + piece.delta.index
        return at, self._choices[at]

    def _text(self, piece: Piece, choice: _Choice) -> str:
        if self._echo and not choice.started:
            return piece.generation.prompt.text + piece.delta.text
        return piece.delta.text

    def _tokens(self, piece: Piece, choice: _Choice) -> Iterator[_Token]:
        delta = piece.delta
        if delta.prompt_logprobs is not None:
            ids = piece.generation.prompt.ids
            self._echoed[piece.prompt] = [
                _Token(ids[0], None, ()),
                *_joined(ids[1:], delta.prompt_logprobs, delta.prompt_top_logprobs),
            ]
        if not choice.started:
            # Computed once for all samples of a prompt; the first sample comes first.
            yield from self._echoed.get(piece.prompt, ())
        if delta.logprobs is not None:
            yield from _joined(delta.tokens, delta.logprobs, delta.top_logprobs)

    def _name(self, token: int) -> str:
        """A token's text; the vocabulary's own name for one that has none."""
        data = self._tokenizer.token_bytes(token)
        return data.decode(errors="replace") if data else self._tokenizer.token_name(token)

    @abstractmethod
    def _whole_choice(self, at: int, text: str, choice: _Choice) -> Json:
        """One entry of a whole answer's ``choices``."""

    @abstractmethod
    def _choice_chunks(
        self, at: int, text: str, tokens: list[_Token], piece: Piece, choice: _Choice
    ) -> Iterator[Json]:
        """Entries of ``choices``, each for a chunk of its own."""


def _joined(
    ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[Tops] | None
) -> Iterator[_Token]:
    for at, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        yield _Token(token, logprob, tops[at] if tops is not None else ())


class ChatAnswer(Answer):
    """``chat.completion`` and its chunks."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def _whole_choice(self, at: int, text: str, choice: _Choice) -> Json:
        return {
            "index": at,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprob_object(choice.tokens),
            "finish_reason": choice.finish,
        }

    def _choice_chunks(
        self, at: int, text: str, tokens: list[_Token], piece: Piece, choice: _Choice
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

    def _logprob_object(self, tokens: Sequence[_Token]) -> Json | None:
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
            "token": self._name(token),
            "logprob": logprob,
            "bytes": list(data) if data else None,
        }


class CompletionAnswer(Answer):
    """``text_completion``; its chunks have the same form."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def _whole_choice(self, at: int, text: str, choice: _Choice) -> Json:
        return {
            "index": at,
            "text": text,
            "logprobs": self._logprob_object(choice.tokens, choice),
            "finish_reason": choice.finish,
        }

    def _choice_chunks(
        self, at: int, text: str, tokens: list[_Token], piece: Piece, choice: _Choice
    ) -> Iterator[Json]:
        finish = piece.delta.finish
        if text or tokens or finish is not None:
            yield {
                "index": at,
                "text": text,
                "logprobs": self._logprob_object(tokens, choice),
                "finish_reason": finish,
            }

    def _logprob_object(self, tokens: Sequence[_Token], choice: _Choice) -> Json | None:
        if not self._logprobs:
            return None
        names = [self._name(token.id) for token in tokens]
        offsets = []
        for token, name in zip(tokens, names, strict=True):
            offsets.append(choice.offset)
            if self._tokenizer.token_bytes(token.id):
                choice.offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top_object(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top_object(self, token: _Token) -> Json | None:
        """Text to log-probability. The chosen token is in it, likely or not; of two
        tokens with the same text the likelier one stays."""
        if token.logprob is None:
            return None
        tops: Json = {}
        for other, logprob in (*token.tops, (token.id, token.logprob)):
            tops.setdefault(self._name(other), logprob)
        return tops
