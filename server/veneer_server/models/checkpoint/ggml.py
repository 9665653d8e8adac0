"""GGUF's block types, read into `QuantizedMatrix` without changing a number.

Layouts are those of llama.cpp's ``ggml-common.h`` and ``ggml-quants.c``. A row is a run of
blocks of 32 or 256 numbers. K types have blocks of blocks: a float16 scale for 256 numbers, and
an integer of 4 to 8 bits for each 16 or 32 of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from veneer_registry.gguf_header import BLOCK_TYPES

from veneer_server.models.packed import row_slices
from veneer_server.models.quantized import BlockFactors, QuantizedMatrix, packed_codes, stacked

IQ4_NL: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The numbers of IQ4_NL and IQ4_XS."""
E2M1: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""The numbers of MXFP4 times two, as GGUF has them; scales are halved to match."""


def read_matrix(kind: str, data: torch.Tensor, shape: tuple[int, int]) -> QuantizedMatrix:
    """Read a matrix of a type in `BLOCK_TYPES`.

    Args:
        kind: name of the type.
        data: its bytes, uint8; they are copied.
        shape: (rows, columns); columns are a multiple of the type's block.
    """
    rows, columns = shape
    numbers, size = BLOCK_TYPES[kind]
    blocks = data.view(rows, columns // numbers, size)
    # A part at a time: unpacked codes take twice the memory of packed ones.
    parts = [_READERS[kind](blocks[each]) for each in row_slices(rows, columns)]
    found = stacked(parts)
    assert found is not None
    return found


def _own(data: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy: the bytes that were read may be overwritten."""
    return data.clone(memory_format=torch.contiguous_format)


