"""Reference for the FP8 kernels, in torch."""

from __future__ import annotations

import torch

from veneer_server.backends.cuda.fp8.packing import PackedFp8


def expand(weight: PackedFp8) -> torch.Tensor:
    """Dequantize a weight: [n, 64 * k] float32, whose numbers bfloat16 represents exactly."""
    numbers = weight.numbers.view(torch.float8_e4m3fn).float() * weight.scales[:, None]
    return numbers.transpose(0, 1).reshape(weight.out_features, weight.in_features)


def multiply(x: torch.Tensor, weight: PackedFp8) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply ``x``, [rows, in] bfloat16, by the transposed weight. Returns the product and
    the sums of its terms' magnitudes, both [rows, n] float64."""
    numbers = expand(weight).double()
    return x.double() @ numbers.t(), x.double().abs() @ numbers.t().abs()
