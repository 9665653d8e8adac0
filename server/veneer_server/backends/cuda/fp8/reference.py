"""What the kernels compute from FP8 weights, in torch."""

from __future__ import annotations

import torch

from veneer_server.backends.cuda.fp8.packing import PackedFp8


def expand(weight: PackedFp8) -> torch.Tensor:
    """[n, 64 * k] float32, each a bfloat16 number."""
    numbers = weight.numbers.view(torch.float8_e4m3fn).float() * weight.scales[:, None]
    return numbers.transpose(0, 1).reshape(weight.out_features, weight.in_features)


def multiply(x: torch.Tensor, weight: PackedFp8) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [rows, in] bfloat16 times the transposed weight, and the sums of the terms'
    magnitudes; both [rows, n] float64."""
    numbers = expand(weight).double()
    return x.double() @ numbers.t(), x.double().abs() @ numbers.t().abs()
