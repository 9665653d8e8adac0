"""Sampling: from logits to tokens, for all rows of a step at once.

The order of operations is the usual one:

1. logit bias, added
2. repetition penalty, on tokens in prompt or output (Keskar et al. 2019; as in
   transformers: a positive logit is divided by it, a negative one multiplied)
3. presence and frequency penalties, on tokens in the output (as OpenAI defines them)
4. the constraint's mask, and the tokens that are forbidden because they would end the output
   too early
5. temperature; 0 takes the likeliest token here, and skips the steps below
6. top-k, then top-p over the tokens left, then min-p: each keeps the likeliest tokens
7. one sample, with a random number from the request's seed and the token's position

A token is a function of its own row, settings and position: nothing is shared between
rows, so it does not depend on the rest of the batch (unless the logits do). A batch that
only decodes greedily costs one argmax.

The last three steps are `Draws`: in torch here, or by the native backend (``native/draws.py``).

Log-probabilities are those of the model's own logits, before all of these steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_server.step.choice import Draws, TokenChoice, uniform
from veneer_server.step.token_counts import Seen
from veneer_server.wire.messages import SamplingParams, Tops

__all__ = [
    "TorchDraws",
    "sample",
    "token_logprobs",
    "token_ranks",
    "top_tokens",
    "uniform",
]

_HEAD = 512
"""How many of the likeliest tokens top-k, top-p and min-p look at first; sorting a whole
vocabulary takes milliseconds per row and is almost never needed. The number is the same for
all rows: if it depended on the batch, so could the order of ties."""

_TOPS = 20
"""Most tokens that `top_tokens` returns per row; it always finds this many, for the same
reason."""

_COLDEST = 1e-5
"""Lower temperatures are greedy: dividing by them would overflow."""

_LOWEST = -torch.inf

_NOTHING = -1
"""Stands for a missing token where the row's probabilities are NaN."""


def sample(
    logits: torch.Tensor, choices: Sequence[TokenChoice], draws: Draws | None = None
) -> list[int | None]:
    """Sample one token per row; None for a row with nothing to sample from, which no validated
    request can cause.

    Args:
        logits: [rows, vocab] float32, finite; not changed.
        choices: one per row.
        draws: samples the tokens; `TorchDraws` if None.
    """
    draws = draws or TorchDraws()
    changed = [i for i, choice in enumerate(choices) if _changes(choice)]
    if not changed:
        return draws.tokens(logits, choices)
    those = [choices[i] for i in changed]
    adjusted = penalized(logits[torch.tensor(changed, device=logits.device)], those)
    if len(changed) == len(choices):
        return draws.tokens(adjusted, those)
    # One call for all rows; the changed ones are replaced below. Such mixed batches are rare.
    tokens = draws.tokens(logits, choices)
    for i, token in zip(changed, draws.tokens(adjusted, those), strict=True):
        tokens[i] = token
    return tokens


class TorchDraws:
    """`Draws` in torch, on any device."""

    def tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice]) -> list[int | None]:
        chosen = logits.argmax(dim=-1)
        drawn = [i for i, c in enumerate(choices) if c.params.temperature >= _COLDEST]
        if drawn:
            rows = torch.tensor(drawn, device=logits.device)
            chosen[rows] = draw(logits[rows], [choices[i] for i in drawn])
        return [None if token == _NOTHING else token for token in chosen.tolist()]

    def log_sums(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(logits, dim=-1)


# ------------------------------------------------------------------- adjustments


def _changes(choice: TokenChoice) -> bool:
    params = choice.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or choice.allowed is not None
        or choice.forbidden
    )


def penalized(logits: torch.Tensor, choices: Sequence[TokenChoice]) -> torch.Tensor:
    """Apply bias, penalties and masks, in place."""
    biased = [i for i, c in enumerate(choices) if c.params.logit_bias]
    repeated = [i for i, c in enumerate(choices) if c.params.repetition_penalty != 1.0]
    counted = [
        i
        for i, c in enumerate(choices)
        if c.params.presence_penalty or c.params.frequency_penalty
    ]
    masks = {i: c.allowed for i, c in enumerate(choices) if c.allowed is not None}
    if biased:
        _add_bias(logits, biased, choices)
    if repeated:
        _penalise_repetition(logits, repeated, choices)
    if counted:
        _penalise_output(logits, counted, choices)
    # Sums and products may have overflowed, and infinity minus infinity is NaN.
    logits.nan_to_num_()
    if masks:
        allowed = torch.from_numpy(np.stack(list(masks.values())))
        rows = torch.tensor(list(masks), device=logits.device)
        logits[rows] = logits[rows].masked_fill(~allowed.to(logits.device), _LOWEST)
    vocab = logits.shape[1]
    forbidden = [(i, t) for i, c in enumerate(choices) for t in c.forbidden if t < vocab]
    if forbidden:
        row, token = torch.tensor(forbidden, device=logits.device).unbind(dim=1)
        logits[row, token] = _LOWEST
    return logits


