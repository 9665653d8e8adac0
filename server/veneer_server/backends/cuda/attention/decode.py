"""Attention of sequences with one new row each (decode), over paged keys and values.

A context is split into pieces of `SPLIT` tokens, so that one long sequence keeps many
multiprocessors busy. `attend_splits` attends to one piece; `join_splits` joins the pieces in
order (Flash-Decoding, Dao et al. 2023). Pieces begin at multiples of `SPLIT` whatever the
batch, so a row's sums always have the same order.

Layouts:
    query      [sequences, heads, dim] bfloat16; row stride given
    keys       [blocks, kv_heads, block_size, dim] bfloat16, of one layer, with the new row's
               keys already written
    values     the same
    tables     [sequences, width] int32: a sequence's blocks in order
    contexts   [sequences] int32: tokens of each sequence, the new one included; 0 for an unused
               entry
    sinks      [heads] float32: a logit that takes part in the softmax and has no value
               (gpt-oss)
    sums       [sequences, heads, splits, dim] float32: weighted values, not divided by the
               weights
    weights    [sequences, heads, splits, 2] float32: largest score, sum of weights
    out        [sequences, heads, dim] bfloat16; row stride given

Grids: attend (sequences, kv_heads, splits), where splits is enough for the longest context;
join (sequences, heads).
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

SPLIT: Final = 256
"""Tokens that one program attends to. Fixed, since it determines the order of summation."""
BLOCK_TOKENS: Final = 64


@triton.jit
def capped(scores, CAP: tl.constexpr):
    """Return CAP * tanh(scores / CAP), or the scores if CAP is 0."""
    if CAP > 0:
        scores = CAP - 2 * CAP / (tl.exp(scores * (2 / CAP)) + 1)
    return scores


@triton.jit
def attend_splits(
    query,
    keys,
    values,
    tables,
    contexts,
    sums,
    weights,
    query_stride,
    width,
    splits,
    window,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(contexts + sequence)
    # The window reaches back to this token. Tiles still begin at multiples of BLOCK_T.
    first = tl.maximum(context - window, 0)
    begin = tl.maximum(split * SPLIT, first // BLOCK_T * BLOCK_T)
    end = tl.minimum(split * SPLIT + SPLIT, context)
    if begin >= end:
        return
    group: tl.constexpr = HEADS // KV_HEADS
    member = tl.arange(0, BLOCK_H)
    head = kv_head * group + member
    d = tl.arange(0, BLOCK_D)
    asked = tl.load(
        query + sequence.to(tl.int64) * query_stride + head[:, None] * DIM + d[None, :],
        mask=(member[:, None] < group) & (d[None, :] < DIM),
        other=0.0,
    )
    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_H,), tl.float32)
    total = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        seen = (token >= first) & (token < end)
        block = tl.load(tables + sequence * width + token // BLOCK_SIZE, mask=seen, other=0).to(
            tl.int64
        )
        place = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE) * DIM
        known = seen[:, None] & (d[None, :] < DIM)
        key = tl.load(keys + place[:, None] + d[None, :], mask=known, other=0.0)
        value = tl.load(values + place[:, None] + d[None, :], mask=known, other=0.0)
        scores = capped(tl.dot(asked, tl.trans(key)) * scale, CAP)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        # Every tile has a token that is seen, so this is finite.
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        shrink = tl.exp(peak - higher)
        each = tl.exp(scores - higher[:, None])
        weight = weight * shrink + tl.sum(each, axis=1)
        total = tl.dot(each.to(tl.bfloat16), value, total * shrink[:, None])
        peak = higher
    place = (sequence.to(tl.int64) * HEADS + head) * splits + split
    mine = member < group
    tl.store(
        sums + place[:, None] * DIM + d[None, :],
        total,
        mask=mine[:, None] & (d[None, :] < DIM),
    )
    tl.store(weights + place * 2, peak, mask=mine)
    tl.store(weights + place * 2 + 1, weight, mask=mine)


@triton.jit
def join_splits(
    sums,
    weights,
    contexts,
    sinks,
    out,
    out_stride,
    splits,
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    context = tl.load(contexts + sequence)
    if context == 0:
        return
    begin = tl.maximum(context - window, 0) // SPLIT
    end = tl.cdiv(context, SPLIT)
    d = tl.arange(0, BLOCK_D)
    place = (sequence.to(tl.int64) * HEADS + head) * splits
    if SINKS:
        peak = tl.load(sinks + head)
    else:
        peak = float("-inf")
    for split in range(begin, end):
        peak = tl.maximum(peak, tl.load(weights + (place + split) * 2))
    total = tl.zeros((BLOCK_D,), tl.float32)
    if SINKS:
        weight = tl.exp(tl.load(sinks + head) - peak)
    else:
        weight = 0.0
    for split in range(begin, end):
        share = tl.exp(tl.load(weights + (place + split) * 2) - peak)
        weight += share * tl.load(weights + (place + split) * 2 + 1)
        part = tl.load(sums + (place + split) * DIM + d, mask=d < DIM, other=0.0)
        total += share * part
    target = out + sequence.to(tl.int64) * out_stride + head * DIM + d
    tl.store(target, (total / weight).to(out.dtype.element_ty), mask=d < DIM)


def splits(context: int) -> int:
    """Number of pieces of a context of ``context`` tokens."""
    return -(-context // SPLIT)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    contexts: torch.Tensor,
    sinks: torch.Tensor | None,
    sums: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    cap: float,
) -> None:
    """Attend with every sequence's new row. ``sums`` and ``weights`` are overwritten.

    Args:
        scale: factor for the scores, applied before the cap.
        window: tokens that a row sees, itself included; None for all.
        cap: scores become cap * tanh(score / cap); 0 for no cap.
    """
    sequences, heads, pieces, dim = sums.shape
    kv_heads, block_size = keys.shape[1:3]
    assert query.stride()[1:] == out.stride()[1:] == (dim, 1)
    assert heads % kv_heads == 0
    # No window is a window longer than any context, so one kernel serves both.
    window = 1 << 30 if window is None else window
    width = triton.next_power_of_2(max(dim, 16))
    attend_splits[(sequences, kv_heads, pieces)](
        query,
        keys,
        values,
        tables,
        contexts,
        sums,
        weights,
        query.stride(0),
        tables.shape[1],
        pieces,
        window,
        scale,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        CAP=cap,
        BLOCK_SIZE=block_size,
        SPLIT=SPLIT,
        BLOCK_H=triton.next_power_of_2(max(heads // kv_heads, 16)),
        BLOCK_D=width,
        BLOCK_T=BLOCK_TOKENS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    join_splits[(sequences, heads)](
        sums,
        weights,
        contexts,
        weights if sinks is None else sinks,
        out,
        out.stride(0),
        pieces,
        window,
        HEADS=heads,
        DIM=dim,
        SINKS=sinks is not None,
        SPLIT=SPLIT,
        BLOCK_D=width,
        num_warps=1,
        enable_fp_fusion=True,
    )
