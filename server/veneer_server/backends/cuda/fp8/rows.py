"""FP8 matrix multiply for few rows: weights stay 8 bits until they reach tensor cores.

It works the same on GPUs with and without FP8 tensor cores (sm_80 has none). The bits are
converted to float16, which has all of e4m3's numbers up to a factor of 2 ** 8, then to
bfloat16. `multiply_rows` writes sums over `SPLIT` blocks of inputs each; `add_scaled` adds
these in order and scales them.

Layouts (see `packing` for the weight's):
    x          [rows, 64 * k] bfloat16; row stride given
    partials   [splits, rows, n] float32, splits = ceil(k / SPLIT)
    y          [rows, n], any float; row stride given
    bias       [n], any float

Grids: multiply (blocks of outputs, splits, tiles of rows); add (rows, blocks of outputs).
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from veneer_server.backends.cuda.fp8.packing import PackedFp8

ROWS: Final = 16
"""Rows of a tile: the fewest that tensor cores multiply."""
SPLIT: Final = 16
"""Blocks of 64 inputs that one program adds up. Fixed, since it determines the order of
summation."""
BLOCK_OUTPUTS: Final = 32


@triton.jit
def halves(bits):
    """Return 2 ** -8 times the numbers with these e4m3 ``bits`` (uint8), as float16."""
    wide = bits.to(tl.int32)
    moved = ((wide & 128) << 8) | ((wide & 127) << 7)
    return moved.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def multiply_rows(
    x,
    numbers,
    partials,
    x_stride,
    rows,
    outputs,
    blocks,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    known = n < outputs
    inner = tl.arange(0, 64)
    of_x = x + row[:, None].to(tl.int64) * x_stride + inner[None, :]
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for k in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, blocks)):
        place = (k * outputs + n.to(tl.int64)) * 64
        bits = tl.load(numbers + place[:, None] + inner[None, :], mask=known[:, None], other=0)
        weight = halves(bits).to(tl.float32).to(tl.bfloat16)
        given = tl.load(of_x + k * 64, mask=row[:, None] < rows, other=0.0)
        sums = tl.dot(given, tl.trans(weight), sums)
    target = partials + (split * rows + row[:, None]).to(tl.int64) * outputs + n[None, :]
    tl.store(target, sums, mask=(row[:, None] < rows) & known[None, :])


@triton.jit
def add_scaled(
    partials,
    scales,
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
    sums *= tl.load(scales + n, mask=known, other=0.0) * 256.0
    if BIAS:
        sums += tl.load(bias + n, mask=known, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + n, sums.to(y.dtype.element_ty), mask=known)


def splits(weight: PackedFp8) -> int:
    """Number of parts into which a sum over all inputs is split."""
    return -(-len(weight.numbers) // SPLIT)


def multiply(
    x: torch.Tensor,
    weight: PackedFp8,
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
        partials,
        x.stride(0),
        rows,
        outputs,
        len(weight.numbers),
        ROWS=ROWS,
        SPLIT=SPLIT,
        BLOCK_N=BLOCK_OUTPUTS,
        num_warps=4,
    )
    add_scaled[(rows, triton.cdiv(outputs, 256))](
        partials,
        weight.scales,
        y if bias is None else bias,
        y,
        y.stride(0),
        rows,
        outputs,
        parts,
        BIAS=bias is not None,
        BLOCK_N=256,
        num_warps=4,
    )
