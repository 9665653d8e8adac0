"""The file overrides a preset; --set overrides the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from veneer_registry.errors import InvalidField
from veneer_train.config import PRESETS, load_config

from tests.refused import refused

GIVEN = {
    "model": {"path": "-", "name": "base"},
    "data": {"train": "x.jsonl"},
    "output": {"dir": "out"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_a_config(name: str) -> None:
    assert load_config(preset=name, under=GIVEN).model.name == "base"


def test_the_paper_s() -> None:
    """What the QLoRA authors' script sets."""
    found = load_config(preset="paper", under=GIVEN)
    assert (found.lora.r, found.lora.alpha) == (64, 16)
    assert (found.train.lr, found.train.clip) == (2e-4, 0.3)
    assert found.train.optim == "paged_adamw_32bit"
    assert found.train.schedule == "constant"
    assert (found.quant.type, found.quant.double_quant) == ("nf4", True)
    assert found.train.checkpointing == "on"


def test_the_nearer_setting_wins(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: quick\nlora: {r: 4}\n")
    found = load_config(file, ["train.steps=7"], under=GIVEN)
    assert (found.lora.r, found.lora.alpha) == (4, 16)  # the file's, the preset's
    assert (found.train.steps, found.train.accum) == (7, 1)
    assert load_config(file, preset="paper", under=GIVEN).train.clip == 0.3


def test_a_base_on_the_command_line_names_itself() -> None:
    given = {key: value for key, value in GIVEN.items() if key != "model"}
    found = load_config(preset="quick", under=given, base="/bases/smollm2-135m/")
    assert found.model.path == "/bases/smollm2-135m"
    assert found.model.name == "smollm2-135m"
    named = load_config(preset="quick", under=GIVEN, base="/elsewhere/snapshot")
    assert named.model.name == "base"


def test_an_unknown_preset_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: fast\n")
    with refused(InvalidField, field="preset"):
        load_config(file, under=GIVEN)
