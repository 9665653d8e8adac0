"""Quantizes weights to 8 bits: e4m3, with one scale for each output.

Scales are powers of two, so that a scaled weight is a bfloat16 number: weights may be scaled
before or after the GEMM, with the same result. e4m3 is equally precise in every octave, so
rounding scales to powers of two loses nothing, except where the smallest weights become
subnormal.
"""

from __future__ import annotations

from typing import Final

import torch

LARGEST: Final = 448.0
"""The largest number in e4m3."""
LEAST: Final = -100
"""Exponent of the smallest scale. 2 ** 8 times that scale, and any e4m3 number times that
scale, are normal numbers."""


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``weight`` [out, in]; return numbers [out, in] float8_e4m3fn and scales [out]
    float32.

    Raises:
        ValueError: a number is not finite.
    """
    numbers = weight.float()
    most = numbers.abs().amax(dim=1)
    if not bool(most.isfinite().all()):
        raise ValueError("a weight has an infinity or a NaN: the checkpoint is damaged")
    mantissa, exponent = torch.frexp(most / LARGEST)  # mantissa in [0.5, 1)
    exponent = torch.where(mantissa > 0.5, exponent, exponent - 1).clamp(min=LEAST)
    scales = torch.ldexp(torch.ones_like(most), exponent)
    return (numbers / scales.unsqueeze(1)).to(torch.float8_e4m3fn), scales
