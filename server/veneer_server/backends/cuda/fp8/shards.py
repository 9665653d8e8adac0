"""Cuts parts out of a packed FP8 weight, for tensor parallelism, without quantizing again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer_server.backends.cuda.fp8.packing import BLOCK, PackedFp8


def of_outputs(weight: PackedFp8, ranges: Sequence[slice]) -> PackedFp8:
    """Return some of the outputs, with all inputs."""
    numbers = torch.cat([weight.numbers[:, r] for r in ranges], 1)
    return PackedFp8(numbers.contiguous(), torch.cat([weight.scales[r] for r in ranges]))


def of_inputs(weight: PackedFp8, inputs: slice) -> PackedFp8:
    """Return some of the inputs, for all outputs.

    Raises:
        ValueError: the range would cut a block of 64 inputs.
    """
    if inputs.start % BLOCK or inputs.stop % BLOCK:
        raise ValueError(f"inputs {inputs.start} to {inputs.stop} cut a block of {BLOCK}")
    blocks = slice(inputs.start // BLOCK, inputs.stop // BLOCK)
    return PackedFp8(weight.numbers[blocks].contiguous(), weight.scales)
