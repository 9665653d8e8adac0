"""NF4 for many rows: expands a range of a weight's outputs to bfloat16 for cuBLAS.

With many rows, multiplying takes longer than expanding the weight. A panel is only a range of
its outputs, so the buffer stays small.

Layouts (see `packing` for the weight's):
    panel      [end - begin, 64 * k] bfloat16

Grid: (blocks of outputs, k). Launched with `enable_fp_fusion=False`, see `rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from veneer_server.backends.cuda.nf4.packing import BLOCK, PackedNf4
from veneer_server.backends.cuda.nf4.rows import scales_of


@triton.jit
def expand_panel(
    numbers,
    scales,
    first,
    offsets,
    groups,
    levels,
    codes,
    panel,
    begin,
    end,
    outputs,
    NESTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    k = tl.program_id(1)
    n = begin + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = n < end
    half = tl.arange(0, 32)
    place = (k * outputs + n.to(tl.int64)) * 32
    pairs = tl.load(numbers + place[:, None] + half[None, :], mask=known[:, None], other=0).to(
        tl.int32
    )
    scale = scales_of(scales, first, offsets, groups, levels, k, n, known, outputs, NESTED)
    low = tl.load(codes + (pairs & 15)) * scale[:, None]
    high = tl.load(codes + (pairs >> 4)) * scale[:, None]
    inputs = tl.num_programs(1) * 64
    target = panel + (n - begin)[:, None].to(tl.int64) * inputs + k * 64 + half[None, :]
    tl.store(target, low.to(tl.bfloat16), mask=known[:, None])
    tl.store(target + 32, high.to(tl.bfloat16), mask=known[:, None])


def expand(weight: PackedNf4, begin: int, end: int, panel: torch.Tensor) -> None:
    """Write outputs ``begin`` to ``end`` of the weight to ``panel``."""
    assert panel.shape == (end - begin, weight.in_features)
    assert panel.is_contiguous()
    expand_panel[(triton.cdiv(end - begin, 32), weight.in_features // BLOCK)](
        weight.numbers,
        weight.scales,
        weight.first,
        weight.offsets,
        weight.groups,
        weight.levels,
        weight.codes,
        panel,
        begin,
        end,
        weight.out_features,
        NESTED=weight.nested,
        BLOCK_N=32,
        num_warps=4,
        enable_fp_fusion=False,
    )
