"""Bases for the CUDA kernels: NF4 quantized here as by bitsandbytes, FP8 within its bound."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from veneer_server.backends.cuda.fp8 import packing as fp8
from veneer_server.backends.cuda.fp8 import reference as fp8_reference
from veneer_server.backends.cuda.nf4 import packing, quantizing
from veneer_server.models.source_weights import SourceWeights

from tests.tiny_llama import make_tiny_llama


def _weight(seed: int, outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers of many magnitudes, a row of zeros, and numbers halfway between codes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= 10.0 ** torch.randint(-4, 3, (outputs, 1), generator=generator)
    weight[0] = 0
    codes = torch.tensor(quantizing.CODES)
    weight[1, :15] = (codes[1:] + codes[:-1]) / 2
    weight[1, 15] = 1
    return weight.to(dtype)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_has_the_bits_of_bitsandbytes(dtype: torch.dtype, nested: bool) -> None:
    for seed in range(8):
        weight = _weight(seed, 3 + 29 * seed, 64 * (1 + seed), dtype)
        data, state = bnb.quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
        expected = packing.pack([(data, state)])
        got = quantizing.quantize(weight, nested=nested)
        for field in fields(got):
            mine, theirs = getattr(got, field.name), getattr(expected, field.name)
            assert torch.equal(mine, theirs), f"{field.name}, seed {seed}"


def test_scales_between_levels_take_bitsandbytes_choice() -> None:
    """It looks them up in a table, which rounds some of them the other way."""
    weight = torch.zeros(1, 64 * 256)
    places = torch.randint(0, 32768, (256,), generator=torch.Generator().manual_seed(0))
    weight[0, ::64] = (places + 0.5) / 32767.5
    weight[0, 0], weight[0, 64] = 1, 0
    _, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    got = quantizing.quantize(weight)
    assert torch.equal(got.scales.view(-1), state.absmax)


def test_damaged_weights_are_not_quantized() -> None:
    weight = torch.zeros(2, 64)
    with pytest.raises(ValueError):  # noqa: PT011 (its words are for people)
        quantizing.quantize(torch.zeros(2, 65))
    weight[1, 5] = torch.nan
    with pytest.raises(ValueError):  # noqa: PT011 (its words are for people)
        quantizing.quantize(weight)


def test_fp8_is_as_precise_as_its_three_bits_of_mantissa() -> None:
    """By half a unit: 2 ** -4 of a number; 2 ** -10 of the scale where numbers are
    subnormal."""
    for seed in range(6):
        weight = _weight(seed, 20, 128, torch.bfloat16)
        packed = fp8.pack([weight[:7], weight[7:]])
        got = fp8_reference.expand(packed)
        wrong = (got - weight.float()).abs()
        assert (
            wrong <= torch.maximum(weight.float().abs() / 16, packed.scales[:, None] / 1024)
        ).all()
        # The largest number of each output uses e4m3's upper octave.
        most = weight.float().abs().amax(dim=1) / packed.scales
        assert ((most == 0) | ((most > 224) & (most <= 448))).all()


def test_adapters_are_referred_to_the_numbers_that_fp8_serves(tmp_path: Path) -> None:
    """What `SourceWeights` reads is what the kernels multiply by."""
    folder = make_tiny_llama(tmp_path)
    with (
        SourceWeights(folder, "fp8", torch.bfloat16) as served,
        SourceWeights(folder, "none", torch.bfloat16) as plain,
    ):
        for mine, theirs in zip(served.layers, plain.layers, strict=True):
            expected = fp8_reference.expand(fp8.pack([theirs.down.weight]))
            assert torch.equal(mine.down.weight, expected)
            assert not torch.equal(mine.down.weight, theirs.down.weight)


def test_fp8_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (its words are for people)
        fp8.pack([torch.full((1, 64), torch.inf)])
    with pytest.raises(ValueError):  # noqa: PT011 (its words are for people)
        fp8.pack([torch.zeros(1, 64), torch.zeros(1, 128)])
