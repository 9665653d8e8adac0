"""FP8 for many rows: expands a range of a weight's outputs to bfloat16 for cuBLAS.

Layouts (see `packing` for the weight's):
    panel      [end - begin, 64 * k] bfloat16

Grid: (blocks of outputs, k).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from veneer_server.backends.cuda.fp8.packing import BLOCK, PackedFp8
from veneer_server.backends.cuda.fp8.rows import halves


@triton.jit
def expand_panel(numbers, scales, panel, begin, end, outputs, BLOCK_N: tl.constexpr):
    k = tl.program_id(1)
    n = begin + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = n < end
    inner = tl.arange(0, 64)
    place = (k * outputs + n.to(tl.int64)) * 64
    bits = tl.load(numbers + place[:, None] + inner[None, :], mask=known[:, None], other=0)
    scale = tl.load(scales + n, mask=known, other=0.0) * 256.0
    scaled = halves(bits).to(tl.float32) * scale[:, None]
    inputs = tl.num_programs(1) * 64
    target = panel + (n - begin)[:, None].to(tl.int64) * inputs + k * 64 + inner[None, :]
    tl.store(target, scaled.to(tl.bfloat16), mask=known[:, None])


def expand(weight: PackedFp8, begin: int, end: int, panel: torch.Tensor) -> None:
    """Write outputs ``begin`` to ``end`` of the weight to ``panel``."""
    assert panel.shape == (end - begin, weight.in_features)
    assert panel.is_contiguous()
    expand_panel[(triton.cdiv(end - begin, 32), weight.in_features // BLOCK)](
        weight.numbers,
        weight.scales,
        panel,
        begin,
        end,
        weight.out_features,
        BLOCK_N=32,
        num_warps=4,
    )