def _add_bias(logits: torch.Tensor, rows: list[int], choices: Sequence[TokenChoice]) -> None:
    places = [(i, token) for i in rows for token in choices[i].params.logit_bias]
    values = [bias for i in rows for bias in choices[i].params.logit_bias.values()]
    row, token = torch.tensor(places, device=logits.device).unbind(dim=1)
    logits[row, token] += logits.new_tensor(values)


def _penalise_repetition(
    logits: torch.Tensor, rows: list[int], choices: Sequence[TokenChoice]
) -> None:
    row, place = _places(logits, rows, [_seen(choices[i]).ids for i in rows])
    penalty = _column(logits, choices, "repetition_penalty")[row]
    values = logits.view(-1).index_select(0, place)
    values = torch.where(values > 0, values / penalty, values * penalty)
    logits.view(-1).index_copy_(0, place, values)


def _penalise_output(
    logits: torch.Tensor, rows: list[int], choices: Sequence[TokenChoice]
) -> None:
    seen = [_seen(choices[i]) for i in rows]
    row, place = _places(logits, rows, [s.ids[s.counts > 0] for s in seen])
    counts = np.concatenate([s.counts[s.counts > 0] for s in seen])
    count = torch.from_numpy(counts).to(logits.device, logits.dtype)
    presence = _column(logits, choices, "presence_penalty")[row]
    frequency = _column(logits, choices, "frequency_penalty")[row]
    values = logits.view(-1).index_select(0, place) - (presence + frequency * count)
    logits.view(-1).index_copy_(0, place, values)


def _seen(choice: TokenChoice) -> Seen:
    assert choice.token_counts is not None, "penalties without token counts"
    return choice.token_counts


