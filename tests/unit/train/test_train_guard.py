"""Gradients survive an evaluation, and a fresh adapter equals the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from veneer_train.config import LoraConfig, QuantConfig
from veneer_train.data import TrainingSample
from veneer_train.evaluate import evaluate
from veneer_train.model import add_adapter, disable_cpu_packing, load_base

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 40)[None]
SAMPLES = (TrainingSample(tuple(range(3, 30)), tuple(range(3, 30)), 1),)


def gradients(folder: Path, *, evaluated: bool, guarded: bool) -> dict[str, torch.Tensor]:
    """First-layer LoRA gradients of one training pass, after an evaluation or not."""
    base = load_base(folder, QuantConfig(), CPU)
    layers = [m for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    if not guarded:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = has_avx512bf16()
    torch.manual_seed(1)
    model = add_adapter(base, LoraConfig(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.02)
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    model.zero_grad()
    if evaluated:
        evaluate(model, SAMPLES, batch=1)
        assert model.training
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {
        name: parameter.grad if parameter.grad is not None else torch.zeros(())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".layers.0." in name
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left | right)


def test_train_eval_train_gradients_equal_a_run_without_eval(tiny_base: Path) -> None:
    plain = gradients(tiny_base, evaluated=False, guarded=True)
    assert len(plain) == 14
    assert all(float(grad.norm()) > 0 for grad in plain.values())
    assert same(plain, gradients(tiny_base, evaluated=True, guarded=True))


@pytest.mark.skipif(
    not has_avx512bf16(), reason="this CPU has no AVX512-BF16, so bitsandbytes never packs"
)
@pytest.mark.filterwarnings("ignore")  # bitsandbytes warns that the kernel has no autograd
def test_without_the_guard_an_evaluation_breaks_the_gradients(tiny_base: Path) -> None:
    plain = gradients(tiny_base, evaluated=False, guarded=False)
    assert not same(plain, gradients(tiny_base, evaluated=True, guarded=False))


def test_the_guard_counts_what_it_guards(tiny_base: Path) -> None:
    assert disable_cpu_packing(load_base(tiny_base, QuantConfig(), CPU)) == 14
    assert disable_cpu_packing(load_base(tiny_base, QuantConfig(type="none"), CPU)) == 0


@pytest.mark.parametrize("kind", ["nf4", "fp4", "none"])
def test_a_fresh_adapter_gives_exactly_the_bases_logits(tiny_base: Path, kind: Any) -> None:
    base = load_base(tiny_base, QuantConfig(type=kind), CPU)
    with torch.no_grad():
        before = base(input_ids=TOKENS).logits
        model = add_adapter(base, LoraConfig(r=4)).eval()
        assert torch.equal(model(input_ids=TOKENS).logits, before)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
        assert not torch.equal(model(input_ids=TOKENS).logits, before)


def test_only_the_adapter_trains_and_in_fp32(tiny_base: Path) -> None:
    model = add_adapter(load_base(tiny_base, QuantConfig(), CPU), LoraConfig(r=4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert len(trained) == 2 * 7 * 2  # A and B, seven projections, two layers


def test_evaluate_is_a_mean_over_learned_tokens_whatever_the_batch(tiny_base: Path) -> None:
    model = load_base(tiny_base, QuantConfig(), CPU)
    rows = [tuple(range(3, 3 + n)) for n in (5, 17, 9, 30)]
    samples = [TrainingSample(row, (-100, -100, *row[2:]), i) for i, row in enumerate(rows)]
    alone = [evaluate(model, [sample], 1) for sample in samples]
    together = evaluate(model, samples, 3)
    tokens = sum(each.tokens for each in alone)
    assert together.tokens == tokens == sum(len(row) - 2 for row in rows)
    mean = sum(each.loss * each.tokens for each in alone) / tokens
    assert together.loss == pytest.approx(mean, rel=2e-3)  # bf16: padding moves rounding
    assert not model.training
