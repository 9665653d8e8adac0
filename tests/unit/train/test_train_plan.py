"""The memory plan, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from veneer_registry.errors import InvalidField
from veneer_train.cli import app
from veneer_train.config import load_config
from veneer_train.plan import LLAMA_65B, plan, read_shape

from tests.refused import refused

GIVEN = {
    "model": {"path": "-", "name": "-"},
    "data": {"train": "-", "max_len": 512},
    "output": {"dir": "-"},
}


def test_parameters_are_counted_as_they_are(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert read_shape(tiny_base).parameters == sum(p.numel() for p in model.parameters())


def test_the_paper_s_row() -> None:
    """LLaMA 65B: over 780 GB in full (16-bit weights and gradients, two fp32 moments), and by
    QLoRA what one 48 GB card holds, where optimizer states may be paged out."""
    config = load_config(preset="paper", under=GIVEN)
    full = plan(LLAMA_65B, config, method="full", device="cuda")
    small = plan(LLAMA_65B, config, method="qlora", device="cuda")
    assert small.total < 52e9
    assert LLAMA_65B.parameters == pytest.approx(65.2e9, rel=0.01)
    parts = full.parts
    assert parts["base weights"] + parts["gradients"] + parts["optimizer"] > 780e9
    assert small.total - small.parts["optimizer"] < 48e9
    assert small.parts["base weights"] == pytest.approx(34.2e9, rel=0.02)


def test_what_saves_memory_saves_it_in_the_plan(tiny_base: Path) -> None:
    shape = read_shape(tiny_base)

    def total(*settings: str, method: str = "qlora") -> int:
        config = load_config(settings=settings, under=GIVEN)
        return plan(shape, config, method=method).total  # type: ignore[arg-type]

    usual = total()
    assert total("train.batch=2") < usual
    assert total("lora.r=4") < usual
    assert total("train.optim=adamw_8bit") < usual
    assert total("train.checkpointing=on") < usual
    # Of a base this small the copies that an adapter's inputs make outweigh all weights.
    assert usual < total(method="lora")
    base = plan(LLAMA_65B, load_config(under=GIVEN), method="lora").total
    assert base < plan(LLAMA_65B, load_config(under=GIVEN), method="full").total


def test_the_command(tiny_base: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "--base", str(tiny_base), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {"qlora", "lora", "full"}
    assert found["full"]["total"] == sum(found["full"]["parts"].values())
    shown = CliRunner().invoke(app, ["plan", "--llama-65b", "--preset", "paper"])
    assert "LLaMA-65B" in shown.stdout
    with refused(InvalidField, field="base"):
        read_shape(tmp_path)
