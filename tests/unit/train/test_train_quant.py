"""Known figures of 4-bit quantization."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch
from typer.testing import CliRunner
from veneer_train.cli import app
from veneer_train.labs.quant import BITS, restored

OFFSET = 0.9677083
"""Quantile of the outermost level (arXiv 2305.14314, appendix E; bitsandbytes)."""


def test_nf4_is_made_of_normal_quantiles() -> None:
    """bitsandbytes' table within 2e-7, fp32's precision below 1 and a half."""
    quantile = NormalDist().inv_cdf

    def levels(count: int) -> list[float]:
        """From the outermost to the last before 0, which is shared."""
        step = (OFFSET - 0.5) / count
        return [quantile(OFFSET - step * n) for n in range(count)]

    above, below = levels(8), [-x for x in levels(7)]
    book = sorted([*above, 0.0, *below])
    book = [x / max(book) for x in book]
    table = bnb.get_4bit_type("nf4", device="cpu")
    assert table.tolist() == pytest.approx(book, abs=2e-7)


@pytest.mark.parametrize(
    ("mode", "mean", "sigma"), [("nf4", 0.072798, 0.000074), ("fp4", 0.096543, 0.000111)]
)
def test_the_error_on_normal_numbers_is_the_known_one(
    mode: str, mean: float, sigma: float
) -> None:
    """bitsandbytes' own test table (1024 x 1024, blocks of 64), within 7 sigma."""
    numbers = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    error = float((restored(numbers, mode) - numbers).abs().mean())
    assert error == pytest.approx(mean, abs=7 * sigma)


def test_even_levels_are_worse_than_quantiles_on_normal_numbers() -> None:
    numbers = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    errors = {m: float((restored(numbers, m) - numbers).abs().mean()) for m in BITS}
    assert errors["bf16"] < errors["nf4"] < errors["nf4-dq"] < errors["int4"] < errors["fp4"]
    assert errors["int4"] == pytest.approx(0.091349, abs=1e-4)  # seen at this seed


def test_double_quantization_saves_what_it_says() -> None:
    weight = torch.randn(1024, 1024)

    def bits(double: bool) -> float:
        _, state = bnb.quantize_4bit(
            weight, blocksize=64, compress_statistics=double, quant_type="nf4"
        )
        scales = [state.absmax, state.state2.absmax] if double else [state.absmax]
        return 8 * sum(scale.nbytes for scale in scales) / weight.numel()

    assert bits(False) - bits(True) == 0.373046875
    assert BITS["nf4"] - BITS["nf4-dq"] == 0.373046875


def test_a_base_in_4_bits_loads_as_one(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny-nf4"
    asked = ["quantize", "--base", str(tiny_base), "--out", str(out), "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    before, after = json.loads(done.stdout)["linear layers"]
    assert 1 - after / before == pytest.approx(1 - (4 + 0.126953125) / 16, abs=0.01)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    assert (out / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()

    from transformers import AutoModelForCausalLM
    from veneer_train.config import QuantConfig
    from veneer_train.model import disable_cpu_packing, load_base

    stored = AutoModelForCausalLM.from_pretrained(out).eval()
    disable_cpu_packing(stored)
    fresh = load_base(tiny_base, QuantConfig(), torch.device("cpu"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(stored(ids).logits, fresh(ids).logits)
    again = CliRunner().invoke(app, asked)
    assert (again.exit_code, "exists" in again.stderr) == (1, True)
