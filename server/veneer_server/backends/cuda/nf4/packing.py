"""Repacks bitsandbytes' NF4 weights in the order that the kernels read.

bitsandbytes stores a weight [out, in] row by row, two numbers per byte, the first in the high
half. 64 numbers share a scale (absmax). With double quantization, scales are bytes: each stands
for one of 256 levels, times a scale that 256 of them share, plus an offset. Repacking does not
change any number: `reference.expand` equals bitsandbytes' own dequantization bit for bit.

Layouts (n: output, k: block of 64 inputs):
    numbers    [k, n, 32] uint8: byte j has input j of the block in its low half, input j + 32
               in its high half. So a tile of outputs is one run of bytes, and both halves are
               matrices that multiply 32 adjacent inputs: nothing is interleaved.
    scales     [k, n] uint8 (double quantization) or float32
    first      [n] int32: 256 * (n's first group) + place of n's first scale in it; scale k of n
               is in group (first[n] + k) >> 8
    offsets    [n] float32, added to the scales
    groups     [groups] float32: scales of scales
    levels     [256] float32: the numbers that bytes of ``scales`` stand for
    codes      [16] float32: the numbers that NF4 codes stand for
Without double quantization ``first``, ``offsets``, ``groups`` and ``levels`` have one element
each, unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

BLOCK: Final = 64
"""Numbers that share a scale."""
GROUP: Final = 256
"""Scales that share a scale."""


@dataclass(frozen=True, slots=True)
class PackedNf4:
    """One weight, or several stacked. The module's docstring gives the layouts."""

    numbers: torch.Tensor
    scales: torch.Tensor
    first: torch.Tensor
    offsets: torch.Tensor
    groups: torch.Tensor
    levels: torch.Tensor
    codes: torch.Tensor

    @property
    def out_features(self) -> int:
        """n."""
        return self.numbers.shape[1]

    @property
    def in_features(self) -> int:
        """64 * k."""
        return self.numbers.shape[0] * BLOCK

    @property
    def nested(self) -> bool:
        """Whether scales are bytes (double quantization)."""
        return self.scales.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(getattr(self, name).nbytes for name in self.__slots__)


def pack(weights: Sequence[tuple[torch.Tensor, Any]]) -> PackedNf4:
    """Pack weights that share an input, with their outputs one after the other.

    Args:
        weights: bitsandbytes' bytes and ``QuantState`` of each weight.

    Raises:
        ValueError: a weight is not NF4 in blocks of 64 along its inputs, or the weights are
            quantized in different ways.
    """
    for _, state in weights:
        _check(state, weights[0][1])
    return stack([_packed(data, state) for data, state in weights])


def stack(weights: Sequence[PackedNf4]) -> PackedNf4:
    """Stack weights that share an input, with their outputs one after the other."""
    if len(weights) == 1:
        return weights[0]
    made = replace(
        weights[0],
        numbers=torch.cat([w.numbers for w in weights], dim=1),
        scales=torch.cat([w.scales for w in weights], dim=1),
    )
    if not made.nested:
        return made
    first, before = [], 0
    for weight in weights:
        first.append(weight.first + GROUP * before)
        before += len(weight.groups)
    return replace(
        made,
        first=torch.cat(first),
        offsets=torch.cat([w.offsets for w in weights]),
        groups=torch.cat([w.groups for w in weights]),
    )


def _packed(data: torch.Tensor, state: Any) -> PackedNf4:
    numbers = _reordered(data, state)
    outputs, blocks = state.shape[0], numbers.shape[0]
    scales = state.absmax.view(-1, blocks).t().contiguous()
    codes = state.code.float().contiguous()
    if not state.nested:
        one = torch.zeros(1)
        return PackedNf4(
            numbers, scales.float(), one.int(), one, one.clone(), one.clone(), codes
        )
    return PackedNf4(
        numbers,
        scales,
        (torch.arange(outputs) * blocks).int(),
        torch.full((outputs,), float(state.offset)),
        state.state2.absmax.float(),
        state.state2.code.float().contiguous(),
        codes,
    )


def _check(state: Any, other: Any) -> None:
    if state.quant_type != "nf4" or state.blocksize != BLOCK:
        raise ValueError(
            f"{state.quant_type} in blocks of {state.blocksize}: kernels read nf4 in blocks of "
            f"{BLOCK}; quantize the base again, or serve it with another backend"
        )
    if state.shape[1] % BLOCK or state.shape[1] != other.shape[1]:
        raise ValueError(
            f"{state.shape[1]} inputs: must be a multiple of {BLOCK}, the same in a group"
        )
    if state.nested != other.nested:
        raise ValueError("weights with and without double quantization in one group")
    if state.nested and (
        state.state2.blocksize != GROUP or not torch.equal(state.state2.code, other.state2.code)
    ):
        raise ValueError("scales that were quantized in a way that bitsandbytes does not use")
    if not torch.equal(state.code, other.code):
        raise ValueError("weights of one group have different codes")


def _reordered(data: torch.Tensor, state: Any) -> torch.Tensor:
    """Reorder bitsandbytes' bytes to [k, n, 32]."""
    outputs, inputs = state.shape
    stored = data.contiguous().view(torch.uint8).view(-1)
    if len(stored) != outputs * inputs // 2:
        raise ValueError(f"{len(stored)} bytes for {outputs} x {inputs} numbers")
    each = torch.stack((stored >> 4, stored & 15), dim=-1).view(outputs, -1, BLOCK)
    low, high = each.chunk(2, dim=-1)
    return (low | (high << 4)).transpose(0, 1).contiguous()
