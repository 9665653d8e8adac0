"""Packs FP8 weights, e4m3 with a scale for each output, in the order that the kernels read.

Activations stay bfloat16. Scales are powers of two; see `models.checkpoint.e4m3`.

Layouts (n: output, k: block of 64 inputs):
    numbers    [k, n, 64] uint8: the bits of e4m3 (torch's float8_e4m3fn); never NaN
    scales     [n] float32, powers of two
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from veneer_server.models.checkpoint.e4m3 import quantize

BLOCK: Final = 64
"""Inputs of an output that are stored side by side."""


@dataclass(frozen=True, slots=True)
class PackedFp8:
    """One weight, or several stacked. The module's docstring gives the layouts."""

    numbers: torch.Tensor
    scales: torch.Tensor

    @property
    def out_features(self) -> int:
        """n."""
        return self.numbers.shape[1]

    @property
    def in_features(self) -> int:
        """64 * k."""
        return self.numbers.shape[0] * BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.numbers.nbytes + self.scales.nbytes


def pack(weights: Sequence[torch.Tensor]) -> PackedFp8:
    """Quantize and pack weights that share an input, with their outputs one after the other.

    Raises:
        ValueError: the weights' numbers of inputs differ or are no multiple of 64, or a number
            is not finite.
    """
    inputs = {weight.shape[1] for weight in weights}
    if len(inputs) > 1 or any(count % BLOCK for count in inputs):
        raise ValueError(f"{inputs} inputs: must be a multiple of {BLOCK}, the same in a group")
    made = [quantize(weight) for weight in weights]
    numbers = torch.cat([numbers.view(torch.uint8) for numbers, _ in made])
    blocks = numbers.view(len(numbers), -1, BLOCK).transpose(0, 1).contiguous()
    return PackedFp8(blocks, torch.cat([scales for _, scales in made]))
