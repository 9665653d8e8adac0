"""LoRA for segments of many rows (prefill): both multiplies use tensor cores (`tl.dot`).

One program sums over all inputs, 64 at a time, so partial sums need not be joined. The product
with A is rounded to bfloat16 before it is multiplied by B, as in PEFT's bfloat16 linears. So a
row's bits differ from those that `rows` computes: which of the two kernels a row uses must
depend on its sequence (prompt or decode), not on how many rows its segment has.

Layouts (see `tables` for the others):
    x          [rows, fan_in] bfloat16; row stride given
    shrunk     [rows, width] float32, width at least the largest ``ranks``
    y          [rows, sum of fan_outs], any float; row stride given; added to in place

Grids: shrink (tiles, LANES), where lane l takes rank blocks l, l + LANES, ...;
expand (tiles, blocks of columns).
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from veneer_server.backends.cuda.lora.tables import AdapterSlots, fields

ROWS: Final = 32
"""Rows of a tile."""
BLOCK_COLUMNS: Final = 64
LANES: Final = 4
"""Programs that share a tile's ranks. Does not affect results."""


@triton.jit
def shrink_panels(
    x,
    arena,
    tiles,
    places,
    shrunk,
    x_stride,
    fan_in,
    width,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0)
    lane = tl.program_id(1)
    first = tl.load(tiles + tile * 3)
    count = tl.load(tiles + tile * 3 + 1)
    slot = tl.load(tiles + tile * 3 + 2)
    if count == 0:
        return
    a = tl.load(places + slot * FIELDS)
    ranks = tl.load(places + slot * FIELDS + 1).to(tl.int32)
    row = tl.arange(0, ROWS)
    of_row = (first + row).to(tl.int64)
    for begin in range(lane * BLOCK_R, ranks, tl.num_programs(1) * BLOCK_R):
        rank = begin + tl.arange(0, BLOCK_R)
        sums = tl.zeros((ROWS, BLOCK_R), tl.float32)
        for step in range(0, fan_in, BLOCK_K):
            k = step + tl.arange(0, BLOCK_K)
            numbers = tl.load(
                x + of_row[:, None] * x_stride + k[None, :],
                mask=(row[:, None] < count) & (k[None, :] < fan_in),
                other=0.0,
            )
            weights = tl.load(
                arena + a + k[:, None].to(tl.int64) * ranks + rank[None, :],
                mask=(k[:, None] < fan_in) & (rank[None, :] < ranks),
                other=0.0,
            )
            sums = tl.dot(numbers, weights, sums)
        tl.store(
            shrunk + of_row[:, None] * width + rank[None, :],
            sums,
            mask=(row[:, None] < count) & (rank[None, :] < ranks),
        )


@triton.jit
def expand_panels(
    shrunk,
    arena,
    tiles,
    places,
    scalings,
    columns,
    y,
    y_stride,
    width,
    FIELDS: tl.constexpr,
    MEMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0)
    block = tl.program_id(1)
    first = tl.load(tiles + tile * 3)
    count = tl.load(tiles + tile * 3 + 1)
    slot = tl.load(tiles + tile * 3 + 2)
    member = tl.load(columns + block * 5)
    fan_out = tl.load(columns + block * 5 + 1)
    begin = tl.load(columns + block * 5 + 2)
    place = tl.load(columns + block * 5 + 3)
    size = tl.load(columns + block * 5 + 4)
    if count == 0:
        return
    b = tl.load(places + slot * FIELDS + 2 + member * 3)
    ranks = tl.load(places + slot * FIELDS + 3 + member * 3).to(tl.int32)
    before = tl.load(places + slot * FIELDS + 4 + member * 3).to(tl.int32)
    if ranks == 0:
        return
    scaling = tl.load(scalings + slot * MEMBERS + member)
    row = tl.arange(0, ROWS)
    of_row = (first + row).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for step in range(0, ranks, BLOCK_R):
        rank = step + tl.arange(0, BLOCK_R)
        numbers = tl.load(
            shrunk + of_row[:, None] * width + before + rank[None, :],
            mask=(row[:, None] < count) & (rank[None, :] < ranks),
            other=0.0,
        ).to(tl.bfloat16)
        weights = tl.load(
            arena + b + rank[:, None].to(tl.int64) * fan_out + begin + column[None, :],
            mask=(rank[:, None] < ranks) & (column[None, :] < size),
            other=0.0,
        )
        sums = tl.dot(numbers, weights, sums)
    target = y + of_row[:, None] * y_stride + place + column[None, :]
    mask = (row[:, None] < count) & (column[None, :] < size)
    total = tl.load(target, mask=mask, other=0.0).to(tl.float32) + scaling * sums
    tl.store(target, total.to(y.dtype.element_ty), mask=mask)


def add_panels(
    x: torch.Tensor,
    y: torch.Tensor,
    arena: torch.Tensor,
    tiles: torch.Tensor,
    adapters: AdapterSlots,
    columns: torch.Tensor,
    shrunk: torch.Tensor,
) -> None:
    """Add each row's update to ``y``; `tables` and the top of this file give the layouts.

    Args:
        tiles: tiles of at most `ROWS` rows each.
        columns: blocks of at most `BLOCK_COLUMNS` columns.
        shrunk: scratch memory, overwritten.
    """
    members = len(adapters.fan_outs)
    assert x.stride(1) == y.stride(1) == 1
    shrink_panels[(len(tiles), LANES)](
        x,
        arena,
        tiles,
        adapters.places,
        shrunk,
        x.stride(0),
        adapters.fan_in,
        shrunk.shape[1],
        FIELDS=fields(members),
        ROWS=ROWS,
        BLOCK_K=64,
        BLOCK_R=16,
        num_warps=4,
        enable_fp_fusion=True,
    )
    expand_panels[(len(tiles), len(columns))](
        shrunk,
        arena,
        tiles,
        adapters.places,
        adapters.scalings,
        columns,
        y,
        y.stride(0),
        shrunk.shape[1],
        FIELDS=fields(members),
        MEMBERS=members,
        ROWS=ROWS,
        BLOCK_R=16,
        BLOCK_N=BLOCK_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
