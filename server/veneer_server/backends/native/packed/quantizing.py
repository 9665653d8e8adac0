"""Quantizes weights to 4 bits as bitsandbytes does, bit for bit, on several threads.

bitsandbytes' own quantizer for CPUs runs a dozen torch operators over float32 copies and takes
50 ns per weight: a minute for a billion. The scales are quantized by bitsandbytes itself, since
there are only a 64th as many of them.
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
        book: [16] float32, the numbers that the codes stand for.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    book: torch.Tensor


@functools.cache
def code_book(kind: str) -> torch.Tensor:
    """Return the numbers that the codes of ``nf4`` or ``fp4`` stand for: [16] float32."""
    from bitsandbytes.functional import get_4bit_type

    book: torch.Tensor = get_4bit_type(kind, device="cpu")
    return book


def quantize(
    library: Library, weight: torch.Tensor, kind: str, *, nested: bool = True, threads: int = 1
) -> FourBitBlocks:
    """Quantize a weight as `bitsandbytes.functional.quantize_4bit` does on a CPU, but return
    nested scales expanded.

    Args:
        weight: [outputs, inputs], contiguous; inputs are a multiple of 64.
        nested: round the scales too, to 8 bits in blocks of 256.
    """
    book = code_book(kind)
    order = torch.argsort(book)
    bounds = (book[order[:-1]] + book[order[1:]]) / 2
    codes, scales = library.quantize(weight, bounds, order.to(torch.uint8), threads)
    return FourBitBlocks(codes, nested_scales(scales) if nested else scales, book)


def nested_scales(scales: torch.Tensor) -> torch.Tensor:
    """Quantize and dequantize scales, as `quantize_4bit` does with ``compress_statistics``."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    flat = scales.view(-1)
    offset = flat.mean()
    codes, state = quantize_blockwise(flat - offset, blocksize=256)
    expanded: torch.Tensor = dequantize_blockwise(codes, state) + offset
    return expanded.view(scales.shape)
