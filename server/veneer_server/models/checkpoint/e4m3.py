"""Weights in 8 bits: e4m3, a scale for each output.

Scales are powers of two: a scaled weight then is a bfloat16 number, so that weights may be
scaled before or after they are multiplied, with the same result. A number of e4m3 is as precise
in one octave as in another, so nothing is lost by it but where the smallest ones become
subnormal.
"""

from __future__ import annotations

from typing import Final

import torch

LARGEST: Final = 448.0
"""Of e4m3."""
LEAST: Final = -100
"""Exponent of the smallest scale: 2 ** 8 times it, and a number of e4m3 times it, are
normal."""


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [out, in] as [out, in] float8_e4m3fn times [out] float32.

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
