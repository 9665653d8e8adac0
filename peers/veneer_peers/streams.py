"""The prompts of the gate: one for each adapter, from one seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Stream", "make_streams"]


@dataclass(frozen=True, slots=True)
class Stream:
    """One request: its adapter and the prompt's token ids."""

    adapter: str
    prompt: tuple[int, ...]


def make_streams(
    adapters: tuple[str, ...],
    *,
    count: int,
    prompt_tokens: tuple[int, int],
    vocab: int,
    seed: int,
) -> tuple[Stream, ...]:
    """``count`` requests; request i uses adapter i modulo the number of adapters.

    Prompt lengths are spread evenly over ``prompt_tokens`` (both ends included)
    and shuffled; the ids are random ordinary tokens, so that no two prompts
    share a prefix.
    """
    rng = np.random.default_rng(seed)
    low, high = prompt_tokens
    lengths = rng.permutation(np.linspace(low, high, count).round().astype(int))
    # The first few hundred ids of most vocabularies are control and byte tokens.
    first = min(1000, vocab // 2)
    return tuple(
        Stream(
            adapter=adapters[i % len(adapters)],
            prompt=tuple(int(t) for t in rng.integers(first, vocab, int(length))),
        )
        for i, length in enumerate(lengths)
    )
