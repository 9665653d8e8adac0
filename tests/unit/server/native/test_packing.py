"""Quantizing and packing in native code: the bits of bitsandbytes, on any number of threads."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from veneer_server.backends.native.library import BFLOAT16, BLOCK, EIGHT_BIT, Library
from veneer_server.backends.native.packed.quantizing import quantize

SEED = 41
THREADS = (1, 3)
TINY = 2.0**-140
"""Subnormal in float32 and bfloat16, and zero in float16."""


def _bnb() -> Any:
    """bitsandbytes' functions; its import takes every worker a second."""
    from bitsandbytes import functional

    return functional


def weights(dtype: torch.dtype) -> torch.Tensor:
    """[24, 192]: each kind of block that a checkpoint may have, and each that it should not."""
    generator = np.random.default_rng(SEED)
    rows = torch.from_numpy(generator.standard_normal((24, 192))).float()
    rows[1] = 0.0
    rows[2] = -0.0
    rows[3] = 0.37
    rows[4] = TINY
    rows[5] = torch.linspace(-1, 1, 192) * TINY
    rows[6] *= 1e-38
    rows[7] *= 2.0**-20
    rows[8] *= 1e4
    rows[9, ::3] = 0.0
    rows[10] = torch.linspace(-1, 1, 192)
    rows[11, 5] = torch.inf
    rows[12, 70] = -torch.inf
    rows[13, 100] = torch.nan
    rows[14, 0], rows[14, 1] = torch.inf, torch.nan
    rows[15] = torch.nan
    rows[16] = torch.inf
    # The numbers and the bounds of both code books, in blocks whose largest is 1.
    rows[17] = 1.0
    for place, kind in ((0, "nf4"), (64, "fp4")):
        book = _bnb().quantize_4bit(torch.ones(64), quant_type=kind)[1].code.sort().values
        rows[17, place + 1 : place + 17] = book
        rows[17, place + 17 : place + 32] = (book[:-1] + book[1:]) / 2
    return rows.to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [True, False])
def test_codes_and_scales_are_those_of_bitsandbytes(
    library: Library, kind: str, dtype: torch.dtype, nested: bool
) -> None:
    """Bit for bit. With nested scales the broken rows are left out: one NaN would make all of
    theirs NaN, and so prove nothing."""
    print("seed", SEED)
    given = weights(dtype)
    if nested:
        given = torch.cat([given[:11], given[17:]])
    codes, state = _bnb().quantize_4bit(given, quant_type=kind, compress_statistics=nested)
    scales = state.absmax
    if nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(scales, state.state2) + state.offset
    for threads in THREADS:
        made = quantize(library, given, kind, nested=nested, threads=threads)
        assert torch.equal(made.codes.view(-1), codes.view(-1))
        same = made.scales.view(-1).view(torch.int32) == scales.view(torch.int32)
        assert bool((same | (made.scales.view(-1).isnan() & scales.isnan())).all())


def test_every_number_of_sixteen_bits_is_quantized_alike(library: Library) -> None:
    """All exponents and subnormals of float16 and bfloat16, each in a block with its likes."""
    bits = torch.arange(1 << 16).to(torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        given = bits.view(dtype).view(-1, 128)
        codes, state = _bnb().quantize_4bit(given, quant_type="nf4")
        made = quantize(library, given, "nf4", nested=False, threads=2)
        assert torch.equal(made.codes.view(-1), codes.view(-1))
        assert torch.equal(made.scales.view(-1).nan_to_num(), state.absmax.nan_to_num())


def four_bit_layout(codes: np.ndarray, scales: np.ndarray) -> bytes:
    """The layout of cpp/kernels/gemm/linear.h, written as it is described there."""
    outputs, inputs = codes.shape
    blocks = []
    for tile in range(0, outputs, 32):
        for first in range(0, inputs, BLOCK):
            part = np.zeros((32, BLOCK), np.uint16)
            some = codes[tile : tile + 32, first : first + BLOCK]
            part[: len(some)] = some
            # half, output of the half, group, pair of the group, which of the pair
            cut = part.reshape(2, 16, 8, 4, 2)
            words = sum(cut[:, :, :, q] << (4 * q) for q in range(4))
            blocks.append(words.transpose(0, 2, 1, 3).astype("<u2").tobytes())
            scale = np.zeros(32, "<f4")
            scale[: len(some)] = scales[tile : tile + 32, first // BLOCK]
            blocks.append(scale.tobytes())
    return b"".join(blocks)


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 64), (32, 64), (40, 192), (200, 128)])
def test_four_bits_are_packed_as_described(library: Library, outputs: int, inputs: int) -> None:
    print("seed", SEED)
    generator = np.random.default_rng(SEED)
    codes = generator.integers(0, 16, (outputs, inputs)).astype(np.uint8)
    scales = generator.standard_normal((outputs, inputs // BLOCK)).astype(np.float32)
    pairs = torch.from_numpy(codes[:, ::2] << 4 | codes[:, 1::2])
    for threads in THREADS:
        packed = library.pack_four_bit(pairs, torch.from_numpy(scales), threads=threads)
        assert packed.numpy().tobytes() == four_bit_layout(codes, scales)


def test_a_layout_that_changes_has_another_version(library: Library) -> None:
    """Files of packed weights are read by later versions. If this fails because the layout was
    changed, raise ``kLayout`` in pack.h, and put the new digest here."""
    numbers = torch.arange(72 * 128).view(72, 128)
    dense = ((numbers * 37 % 251) - 125).bfloat16()
    codes = (numbers[:, ::2] * 7 % 256).to(torch.uint8)
    scales = 1 + (numbers[:, ::64] % 9).float().contiguous()
    for threads in THREADS:
        found = hashlib.sha256()
        found.update(library.pack_four_bit(codes, scales, threads=threads).numpy())
        found.update(library.pack_dense(BFLOAT16, dense, threads=threads).numpy())
        found.update(library.pack_dense(EIGHT_BIT, dense, threads=threads).numpy())
        assert (library.layout, found.hexdigest()[:16]) == (1, "f594202fcaf338c5")
