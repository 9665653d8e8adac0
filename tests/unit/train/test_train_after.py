"""What is done with a trained adapter: evaluating, verifying; and looking at data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result
from veneer_train.cli import app

from tests.unit.train.test_train_run import config, run


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def val(jsonl: Callable[..., Path]) -> Path:
    def turn(number: int) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": f"Say {number}."},
                {"role": "assistant", "content": f"I say {number}."},
            ],
            "check": {"exact": True},
        }

    return jsonl(*(turn(n) for n in range(4)), name="val.jsonl")


@pytest.fixture
def adapter(tiny_base: Path, chats: Path, val: Path, tmp_path: Path) -> Path:
    out = tmp_path / "mine"
    data = {"val": str(val), "val_fraction": 0.0}
    run(config(tiny_base, chats, out, data=data, eval={"tasks": 2}, train={"steps": 8}))
    return out


def test_eval_tells_base_and_adapter_apart(adapter: Path, tiny_base: Path, val: Path) -> None:
    done = invoke("eval", adapter, "--base", tiny_base, "--data", val, "--json", "--record")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == ["16-bit base", "4-bit base", "4-bit base + adapter"]
    assert found["4-bit base + adapter"]["loss"] < found["4-bit base"]["loss"]
    assert found["4-bit base"]["exact_asked"] == 4
    manifest = json.loads((adapter / "training_manifest.json").read_text())
    assert manifest["evaluations"]["val.jsonl"] == found
    # What training measured, measured again by another path.
    after = manifest["metrics"]["val_loss_after"]
    assert found["4-bit base + adapter"]["loss"] == pytest.approx(after, abs=0.01)
    assert {"val_exact_before", "val_exact_after"} <= set(manifest["metrics"])


def test_verify_says_what_holds(adapter: Path, tiny_base: Path, val: Path) -> None:
    done = invoke("verify", adapter, "--base", tiny_base, "--data", val)
    assert done.exit_code == 0, done.output
    assert "whole:" in done.stdout
    assert "for this base" in done.stdout
    assert "as its manifest says" in done.stdout


def test_verify_refuses_what_does_not_hold(
    adapter: Path, tiny_base: Path, val: Path, tmp_path: Path
) -> None:
    file = adapter / "training_manifest.json"
    manifest = json.loads(file.read_text())
    manifest["metrics"]["val_loss_after"] -= 0.5
    file.write_text(json.dumps(manifest))
    done = invoke("verify", adapter, "--base", tiny_base, "--data", val)
    assert done.exit_code == 1
    assert "the manifest says" in done.stderr

    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = invoke("verify", adapter, "--base", other)
    assert done.exit_code == 1
    assert "another base" in done.stderr

    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    done = invoke("verify", adapter, "--base", tiny_base)
    assert done.exit_code == 1


def test_inspect_data_shows_what_is_learned(tiny_base: Path, val: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["inspect-data", str(val), "--base", str(tiny_base), "--samples", "1"],
        color=True,
    )
    assert done.exit_code == 0, done.output
    assert "I say 0." in done.stdout
    assert "I say 1." not in done.stdout
    facts = json.loads(invoke("inspect-data", val, "--base", tiny_base, "--json").stdout)
    assert facts["samples"] == 4
    assert facts["with_check"] == 4
    assert 0 < facts["learned_share"] < 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no sample"),
        ('{"messages": []}\n', "line 1"),
        ('{"prompt": "a", "completion": "b"}\nnonsense\n', "line 2: is not JSON"),
    ],
)
def test_bad_data_names_file_and_line(
    tiny_base: Path, tmp_path: Path, content: str, told: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    done = invoke("inspect-data", file, "--base", tiny_base)
    assert done.exit_code == 1
    assert "bad.jsonl" in done.stderr
    assert told in done.stderr
