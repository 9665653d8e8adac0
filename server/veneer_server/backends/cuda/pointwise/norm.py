"""The addition to the residual stream, followed by RMSNorm, in one kernel.

One program holds a whole row, so a row is read once.

Layouts:
    hidden     [rows, features] float32, the residual stream; ``added`` is added in place
    added      [rows, features], any float; row stride given
    weight     [features] float32
    out        [rows, features], any float; row stride given

Grid: (rows,).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def normalize_rows(
    hidden,
    added,
    weight,
    out,
    added_stride,
    out_stride,
    features,
    epsilon,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    known = column < features
    numbers = tl.load(hidden + row * features + column, mask=known, other=0.0)
    if ADD:
        more = tl.load(added + row * added_stride + column, mask=known, other=0.0)
        numbers += more.to(tl.float32)
        tl.store(hidden + row * features + column, numbers, mask=known)
    mean = tl.sum(numbers * numbers, axis=0) / features
    scale = 1.0 / tl.sqrt(mean + epsilon)
    scaled = numbers * scale * tl.load(weight + column, mask=known, other=0.0)
    tl.store(out + row * out_stride + column, scaled.to(out.dtype.element_ty), mask=known)


def normalize(
    hidden: torch.Tensor,
    added: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    epsilon: float,
) -> None:
    """Add ``added`` to ``hidden`` in place, and write the RMSNorm of the sum to ``out``."""
    rows, features = hidden.shape
    assert hidden.is_contiguous()
    normalize_rows[(rows,)](
        hidden,
        hidden if added is None else added,
        weight,
        out,
        features if added is None else added.stride(0),
        out.stride(0),
        features,
        epsilon,
        ADD=added is not None,
        BLOCK=triton.next_power_of_2(features),
        num_warps=8,
        enable_fp_fusion=True,
    )
