"""Before the first step a run says how long it will take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from veneer_train import loop
from veneer_train.cli import app
from veneer_train.config import TrainConfig, parse_config
from veneer_train.estimate import Estimate


def config(base: Path, jsonl: Path, folder: Path, **data: Any) -> TrainConfig:
    return parse_config(raw(base, jsonl, folder, **data))


def raw(base: Path, jsonl: Path, folder: Path, **data: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(base), "name": "tiny"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.3},
        "data": {"train": str(jsonl), "val_fraction": 0.25, "max_len": 256, **data},
        "train": {"lr": 0.01, "batch": 2, "accum": 2, "steps": 3},
        "output": {"dir": str(folder), "logs": f"{folder}.logs"},
    }


@pytest.mark.parametrize("packing", [False, True])
def test_it_is_told_before_the_first_step(
    tiny_base: Path, chats: Path, tmp_path: Path, packing: bool
) -> None:
    said: list[Any] = []
    loop.train(
        config(tiny_base, chats, tmp_path / "a", packing=packing),
        said.append,
        expect=said.append,
    )
    steps = [at for at, one in enumerate(said) if not isinstance(one, Estimate)]
    (told,) = (at for at, one in enumerate(said) if isinstance(one, Estimate))
    first = next(at for at in steps if said[at]["event"] == "step")
    assert told < first
    estimate = said[told]
    assert estimate.steps == 3
    assert estimate.seconds > 0
    last = [said[at] for at in steps if said[at]["event"] == "step"][-1]
    # Padding counts in one, and not in the other; the order of an epoch is a sample of all.
    assert 0.5 * last["tokens"] <= estimate.tokens <= 3 * last["tokens"]


def test_measuring_changes_nothing_of_the_run(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    """Not even its random numbers: with dropout, one that was drawn would show."""
    for name, expect in (("plain", None), ("measured", lambda told: None)):
        loop.train(config(tiny_base, chats, tmp_path / name), lambda row: None, expect=expect)
    weights = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("plain", "measured")
    ]
    assert weights[0] == weights[1]


def test_the_command_prints_it(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(json.dumps(raw(tiny_base, chats, tmp_path / "mine")))  # JSON is YAML
    done = CliRunner().invoke(app, ["train", str(settings)])
    assert done.exit_code == 0, done.output
    lines = done.stderr.splitlines()
    (expected,) = (at for at, line in enumerate(lines) if line.startswith("3 steps, "))
    assert " tokens: about " in lines[expected]
    assert expected < next(at for at, line in enumerate(lines) if line.startswith("step 1/3"))


def test_it_says_when_the_time_will_not_do() -> None:
    assert str(Estimate(200, 310_000, 700.0)) == "200 steps, 310,000 tokens: about 12 min"
    assert str(Estimate(2, 3, 12.0, limit_s=60.0)) == "2 steps, 3 tokens: about 12 s"
    cut = Estimate(20_000, 31_000_000, 9000.0, limit_s=1800.0)
    assert str(cut).endswith("about 2.5 h, of which train.max_minutes allows 30 min")
