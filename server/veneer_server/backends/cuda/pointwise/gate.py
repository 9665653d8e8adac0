"""SwiGLU's gate: SiLU of one half times the other.

Layouts:
    pairs      [rows, 2 * features], any float: gate, then up; row stride given
    out        [rows, features], any float; row stride given

Grid: (rows, blocks of features).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def gate_rows(pairs, out, pairs_stride, out_stride, features, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = column < features
    source = pairs + row * pairs_stride + column
    left = tl.load(source, mask=known, other=0.0).to(tl.float32)
    right = tl.load(source + features, mask=known, other=0.0).to(tl.float32)
    gated = left / (1 + tl.exp(-left)) * right
    tl.store(out + row * out_stride + column, gated.to(out.dtype.element_ty), mask=known)


def gate(pairs: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` = SiLU(gate) * up."""
    rows, features = out.shape
    gate_rows[(rows, triton.cdiv(features, 1024))](
        pairs,
        out,
        pairs.stride(0),
        out.stride(0),
        features,
        BLOCK=1024,
        num_warps=4,
        enable_fp_fusion=True,
    )
