"""Samples one token per row by temperature, top-k, top-p and min-p, as the CPU sampler does.

Bias, penalties and masks are in the logits already. Sampling is by inverse transform: tokens
are put in order, and the first one whose cumulative probability exceeds a random share of the
total is taken. Without top-k, top-p and min-p the order is the vocabulary's. With any of them
it is by falling probability, equal ones by rising id.

Nothing is sorted. Probabilities are ordered like their bits read as integers, so bisection can
find what a sort would: the value at which the sum of all probabilities that are no smaller
passes a bound, then a place among the tokens with this value. A bisection reads a row of logits
about 30 times, from cache. Top-k, top-p and the final sampling take one bisection each.

Layouts:
    logits     [rows, vocab] float32; row stride given; finite, or minus infinity
    settings   [rows, 2] float32: temperature (below `COLDEST`: greedy), min_p (0: off)
    top_k      [rows] int32, 0: off
    shares     [rows, 2] float64: top_p (1: off), the random number in [0, 1)
    tokens     [rows] int64; -1: the row has no probabilities (NaN)

Grid: (rows,). One program reads a whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl

from veneer_server.step.choice import TokenChoice, uniform
from veneer_server.wire.messages import SamplingParams

COLDEST: Final = 1e-5
"""Lower temperatures mean greedy sampling: dividing by them would overflow."""

_MOST: Final = (1 << 31) - 1
"""Largest top_k that the kernel takes: more tokens than any vocabulary has."""
_TAKEN: Final = frozenset({"temperature", "min_p", "top_k", "top_p", "seed"})
"""Options that `given` passes on."""
_IN_LOGITS: Final = frozenset(
    {"repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"}
)
"""Options that have already been applied to the logits."""
assert {*_TAKEN, *_IN_LOGITS} == {*SamplingParams.__struct_fields__}, (
    "an option that the kernel does not have would be ignored"
)


@triton.jit
def probabilities(row, token, known, peak, temperature, total):
    """Return the tokens' probabilities, [BLOCK] float32, 0 where not ``known``. They must
    always be computed in the same way, since their bits are compared."""
    logits = tl.load(row + token, mask=known, other=float("-inf"))
    return tl.exp((logits - peak) / temperature) / total


@triton.jit
def above(row, vocab, peak, temperature, total, least, BLOCK: tl.constexpr):
    """Return the sum (float64) and the number of the probabilities whose bits are at least
    ``least``."""
    sums = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        each = probabilities(row, token, token < vocab, peak, temperature, total)
        chosen = (each.to(tl.int32, bitcast=True) >= least) & (token < vocab)
        sums += tl.where(chosen, each, 0.0).to(tl.float64)
        counts += chosen.to(tl.int32)
    return tl.sum(sums, axis=0), tl.sum(counts, axis=0)


@triton.jit
def draw_rows(
    logits,
    settings,
    top_k,
    shares,
    tokens,
    stride,
    vocab,
    COLDEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
    temperature = tl.load(settings + number * 2)
    min_p = tl.load(settings + number * 2 + 1)
    k = tl.load(top_k + number)
    top_p = tl.load(shares + number * 2)
    random = tl.load(shares + number * 2 + 1)

    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    places = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        each = tl.load(row + token, mask=token < vocab, other=float("-inf"))
        places = tl.where(each > peaks, token, places)
        peaks = tl.maximum(peaks, each)
    peak = tl.max(peaks, axis=0)
    if temperature < COLDEST:
        likeliest = tl.min(tl.where(peaks == peak, places, vocab), axis=0)
        tl.store(tokens + number, tl.minimum(likeliest, vocab - 1).to(tl.int64))
        return

    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        sums += probabilities(row, token, token < vocab, peak, temperature, 1.0)
    total = tl.sum(sums, axis=0)
    if total != total:
        tl.store(tokens + number, -1 + tl.zeros((), tl.int64))
        return

    if (k == 0) & (top_p >= 1) & (min_p == 0):
        mass, _number = above(row, vocab, peak, temperature, total, 0, BLOCK)
        bound = mass * random
        before = mass * 0
        passed = vocab * 0
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            each = probabilities(row, token, token < vocab, peak, temperature, total).to(
                tl.float64
            )
            low = (before + tl.cumsum(each, axis=0) <= bound) & (token < vocab)
            passed += tl.sum(low.to(tl.int32), axis=0)
            before += tl.sum(each, axis=0)
        tl.store(tokens + number, tl.minimum(passed, vocab - 1).to(tl.int64))
        return

    # The likeliest token's probability; its bits are the highest.
    highest = 1.0 / total
    top = highest.to(tl.int32, bitcast=True)
    # Tokens are kept whose bits are above `cut`, and the first `ties` whose bits are `cut`.
    cut = top * 0
    ties = vocab
    mass = tl.full((), 1.0, tl.float64)
    if (k > 0) & (k < vocab):
        over = top + 1
        while over - cut > 1:
            middle = cut + (over - cut) // 2
            _rest, count = above(row, vocab, peak, temperature, total, middle, BLOCK)
            cut = tl.where(count >= k, middle, cut)
            over = tl.where(count >= k, over, middle)
        mass, count = above(row, vocab, peak, temperature, total, cut + 1, BLOCK)
        ties = k - count
        mass += ties * cut.to(tl.float32, bitcast=True).to(tl.float64)
    elif k >= vocab:
        mass, _number = above(row, vocab, peak, temperature, total, 0, BLOCK)
    if top_p < 1:
        # A token is kept if the sum before it is below the bound.
        bound = top_p * mass
        under = cut - 1
        lowest = top
        while lowest - under > 1:
            middle = under + (lowest - under) // 2
            before, _number = above(row, vocab, peak, temperature, total, middle + 1, BLOCK)
            under = tl.where(before < bound, under, middle)
            lowest = tl.where(before < bound, middle, lowest)
        before, _number = above(row, vocab, peak, temperature, total, lowest + 1, BLOCK)
        value = lowest.to(tl.float32, bitcast=True).to(tl.float64)
        room = tl.minimum((bound - before) / tl.maximum(value, 1e-300), 1e9)
        fits = room.to(tl.int32)
        fits = tl.maximum(fits + (fits < room).to(tl.int32), 1)
        ties = tl.where(lowest == cut, tl.minimum(ties, fits), fits)
        cut = lowest
    if min_p > 0:
        least = (min_p * highest).to(tl.int32, bitcast=True)
        ties = tl.where(least > cut, vocab, ties)
        cut = tl.maximum(cut, least)

    mass, count = above(row, vocab, peak, temperature, total, cut + 1, BLOCK)
    _rest, equal = above(row, vocab, peak, temperature, total, cut, BLOCK)
    ties = tl.minimum(ties, equal - count)
    value = cut.to(tl.float32, bitcast=True).to(tl.float64)
    bound = (mass + ties * value) * random
    # Find the highest bits for which the sum of all probabilities that are no lower is above
    # the bound.
    found = cut
    over = top + 1
    while over - found > 1:
        middle = found + (over - found) // 2
        before, _number = above(row, vocab, peak, temperature, total, middle, BLOCK)
        found = tl.where(before > bound, middle, found)
        over = tl.where(before > bound, over, middle)
    mass, count = above(row, vocab, peak, temperature, total, found + 1, BLOCK)
    _rest, equal = above(row, vocab, peak, temperature, total, found, BLOCK)
    equal = tl.where(found == cut, ties, equal - count)
    value = found.to(tl.float32, bitcast=True).to(tl.float64)
    place = tl.minimum((bound - mass) / tl.maximum(value, 1e-300), 1e9).to(tl.int32)
    place = tl.maximum(tl.minimum(place, equal - 1), 0)
    # Find the token at this place among those with these bits, in the vocabulary's order.
    passed = vocab * 0
    chosen = vocab * 0
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        each = probabilities(row, token, token < vocab, peak, temperature, total)
        same = ((each.to(tl.int32, bitcast=True) == found) & (token < vocab)).to(tl.int32)
        here = (same > 0) & (passed + tl.cumsum(same, axis=0) - 1 == place)
        chosen += tl.sum(tl.where(here, token, 0), axis=0)
        passed += tl.sum(same, axis=0)
    tl.store(tokens + number, chosen.to(tl.int64))


def draw(
    logits: torch.Tensor,
    settings: torch.Tensor,
    top_k: torch.Tensor,
    shares: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Write one token for each row of ``logits``."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    draw_rows[(rows,)](
        logits,
        settings,
        top_k,
        shares,
        tokens,
        logits.stride(0),
        vocab,
        COLDEST=COLDEST,
        BLOCK=2048,
        num_warps=16,  # with 8, compiled for sm_89, registers spill
        enable_fp_fusion=False,
    )


def given(choices: Sequence[TokenChoice]) -> dict[str, list[Any]]:
    """Return the arguments of `draw` that follow from these choices, by name."""
    params = [choice.params for choice in choices]
    return {
        "settings": [(p.temperature, p.min_p) for p in params],
        "top_k": [min(p.top_k, _MOST) for p in params],
        "shares": [(c.params.top_p, uniform(c.params.seed, c.position)) for c in choices],
    }
