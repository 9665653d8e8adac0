"""Reference for `norm`, `rotary` and `gate`, in float64."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def normalize(numbers: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Apply RMSNorm to ``numbers``, [..., features]."""
    numbers = numbers.double()
    scale = torch.rsqrt(numbers.square().mean(dim=-1, keepdim=True) + epsilon)
    return numbers * scale * weight.double()


def turn(heads: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding.

    Args:
        heads: [rows, heads, dim].
        turns: [rows, 2, dim / 2], cosines and sines.
    """
    left, right = heads.double().chunk(2, dim=-1)
    cosine, sine = turns.double().unsqueeze(2).unbind(dim=1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)


def gate(pairs: torch.Tensor) -> torch.Tensor:
    """Return SiLU of the first half of ``pairs`` [rows, 2 * features] times the second half."""
    left, right = pairs.double().chunk(2, dim=-1)
    return F.silu(left) * right
