"""Quantizes weights to 4 bits as bitsandbytes does, bit for bit, on several threads.

bitsandbytes' own quantizer for CPUs is a dozen torch operators over float32 copies and takes
50 ns per weight: a minute for a billion. Scales are nested by bitsandbytes itself, as they are
a 64th of the weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from veneer_server.backends.native.library import Library


@dataclass(frozen=True, slots=True)
class FourBitBlocks:
    """A weight in 4 bits, in blocks of 64.

    Attributes:
        codes: [outputs, inputs / 2] uint8, the earlier of two neighbours in the high half.
        scales: [outputs, inputs / 64] float32.
        book: [16] float32, the numbers that the codes mean.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    book: torch.Tensor


@functools.cache
def code_book(kind: str) -> torch.Tensor:
    """[16] float32: the numbers of ``nf4`` or ``fp4``."""
    from bitsandbytes.functional import get_4bit_type

    book: torch.Tensor = get_4bit_type(kind, device="cpu")
    return book


def quantize(
    library: Library, weight: torch.Tensor, kind: str, *, nested: bool = True, threads: int = 1
) -> FourBitBlocks:
    """As `bitsandbytes.functional.quantize_4bit` on a CPU, and with its scales expanded.

    Args:
        weight: [outputs, inputs], contiguous; inputs are a multiple of 64.
        nested: quantize the scales too, in blocks of 256 to 8 bits, and back.
    """
    book = code_book(kind)
    order = torch.argsort(book)
    bounds = (book[order[:-1]] + book[order[1:]]) / 2
    codes, scales = library.quantize(weight, bounds, order.to(torch.uint8), threads)
    return FourBitBlocks(codes, nested_scales(scales) if nested else scales, book)


def nested_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales after their own quantization and back, as `quantize_4bit` has them with
    ``compress_statistics``."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    flat = scales.view(-1)
    offset = flat.mean()
    codes, state = quantize_blockwise(flat - offset, blocksize=256)
    expanded: torch.Tensor = dequantize_blockwise(codes, state) + offset
    return expanded.view(scales.shape)
