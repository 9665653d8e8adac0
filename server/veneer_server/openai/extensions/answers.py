"""vLLM's additions to answers: token ids, and the prompt's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from veneer_server.openai.extensions.fields import SharedExtensions
from veneer_server.openai.http.long_json import Many
from veneer_server.serving.generation import Delta, Generation
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import PackedTops, unpack_tops

__all__ = ["Additions", "labels"]

Json = dict[str, Any]


def labels(fields: SharedExtensions, tokenizer: TextTokenizer) -> Callable[[int], str]:
    """What tokens are called in log-probabilities."""
    if fields.return_tokens_as_token_ids:
        return "token_id:{}".format
    return tokenizer.token_label


class Additions:
    """What a request asked for besides OpenAI's answer. Nothing, for most: all of its objects
    are then empty."""

    def __init__(
        self, fields: SharedExtensions, tokenizer: TextTokenizer, *, several: bool
    ) -> None:
        """Args: several: choices have what belongs to a prompt."""
        self.token_ids = fields.return_token_ids
        self._prompt_tops = fields.prompt_logprobs
        self._label = tokenizer.token_label
        self._several = several
        self._ids: dict[int, list[int]] = {}
        self._prompts: dict[int, Json] = {}

    def add(self, at: int, prompt: int, generation: Generation, delta: Delta) -> None:
        """Keep what a delta of choice ``at`` has for them."""
        if self.token_ids:
            self._ids.setdefault(at, []).extend(delta.tokens)
            self._of(prompt).setdefault("prompt_token_ids", _ids(generation.prompt.ids))
        if self._prompt_tops is not None and delta.prompt_logprobs is not None:
            assert delta.prompt_ranks is not None, "asked for with prompt_logprobs"
            each = (
                generation.prompt.ids[1:],
                delta.prompt_logprobs,
                delta.prompt_top_logprobs or [b""] * len(delta.prompt_logprobs),
                delta.prompt_ranks,
            )
            # As vLLM has it: each of a completion's choices has them. Their JSON is made once.
            self._of(prompt)["prompt_logprobs"] = Many(
                len(generation.prompt.ids),
                lambda: chain((None,), map(self._scores, *each)),
                at_once=4,
                keep=self._several,
            )

    def of_prompt(self, prompt: int) -> Json:
        """What belongs to a prompt, in a whole answer."""
        return self._prompts.get(prompt, {})

    def of_choice(self, at: int) -> Json:
        """What belongs to a choice, in a whole answer."""
        return {"token_ids": _ids(self._ids.get(at, []))} if self.token_ids else {}

    def of_start(self, generation: Generation) -> Json:
        """What belongs to a prompt, in a choice's first chunk."""
        return {"prompt_token_ids": _ids(generation.prompt.ids)} if self.token_ids else {}

    def of_delta(self, delta: Delta) -> Json:
        """What belongs to a choice, in a chunk with the delta's tokens."""
        return {"token_ids": _ids(delta.tokens)} if self.token_ids else {}

    def _of(self, prompt: int) -> Json:
        return self._prompts.setdefault(prompt, {})

    def _scores(self, token: int, logprob: float, packed: PackedTops, rank: int) -> Json:
        """By token id: the prompt's own token first. Where it is among the most likely ones,
        its rank is its place there, so that no two entries have the same."""
        tops = list(unpack_tops(packed))
        ranks = {token: rank} | {other: place for place, (other, _) in enumerate(tops, 1)}
        return {
            str(other): {
                "logprob": score,
                "rank": ranks[other],
                "decoded_token": self._label(other),
            }
            for other, score in ((token, logprob), *(top for top in tops if top[0] != token))
        }


def _ids(ids: Sequence[int]) -> Many:
    return Many(len(ids), lambda: ids)