def _places(
    logits: torch.Tensor, rows: list[int], ids: Sequence[NDArray[np.int64]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row of each token id, and its index in the flattened logits. With one flat
    index, reads and writes take a third of the time that they take with two indices."""
    owner = torch.from_numpy(np.repeat(np.array(rows), [len(i) for i in ids]))
    token = torch.from_numpy(np.concatenate(ids))
    place = owner * logits.shape[1] + token
    return owner.to(logits.device), place.to(logits.device)


def _column(logits: torch.Tensor, choices: Sequence[TokenChoice], name: str) -> torch.Tensor:
    """Return the values of one sampling setting, [rows]."""
    return logits.new_tensor([getattr(c.params, name) for c in choices])


# -------------------------------------------------------------------------- draw


def draw(logits: torch.Tensor, choices: Sequence[TokenChoice]) -> torch.Tensor:
    """Sample a token per row from those that top-k, top-p and min-p leave, by inverse transform
    sampling: [rows] int64."""
    # Relative to the maximum, so that huge logits at a low temperature can only overflow to
    # minus infinity.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    temperature = _column(logits, choices, "temperature").unsqueeze(1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    randoms = torch.tensor(
        [uniform(c.params.seed, c.position) for c in choices],
        dtype=torch.float64,
        device=logits.device,
    )
    cut = torch.tensor([_cuts(c.params) for c in choices], device=logits.device)
    tokens = torch.empty(len(choices), dtype=torch.int64, device=logits.device)
    whole = ~cut
    if whole.any():
        tokens[whole] = _pick(probabilities[whole].double(), randoms[whole])
    if cut.any():
        kept = [c.params for c in choices if _cuts(c.params)]
        tokens[cut] = _pick_cut(probabilities[cut], randoms[cut], kept)
    # If one element of a row is NaN, all are.
    return tokens.masked_fill(probabilities[:, 0].isnan(), _NOTHING)


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _pick_cut(
    probabilities: torch.Tensor, randoms: torch.Tensor, params: Sequence[SamplingParams]
) -> torch.Tensor:
    """Sample from the likeliest tokens; sorts the whole vocabulary only if it must."""
    vocab = probabilities.shape[-1]
    values, tokens = _in_order(*probabilities.topk(min(vocab, _HEAD)))
    weights = _kept(values, params)
    picked = tokens.gather(1, _pick(weights, randoms).unsqueeze(1)).squeeze(1)
    if vocab <= _HEAD:
        return picked
    # The head suffices if the kept tokens end before it does, and not among ties with its
    # last token, since it is arbitrary which of these the head holds. It does not suffice for
    # a larger top-k, whose total probability it does not show.
    short = ((weights > 0) & (values <= values[:, -1:])).any(dim=-1)
    short |= torch.tensor([p.top_k > _HEAD for p in params], device=values.device)
    if short.any():
        rest = [p for p, needed in zip(params, short.tolist(), strict=True) if needed]
        values, tokens = probabilities[short].sort(dim=-1, descending=True, stable=True)
        index = _pick(_kept(values, rest), randoms[short])
        picked[short] = tokens.gather(1, index.unsqueeze(1)).squeeze(1)
    return picked


def _in_order(values: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort likeliest first, and ties by lower id, as a stable sort of all tokens would."""
    tokens, order = tokens.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(-1, order)


def _kept(values: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Return the probabilities that top-k, top-p and min-p leave, with the others set to 0.

    Args:
        values: [rows, n] probabilities, likeliest first.

    Returns:
        [rows, n] float64; not renormalised.
    """
    rank = torch.arange(values.shape[1], device=values.device)
    top_k = torch.tensor([p.top_k or 1 << 62 for p in params], device=values.device)
    top_p = values.new_tensor([p.top_p for p in params], dtype=torch.float64)
    min_p = values.new_tensor([p.min_p for p in params]).unsqueeze(1)
    weights = values.double().masked_fill(rank >= top_k.unsqueeze(1), 0)
    # top-p is a fraction of the total that top-k left; without top-k, of 1.
    total = torch.where(top_k > values.shape[1], 1.0, weights.sum(dim=-1))
    before = weights.cumsum(dim=-1) - weights
    # A top_p of 1 keeps all, whatever the sums round to.
    spent = (before >= (top_p * total).unsqueeze(1)) & (top_p < 1).unsqueeze(1)
    # The likeliest token stays, even if a tiny top_p times the total rounds to 0.
    left = (spent | (values < min_p * values[:, :1])) & (rank > 0)
    return weights.masked_fill(left, 0)


def _pick(weights: torch.Tensor, randoms: torch.Tensor) -> torch.Tensor:
    """Return the index of the first cumulative sum above the random fraction of the total,
    [rows].

    Weights are float64, so that rare tokens keep their share, and need not sum to 1.
    """
    sums = weights.cumsum(dim=-1)
    # A random number is at most 1 - 2^-53, and that fraction of a float64 rounds to less
    # than the total, so the search ends at a token with a nonzero weight.
    target = sums[:, -1] * randoms
    found = torch.searchsorted(sums, target.unsqueeze(1), right=True).squeeze(1)
    # Past the end only if the sums are NaN: `draw` reports that, so this must not fail.
    return found.clamp_(max=weights.shape[1] - 1)


# ------------------------------------------------------------- log-probabilities


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, sums: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the tokens' raw log-probabilities, as natural logarithms.

    Args:
        logits: [rows, vocab] float32.
        tokens: [rows] int64.
        sums: `Draws.log_sums` of the logits; computed if None.

    Returns:
        [rows] float32.
    """
    picked = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return picked - (TorchDraws().log_sums(logits) if sums is None else sums)


def token_ranks(logits: torch.Tensor, tokens: torch.Tensor) -> list[int]:
    """Return how many tokens of each row have at least the given token's logit: 1 for the
    likeliest. vLLM counts ranks in the same way.

    Args:
        logits: [rows, vocab] float32.
        tokens: [rows] int64.
    """
    picked = logits.gather(1, tokens.unsqueeze(1))
    if logits.device.type != "cpu":
        return (logits >= picked).sum(dim=1).tolist()
    # One row at a time with numpy, which takes a tenth of the time that torch takes.
    rows, values = logits.numpy(), picked.squeeze(1).numpy()
    return [
        int(np.count_nonzero(row >= value)) for row, value in zip(rows, values, strict=True)
    ]


def top_tokens(
    logits: torch.Tensor, counts: Sequence[int], sums: torch.Tensor | None = None
) -> list[Tops]:
    """Return the most likely tokens of each row with their raw log-probabilities.

    Args:
        logits: [rows, vocab] float32.
        counts: how many to return for each row, at most 20.
        sums: `Draws.log_sums` of the logits; computed if None.
    """
    values, tokens = logits.topk(min(logits.shape[1], _TOPS))
    values, tokens = _in_order(values, tokens)
    values = values - (TorchDraws().log_sums(logits) if sums is None else sums).unsqueeze(1)
    return [
        list(zip(ids[:count], logprobs[:count], strict=True))
        for ids, logprobs, count in zip(tokens.tolist(), values.tolist(), counts, strict=True)
    ]
