"""Cuts parts out of a packed NF4 weight, for tensor parallelism, without quantizing again.

Scales keep their groups, even if a part holds only some of a group's scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from veneer_server.backends.cuda.nf4.packing import BLOCK, PackedNf4


def of_outputs(weight: PackedNf4, ranges: Sequence[slice]) -> PackedNf4:
    """Return some of the outputs, with all inputs."""

    def cut(numbers: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [numbers.narrow(dim, r.start, r.stop - r.start) for r in ranges]
        return torch.cat(parts, dim).contiguous()

    made = replace(weight, numbers=cut(weight.numbers, 1), scales=cut(weight.scales, 1))
    if not weight.nested:
        return made
    return replace(made, first=cut(weight.first, 0), offsets=cut(weight.offsets, 0))


def of_inputs(weight: PackedNf4, inputs: slice) -> PackedNf4:
    """Return some of the inputs, for all outputs.

    Raises:
        ValueError: the range would cut a block of 64 inputs.
    """
    if inputs.start % BLOCK or inputs.stop % BLOCK:
        raise ValueError(f"inputs {inputs.start} to {inputs.stop} cut a block of {BLOCK}")
    blocks = slice(inputs.start // BLOCK, inputs.stop // BLOCK)
    made = replace(
        weight,
        numbers=weight.numbers[blocks].contiguous(),
        scales=weight.scales[blocks].contiguous(),
    )
    # A scale's group is found by its place in the whole weight.
    return replace(made, first=weight.first + blocks.start) if weight.nested else made
