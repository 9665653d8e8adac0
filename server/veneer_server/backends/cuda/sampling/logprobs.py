"""Computes log-probabilities of each row's token and of the likeliest tokens, from raw logits.

Layouts:
    logits     [rows, vocab] float32; row stride given; finite
    tokens     [rows] int64
    counts     [rows] int32: how many of the likeliest are wanted; the rest is not written
    own        [rows] float32: the token's log-probability
    tops       [rows, TOPS] int32: the likeliest tokens, likeliest first; equal ones by rising
               id
    top_own    [rows, TOPS] float32: their log-probabilities

Grid: (rows,). One program reads a whole row, and again for each of the likeliest tokens.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

TOPS: Final = 20
"""The most likeliest tokens that a request may ask for."""


@triton.jit
def log_rows(
    logits,
    tokens,
    counts,
    own,
    tops,
    top_own,
    stride,
    vocab,
    TOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        each = tl.load(row + token, mask=token < vocab, other=float("-inf"))
        peaks = tl.maximum(peaks, each)
    peak = tl.max(peaks, axis=0)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        each = tl.load(row + token, mask=token < vocab, other=float("-inf"))
        sums += tl.exp(each - peak)
    log_sum = peak + tl.log(tl.sum(sums, axis=0))
    tl.store(own + number, tl.load(row + tl.load(tokens + number)) - log_sum)
    last = float("inf")
    last_token = -1
    for place in range(tl.minimum(tl.load(counts + number), tl.minimum(TOPS, vocab))):
        peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
        places = tl.full((BLOCK,), 2147483647, tl.int32)
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            each = tl.load(row + token, mask=token < vocab, other=float("-inf"))
            left = (each < last) | ((each == last) & (token > last_token))
            better = left & (token < vocab) & (each > peaks)
            peaks = tl.where(better, each, peaks)
            places = tl.where(better, token, places)
        last = tl.max(peaks, axis=0)
        last_token = tl.min(tl.where(peaks == last, places, 2147483647), axis=0)
        tl.store(tops + number * TOPS + place, last_token)
        tl.store(top_own + number * TOPS + place, last - log_sum)


def logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    own: torch.Tensor,
    tops: torch.Tensor,
    top_own: torch.Tensor,
) -> None:
    """Write the log-probabilities of ``tokens``, and the likeliest tokens with theirs."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    log_rows[(rows,)](
        logits,
        tokens,
        counts,
        own,
        tops,
        top_own,
        logits.stride(0),
        vocab,
        TOPS=TOPS,
        BLOCK=2048,
        num_warps=8,
        enable_fp_fusion=True,
    )
