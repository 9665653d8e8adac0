"""Quantizes weights to NF4 without bitsandbytes, to the same bits, in the kernels' layout.

It is for machines without bitsandbytes. Results must not depend on which of the two quantized
the base, so this computes the same as bitsandbytes' (0.50) functions for CPUs: `quantize_4bit`
in blocks of 64, where ``nested`` means its ``compress_statistics``. The CUDA kernels of
bitsandbytes may round differently.
"""

from __future__ import annotations

import functools
from typing import Final

import torch

from veneer_server.backends.cuda.nf4.packing import BLOCK, GROUP, PackedNf4
from veneer_server.models.checkpoint.code_books import NF4

CODES: Final = NF4
"""The numbers that the 16 codes stand for."""
STEPS: Final = 65535
SMALLEST: Final = 1e-38
"""Divisor for a block of zeros, in place of its largest magnitude."""


@functools.cache
def levels() -> torch.Tensor:
    """Return the numbers that the bytes of nested scales stand for, [256] float32. They are
    bitsandbytes' "dynamic" map: seven decades, larger ones in finer steps, plus 0 and 1."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32)


def quantize(weight: torch.Tensor, *, nested: bool = True) -> PackedNf4:
    """Quantize and pack a weight.

    Args:
        weight: [out, in], any float; in is a multiple of 64.
        nested: whether to quantize the scales to bytes, too.

    Raises:
        ValueError: the inputs cannot be divided into blocks, or a number is not finite.
    """
    outputs, inputs = weight.shape
    if inputs % BLOCK:
        raise ValueError(f"{inputs} inputs: must be a multiple of {BLOCK}")
    blocks = weight.float().reshape(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    if not bool(largest.isfinite().all()):
        raise ValueError("a weight has an infinity or a NaN: the checkpoint is damaged")
    codes = torch.tensor(CODES)
    scaled = blocks * (1.0 / largest.clamp(min=SMALLEST)).unsqueeze(1)
    between = (codes[:-1] + codes[1:]) / 2
    # A number halfway between two codes gets the smaller one.
    found = torch.bucketize(scaled.clamp(-1, 1), between, out_int32=True).to(torch.uint8)
    low, high = found.view(outputs, -1, BLOCK).chunk(2, dim=-1)
    numbers = (low | (high << 4)).transpose(0, 1).contiguous()
    count = inputs // BLOCK
    if not nested:
        one = torch.zeros(1)
        scales = largest.view(outputs, count).t().contiguous()
        return PackedNf4(numbers, scales, one.int(), one, one.clone(), one.clone(), codes)
    offset = largest.mean()
    scales, groups = _bytes(largest - offset)
    return PackedNf4(
        numbers,
        scales.view(outputs, count).t().contiguous(),
        (torch.arange(outputs) * count).int(),
        torch.full((outputs,), float(offset)),
        groups,
        levels(),
        codes,
    )


@functools.cache
def _nearest() -> torch.Tensor:
    """Return the nearest level to each of 65536 evenly spaced places from -1 to 1, as uint8."""
    book = levels()
    places = torch.arange(STEPS + 1).float() / (STEPS / 2) - 1
    upper = torch.searchsorted(book, places, right=True).clamp(1, len(book) - 1)
    nearer = (places - book[upper]).abs() < (places - book[upper - 1]).abs()
    return torch.where(nearer, upper, upper - 1).to(torch.uint8)


def _bytes(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``scales`` to bytes. Returns these and the largest magnitude of each group of
    256. Bytes come from a table, as in bitsandbytes, so a scale near the middle of two levels
    may get the farther one."""
    padded = torch.zeros(-(-len(scales) // GROUP) * GROUP)
    padded[: len(scales)] = scales
    of_group = padded.view(-1, GROUP)
    largest = of_group.abs().amax(dim=1)
    inverse = torch.where(largest > 0, 1.0 / largest, 0.0)
    scaled = of_group * inverse.unsqueeze(1)
    place = ((scaled + 1) * (STEPS / 2) + 0.5).int().clamp(0, STEPS)
    return _nearest()[place].view(-1)[: len(scales)], largest
