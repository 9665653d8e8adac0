"""After training: evaluating and verifying an adapter; and inspecting data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result
from veneer_registry.errors import InvalidField
from veneer_train.cli import app

from tests.refused import refused
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
    again = val.with_name("other.jsonl")
    again.write_text(val.read_text().replace("Say 1", "Tell 1"))
    done = invoke("verify", adapter, "--base", tiny_base, "--data", again)
    assert done.exit_code == 1
    assert "no figure for the present other.jsonl" in done.stderr

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
    assert "a base other than" in done.stderr

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
        ("", "has no samples"),
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


def test_what_was_held_out_of_the_training_file_cannot_be_verified(
    tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    run(config(tiny_base, chats, out))
    done = invoke("verify", out, "--base", tiny_base, "--data", chats)
    assert done.exit_code == 1
    assert "set data.val in training" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "ADAPTER", "--data", "VAL"],
        ["verify", "ADAPTER"],
        ["merge", "ADAPTER", "--out", "new"],
        ["quantize", "--out", "new"],
        ["inspect-data", "VAL"],
        ["lab", "quant-error", "--out", "new"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_base_that_is_not_there_is_one_line(
    adapter: Path, val: Path, tmp_path: Path, arguments: list[str]
) -> None:
    names = {"ADAPTER": adapter, "VAL": val, "new": tmp_path / "new"}
    asked = [names.get(a, a) for a in arguments]
    done = invoke(*asked, "--base", tmp_path / "typo")
    assert done.exit_code == 1
    assert "not a model folder" in done.stderr


def test_a_folder_in_4_bits_is_taken_as_what_it_is(
    tiny_base: Path, chats: Path, val: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tiny-fp4"
    asked = (
        "quantize",
        "--base",
        tiny_base,
        "--out",
        out,
        "--type",
        "fp4",
        "--no-double-quant",
    )
    assert invoke(*asked).exit_code == 0
    with refused(InvalidField, field="quant.type", found="fp4"):
        run(config(out, chats, tmp_path / "mine"))
    quant = {"type": "fp4", "double_quant": False}
    run(config(out, chats, tmp_path / "mine", quant=quant))
    done = invoke("eval", tmp_path / "mine", "--base", out, "--data", val, "--json")
    assert list(json.loads(done.stdout)) == ["4-bit base", "4-bit base + adapter"]
    done = invoke("merge", tmp_path / "mine", "--base", out, "--out", tmp_path / "merged")
    assert done.exit_code == 1
    assert "in 4 bits" in done.stderr


def test_a_run_over_16_bits_can_be_measured_and_merged(
    tiny_base: Path, chats: Path, val: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    run(config(tiny_base, chats, out, quant={"type": "none"}))
    done = invoke("eval", out, "--base", tiny_base, "--data", val, "--json")
    assert list(json.loads(done.stdout)) == ["16-bit base", "16-bit base + adapter"]
    asked = ("merge", out, "--base", tiny_base, "--out", tmp_path / "merged", "--json")
    found = json.loads(invoke(*asked).stdout)["divergence"]
    assert list(found) == ["16-bit base + adapter"]
    assert found["16-bit base + adapter"]["relative"] < 2e-2  # bf16 weights