def _halves(data: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes of float16 -> [..., n / 2]."""
    return _own(data).view(torch.float16)


def _nibbles(data: torch.Tensor, run: int) -> torch.Tensor:
    """[rows, blocks, bytes] -> [rows, blocks, 2 * bytes]: the low halves of each run of bytes,
    then their high halves."""
    runs = data.reshape(*data.shape[:2], -1, run)
    return torch.stack((runs & 0xF, runs >> 4), dim=3).flatten(2)


def _made(
    numbers: torch.Tensor,
    bits: int,
    table: torch.Tensor,
    scales: BlockFactors,
    mins: BlockFactors | None = None,
) -> QuantizedMatrix:
    codes, high = packed_codes(numbers.flatten(1), bits)
    columns = numbers.shape[1] * numbers.shape[2]
    return QuantizedMatrix(columns, bits, codes, high, table, scales, mins)


def _from(first: int, bits: int) -> torch.Tensor:
    return torch.arange(first, first + (1 << bits), dtype=torch.float32)


def _factors(data: torch.Tensor) -> BlockFactors:
    return BlockFactors(_halves(data).flatten(1))


def _q4_0(blocks: torch.Tensor) -> QuantizedMatrix:
    return _made(_nibbles(blocks[:, :, 2:], 16), 4, _from(-8, 4), _factors(blocks[:, :, :2]))


def _q4_1(blocks: torch.Tensor) -> QuantizedMatrix:
    scales, mins = _factors(blocks[:, :, :2]), _factors(blocks[:, :, 2:4])
    return _made(_nibbles(blocks[:, :, 4:], 16), 4, _from(0, 4), scales, mins)


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """[rows, blocks, 4] -> [rows, blocks, 32]: bit i of 32 is the fifth bit of number i."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((data.unsqueeze(3) >> shifts) & 1).flatten(2)


def _q5_0(blocks: torch.Tensor) -> QuantizedMatrix:
    numbers = _nibbles(blocks[:, :, 6:], 16) | (_fifth_bits(blocks[:, :, 2:6]) << 4)
    return _made(numbers, 5, _from(-16, 5), _factors(blocks[:, :, :2]))


def _q5_1(blocks: torch.Tensor) -> QuantizedMatrix:
    numbers = _nibbles(blocks[:, :, 8:], 16) | (_fifth_bits(blocks[:, :, 4:8]) << 4)
    scales, mins = _factors(blocks[:, :, :2]), _factors(blocks[:, :, 2:4])
    return _made(numbers, 5, _from(0, 5), scales, mins)


def _q8_0(blocks: torch.Tensor) -> QuantizedMatrix:
    signed = torch.arange(256, dtype=torch.uint8).view(torch.int8).float()
    return _made(_own(blocks[:, :, 2:]), 8, signed, _factors(blocks[:, :, :2]))


def _k_factors(blocks: torch.Tensor) -> tuple[BlockFactors, BlockFactors]:
    """Scales and mins of Q4_K and Q5_K: two float16, then 12 bytes of eight 6-bit scales and
    eight 6-bit mins."""
    low, mid, top = blocks[:, :, 4:16].reshape(*blocks.shape[:2], 3, 4).unbind(2)
    scales = torch.cat((low & 0x3F, (top & 0x0F) | ((low >> 2) & 0x30)), dim=2)
    mins = torch.cat((mid & 0x3F, (top >> 4) | ((mid >> 2) & 0x30)), dim=2)
    of_scales, of_mins = (_halves(blocks[:, :, at : at + 2]).flatten(1) for at in (0, 2))
    return (
        BlockFactors(of_scales, scales.flatten(1)),
        BlockFactors(-of_mins, mins.flatten(1)),
    )


def _q4_k(blocks: torch.Tensor) -> QuantizedMatrix:
    return _made(_nibbles(blocks[:, :, 16:], 32), 4, _from(0, 4), *_k_factors(blocks))


def _q5_k(blocks: torch.Tensor) -> QuantizedMatrix:
    shifts = torch.arange(8, dtype=torch.uint8).unsqueeze(1)
    fifth = ((blocks[:, :, None, 16:48] >> shifts) & 1).flatten(2)
    numbers = _nibbles(blocks[:, :, 48:], 32) | (fifth << 4)
    return _made(numbers, 5, _from(0, 5), *_k_factors(blocks))


def _q6_k(blocks: torch.Tensor) -> QuantizedMatrix:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(1)
    top = blocks[:, :, 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    numbers = _nibbles(blocks[:, :, :128], 64) | (((top >> shifts) & 3).flatten(2) << 4)
    inner = _own(blocks[:, :, 192:208]).view(torch.int8).flatten(1)
    scales = BlockFactors(_halves(blocks[:, :, 208:]).flatten(1), inner)
    return _made(numbers, 6, _from(-32, 6), scales)


def _iq4_nl(blocks: torch.Tensor) -> QuantizedMatrix:
    table = torch.tensor(IQ4_NL, dtype=torch.float32)
    return _made(_nibbles(blocks[:, :, 2:], 16), 4, table, _factors(blocks[:, :, :2]))


def _iq4_xs(blocks: torch.Tensor) -> QuantizedMatrix:
    """Eight scales of 6 bits: the low four in bytes 4 to 7, the others in bytes 2 and 3."""
    low = _nibbles(blocks[:, :, 4:8], 1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    top = ((blocks[:, :, 2:4].unsqueeze(3) >> shifts) & 3).flatten(2)
    inner = (low | (top << 4)).to(torch.int8) - 32
    scales = BlockFactors(_halves(blocks[:, :, :2]).flatten(1), inner.flatten(1))
    table = torch.tensor(IQ4_NL, dtype=torch.float32)
    return _made(_nibbles(blocks[:, :, 8:], 16), 4, table, scales)


def _mxfp4(blocks: torch.Tensor) -> QuantizedMatrix:
    scales = BlockFactors(half_powers_of_two(blocks[:, :, 0]))
    table = torch.tensor(E2M1, dtype=torch.float32)
    return _made(_nibbles(blocks[:, :, 1:], 16), 4, table, scales)


def half_powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Half of each E8M0 scale: uint8 e -> 2 ** (e - 128) in bfloat16, exact (the two smallest
    are subnormal numbers)."""
    bits = torch.where(exponents < 2, 0x20 << exponents.int(), (exponents.int() - 1) << 7)
    return bits.to(torch.int16).view(torch.bfloat16)


_READERS: Final[dict[str, Callable[[torch.Tensor], QuantizedMatrix]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
