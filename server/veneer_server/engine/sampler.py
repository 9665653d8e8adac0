"""From logits to tokens: greedy, temperature, top-k, top-p, seeded.

A token's random number is a function of the request's seed and the token's
position (Philox, counter mode), so it does not depend on what shares the batch
or on how often a sequence was preempted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from veneer_server.engine.messages import SamplingParams

__all__ = ["sample", "token_logprobs", "uniform"]

_HEAD = 512
"""Most likely tokens looked at first for top-k and top-p; sorting a whole
vocabulary takes milliseconds a row and is nearly never needed."""


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) for a position of a request."""
    stream = np.random.Philox(key=seed & (2**64 - 1), counter=position)
    return float(np.random.Generator(stream).random())


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """One token a row.

    Args:
        logits: [rows, vocab] float32, finite.
        params, positions: one a row; ``positions`` is the new token's index.
    """
    chosen = logits.argmax(dim=-1).tolist()
    for row, (wanted, position) in enumerate(zip(params, positions, strict=True)):
        if wanted.temperature > 0:
            chosen[row] = _draw(logits[row], wanted, uniform(wanted.seed, position))
    return [int(token) for token in chosen]


def _draw(logits: torch.Tensor, params: SamplingParams, u: float) -> int:
    """Inverse transform over the tokens that top-k and top-p leave."""
    probabilities = torch.softmax(logits / params.temperature, dim=-1)
    if params.top_k == 0 and params.top_p >= 1:
        return _pick(probabilities, u)
    vocab = probabilities.shape[-1]
    keep = params.top_k or vocab
    head = min(vocab, _HEAD if params.top_k == 0 else keep)
    values, tokens = probabilities.topk(head)
    if head < keep and float(values.sum()) < params.top_p:
        values, tokens = probabilities.sort(descending=True)
    # top-p applies to what top-k left, renormalised.
    total = values.sum() if params.top_k else 1.0
    before = values.cumsum(0) - values
    values = values[before < params.top_p * total]
    return int(tokens[_pick(values, u)])


def _pick(weights: torch.Tensor, u: float) -> int:
    """Index of the first running sum above u times the whole; weights need not
    sum to 1. Summed in float64, so that rare tokens keep their share."""
    sums = weights.double().cumsum(0)
    index = int(torch.searchsorted(sums, sums[-1] * u, right=True))
    return min(index, weights.shape[0] - 1)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Raw log-probabilities, natural logarithm.

    Args:
        logits: [rows, vocab] float32.
        tokens: [rows] int64.

    Returns:
        [rows] float32.
    """
    picked = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return picked - torch.logsumexp(logits, dim=-1)
