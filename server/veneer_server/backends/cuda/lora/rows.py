"""LoRA for segments of few rows (decode): vectors times matrices, without tensor cores.

`shrink_rows` multiplies by A and writes sums over `SPLIT` inputs each; `expand_rows` adds these
in order and multiplies by B. With two passes one row keeps many multiprocessors busy, and its
sums still have a fixed order.

Layouts (see `tables` for the others):
    x          [rows, fan_in], any float; row stride given
    partials   [splits, rows, width] float32, splits = ceil(fan_in / SPLIT), width at least the
               largest ``ranks``
    y          [rows, sum of fan_outs], any float; row stride given; added to in place

Grids: shrink (tiles, splits, LANES), where lane l takes rank blocks l, l + LANES, ...;
expand (tiles, blocks of columns).
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from veneer_server.backends.cuda.lora.tables import AdapterSlots, fields

ROWS: Final = 4
"""Rows of a tile."""
SPLIT: Final = 512
"""Inputs whose products one program adds up. Fixed, since it determines the order of
summation."""
BLOCK_COLUMNS: Final = 128
LANES: Final = 4
"""Programs that share a tile's ranks. Does not affect results."""


@triton.jit
def shrink_rows(
    x,
    arena,
    tiles,
    places,
    partials,
    x_stride,
    fan_in,
    rows,
    width,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    lane = tl.program_id(2)
    first = tl.load(tiles + tile * 3)
    count = tl.load(tiles + tile * 3 + 1)
    slot = tl.load(tiles + tile * 3 + 2)
    if count == 0:
        return
    a = tl.load(places + slot * FIELDS)
    ranks = tl.load(places + slot * FIELDS + 1).to(tl.int32)
    row = tl.arange(0, ROWS)
    of_row = (first + row).to(tl.int64)
    inputs = tl.minimum(SPLIT, fan_in - split * SPLIT)
    for begin in range(lane * BLOCK_R, ranks, tl.num_programs(2) * BLOCK_R):
        rank = begin + tl.arange(0, BLOCK_R)
        # Each of BLOCK_K partial sums is added up separately; they are joined at the end.
        sums = tl.zeros((ROWS, BLOCK_K, BLOCK_R), tl.float32)
        for step in range(0, inputs, BLOCK_K):
            k = split * SPLIT + step + tl.arange(0, BLOCK_K)
            numbers = tl.load(
                x + of_row[:, None] * x_stride + k[None, :],
                mask=(row[:, None] < count) & (k[None, :] < fan_in),
                other=0.0,
            ).to(tl.float32)
            weights = tl.load(
                arena + a + k[:, None].to(tl.int64) * ranks + rank[None, :],
                mask=(k[:, None] < fan_in) & (rank[None, :] < ranks),
                other=0.0,
            ).to(tl.float32)
            sums += numbers[:, :, None] * weights[None, :, :]
        tl.store(
            partials + (split * rows + of_row[:, None]) * width + rank[None, :],
            tl.sum(sums, axis=1),
            mask=(row[:, None] < count) & (rank[None, :] < ranks),
        )


@triton.jit
def expand_rows(
    partials,
    arena,
    tiles,
    places,
    scalings,
    columns,
    y,
    y_stride,
    rows,
    width,
    splits,
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
        known = (row[:, None] < count) & (rank[None, :] < ranks)
        shrunk = tl.zeros((ROWS, BLOCK_R), tl.float32)
        for split in range(splits):
            shrunk += tl.load(
                partials + (split * rows + of_row[:, None]) * width + before + rank[None, :],
                mask=known,
                other=0.0,
            )
        weights = tl.load(
            arena + b + rank[:, None].to(tl.int64) * fan_out + begin + column[None, :],
            mask=(rank[:, None] < ranks) & (column[None, :] < size),
            other=0.0,
        ).to(tl.float32)
        sums += tl.sum(shrunk[:, :, None] * weights[None, :, :], axis=1)
    target = y + of_row[:, None] * y_stride + place + column[None, :]
    mask = (row[:, None] < count) & (column[None, :] < size)
    total = tl.load(target, mask=mask, other=0.0).to(tl.float32) + scaling * sums
    tl.store(target, total.to(y.dtype.element_ty), mask=mask)


def splits(fan_in: int) -> int:
    """Number of parts into which a sum over ``fan_in`` inputs is split."""
    return -(-fan_in // SPLIT)


def add_rows(
    x: torch.Tensor,
    y: torch.Tensor,
    arena: torch.Tensor,
    tiles: torch.Tensor,
    adapters: AdapterSlots,
    columns: torch.Tensor,
    partials: torch.Tensor,
) -> None:
    """Add each row's update to ``y``; `tables` and the top of this file give the layouts.

    Args:
        tiles: tiles of at most `ROWS` rows each.
        columns: blocks of at most `BLOCK_COLUMNS` columns.
        partials: scratch memory, overwritten.
    """
    members = len(adapters.fan_outs)
    parts, rows, width = partials.shape
    assert parts == splits(adapters.fan_in)
    assert x.stride(1) == y.stride(1) == 1
    shrink_rows[(len(tiles), parts, LANES)](
        x,
        arena,
        tiles,
        adapters.places,
        partials,
        x.stride(0),
        adapters.fan_in,
        rows,
        width,
        FIELDS=fields(members),
        ROWS=ROWS,
        SPLIT=SPLIT,
        BLOCK_K=64,
        BLOCK_R=16,
        num_warps=4,
        enable_fp_fusion=True,
    )
    expand_rows[(len(tiles), len(columns))](
        partials,
        arena,
        tiles,
        adapters.places,
        adapters.scalings,
        columns,
        y,
        y.stride(0),
        rows,
        width,
        parts,
        FIELDS=fields(members),
        MEMBERS=members,
        ROWS=ROWS,
        BLOCK_R=16,
        BLOCK_N=BLOCK_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
