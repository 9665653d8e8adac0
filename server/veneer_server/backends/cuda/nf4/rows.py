"""NF4 matrix multiply for few rows: weights stay 4 bits until they reach tensor cores.

Reading the weights takes most of the time. `multiply_rows` writes sums over `SPLIT` blocks of
inputs each; `add_splits` adds these in order. Weights are scaled and rounded to bfloat16 before
they are multiplied, as in bitsandbytes.

Layouts (see `packing` for the weight's):
    x          [rows, 64 * k] bfloat16; row stride given
    partials   [splits, rows, n] float32, splits = ceil(k / SPLIT)
    y          [rows, n], any float; row stride given
    bias       [n], any float

Grids: multiply (blocks of outputs, splits, tiles of rows); add (rows, blocks of outputs).

`multiply_rows` is launched with `enable_fp_fusion=False`, since a fused multiply-add would
round a scale once where bitsandbytes rounds twice.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from veneer_server.backends.cuda.nf4.packing import PackedNf4

ROWS: Final = 16
"""Rows of a tile: the fewest that tensor cores multiply. One size for every number of rows,
since another size would use other instructions, which may add in another order."""
SPLIT: Final = 16
"""Blocks of 64 inputs that one program adds up. Fixed, since it determines the order of
summation."""

BLOCK_OUTPUTS: Final = 32
"""With 64, compiled for sm_100, four bytes of registers spill."""


@triton.jit
def scales_of(
    scales, first, offsets, groups, levels, k, n, known, outputs, NESTED: tl.constexpr
):
    """Return the scales of block ``k`` of outputs ``n``: [BLOCK_N]."""
    place = k * outputs + n
    if NESTED:
        level = tl.load(scales + place, mask=known, other=0)
        group = (tl.load(first + n, mask=known, other=0) + k) >> 8
        scale = tl.load(levels + level.to(tl.int32)) * tl.load(groups + group)
        scale += tl.load(offsets + n, mask=known, other=0.0)
    else:
        scale = tl.load(scales + place, mask=known, other=0.0)
    return scale


@triton.jit
def multiply_rows(
    x,
    numbers,
    scales,
    first,
    offsets,
    groups,
    levels,
    codes,
    partials,
    x_stride,
    rows,
    outputs,
    blocks,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    known = n < outputs
    half = tl.arange(0, 32)
    of_x = x + row[:, None].to(tl.int64) * x_stride + half[None, :]
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for k in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, blocks)):
        place = (k * outputs + n.to(tl.int64)) * 32
        pairs = tl.load(
            numbers + place[:, None] + half[None, :], mask=known[:, None], other=0
        ).to(tl.int32)
        scale = scales_of(scales, first, offsets, groups, levels, k, n, known, outputs, NESTED)
        low = tl.load(codes + (pairs & 15)) * scale[:, None]
        high = tl.load(codes + (pairs >> 4)) * scale[:, None]
        left = tl.load(of_x + k * 64, mask=row[:, None] < rows, other=0.0)
        right = tl.load(of_x + k * 64 + 32, mask=row[:, None] < rows, other=0.0)
        sums = tl.dot(left, tl.trans(low.to(tl.bfloat16)), sums)
        sums = tl.dot(right, tl.trans(high.to(tl.bfloat16)), sums)
    target = partials + (split * rows + row[:, None]).to(tl.int64) * outputs + n[None, :]
    tl.store(target, sums, mask=(row[:, None] < rows) & known[None, :])


@triton.jit
def add_splits(
    partials,
    bias,
    y,
    y_stride,
    rows,
    outputs,
    splits,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = n < outputs
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(splits):
        sums += tl.load(partials + (split * rows + row) * outputs + n, mask=known, other=0.0)
    if BIAS:
        sums += tl.load(bias + n, mask=known, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + n, sums.to(y.dtype.element_ty), mask=known)


def splits(weight: PackedNf4) -> int:
    """Number of parts into which a sum over all inputs is split."""
    return -(-len(weight.numbers) // SPLIT)


def multiply(
    x: torch.Tensor,
    weight: PackedNf4,
    bias: torch.Tensor | None,
    partials: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """``y`` = ``x`` times the transposed weight, plus the bias. ``partials`` is overwritten."""
    parts, rows, outputs = partials.shape
    assert parts == splits(weight)
    assert x.stride(1) == y.stride(1) == 1
    multiply_rows[(triton.cdiv(outputs, BLOCK_OUTPUTS), parts, triton.cdiv(rows, ROWS))](
        x,
        weight.numbers,
        weight.scales,
        weight.first,
        weight.offsets,
        weight.groups,
        weight.levels,
        weight.codes,
        partials,
        x.stride(0),
        rows,
        outputs,
        len(weight.numbers),
        NESTED=weight.nested,
        ROWS=ROWS,
        SPLIT=SPLIT,
        BLOCK_N=BLOCK_OUTPUTS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    add_splits[(rows, triton.cdiv(outputs, 256))](
        partials,
        y if bias is None else bias,
        y,
        y.stride(0),
        rows,
        outputs,
        parts,
        BIAS=bias is not None,
        BLOCK_N=256,
        num_warps=4,
        enable_fp_fusion=True,
    )
