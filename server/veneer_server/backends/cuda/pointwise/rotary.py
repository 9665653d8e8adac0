"""Turns projected q, k and v into the query and the cache's K and V, in one pass.

The pass applies the norms of single heads (Qwen3) and the rotary embedding (halves convention),
and writes K and V to the cache.

Layouts:
    qkv        [rows, heads + 2 * kv_heads, dim], any float; row stride given
    positions  [rows] int32, position of each row in its sequence
    slots      [rows] int64: block * block_size + offset, where K and V go; -1: an unused row
    turns      [positions, 2, dim / 2] float32: cosines, then sines, of each position's angles
    norms      [2, dim] float32: weights of the query's norm and of the key's
    query      [rows, heads, dim] bfloat16, contiguous
    keys       [blocks, kv_heads, block_size, dim] bfloat16
    values     the same

Grid: (rows, heads + 2 * kv_heads).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def place_heads(
    qkv,
    positions,
    slots,
    turns,
    norms,
    query,
    keys,
    values,
    qkv_stride,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    d = tl.arange(0, BLOCK)
    known = d < HALF
    source = qkv + row * qkv_stride + head * (2 * HALF) + d
    left = tl.load(source, mask=known, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=known, other=0.0).to(tl.float32)
    kv_head = (head - HEADS) % KV_HEADS
    place = ((slot // BLOCK_SIZE * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * (
        2 * HALF
    )
    if head >= HEADS + KV_HEADS:
        tl.store(values + place + d, left.to(tl.bfloat16), mask=known)
        tl.store(values + place + HALF + d, right.to(tl.bfloat16), mask=known)
    else:
        if NORMS:
            mean = tl.sum(left * left + right * right, axis=0) / (2 * HALF)
            scale = 1.0 / tl.sqrt(mean + epsilon)
            which = norms + (head >= HEADS).to(tl.int32) * (2 * HALF) + d
            left = left * scale * tl.load(which, mask=known, other=0.0)
            right = right * scale * tl.load(which + HALF, mask=known, other=0.0)
        angle = turns + tl.load(positions + row).to(tl.int64) * (2 * HALF) + d
        cosine = tl.load(angle, mask=known, other=0.0)
        sine = tl.load(angle + HALF, mask=known, other=0.0)
        first = (left * cosine - right * sine).to(tl.bfloat16)
        second = (right * cosine + left * sine).to(tl.bfloat16)
        if head < HEADS:
            target = query + (row * HEADS + head) * (2 * HALF) + d
            tl.store(target, first, mask=known)
            tl.store(target + HALF, second, mask=known)
        else:
            tl.store(keys + place + d, first, mask=known)
            tl.store(keys + place + HALF + d, second, mask=known)


def place(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    turns: torch.Tensor,
    norms: torch.Tensor | None,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    epsilon: float,
) -> None:
    """Write the rows' queries, keys and values. ``epsilon`` is for the norms of heads."""
    rows, all_heads, dim = qkv.shape
    kv_heads, block_size = keys.shape[1:3]
    heads = all_heads - 2 * kv_heads
    assert qkv.stride()[1:] == (dim, 1)
    assert query.is_contiguous()
    place_heads[(rows, all_heads)](
        qkv,
        positions,
        slots,
        turns,
        turns if norms is None else norms,
        query,
        keys,
        values,
        qkv.stride(0),
        epsilon,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=dim // 2,
        BLOCK_SIZE=block_size,
        NORMS=norms is not None,
        BLOCK=triton.next_power_of_2(dim // 2),
        num_warps=1,
        enable_fp_fusion=True,
    )
