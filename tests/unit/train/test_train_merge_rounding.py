"""What a merge loses to rounding, and what that is measured on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from veneer_registry.errors import AdapterInvalid, InvalidField
from veneer_train.cli import app
from veneer_train.llama_cpp.export import export_model
from veneer_train.merge import DTYPES, dequantized_base, merge
from veneer_train.merge_report import REPORT_FILE, merge_and_compare

from tests.refused import refused
from tests.unit.train.test_train_merge import FP32
from tests.unit.train.test_train_run import config, run


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [
        [
            {"role": "user", "content": f"Say {n}."},
            {"role": "assistant", "content": f"I say {n}, and {n * n}."},
        ]
        for n in range(12)
    ]
    file.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    return file


@pytest.fixture(scope="module")
def trained(tiny_base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "mine"
    run(config(tiny_base, chats, folder, train={"steps": 8}))
    return folder


def scaled(adapter: Path, by: float, folder: Path) -> Path:
    """The adapter with another alpha: as if it had been trained more, or less."""
    shutil.copytree(adapter, folder)
    facts = json.loads((folder / "adapter_config.json").read_text())
    facts["lora_alpha"] *= by
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    return folder


def merged_by_command(adapter: Path, base: Path, out: Path, *more: str) -> Result:
    asked = ["merge", str(adapter), "--base", str(base), "--out", str(out), *more]
    return CliRunner().invoke(app, asked)


def test_rounding_is_that_of_the_written_weights(
    tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    """Computed anew from the base, the folder in float32 and the one in bfloat16."""
    whole = merge(tiny_base, trained, tmp_path / "f32", "dequant", FP32, dtype=torch.float32)
    told = merge(tiny_base, trained, tmp_path / "bf16", "dequant", FP32, dtype=torch.bfloat16)
    before = dequantized_base(tiny_base, FP32).state_dict()
    exact, rounded = (
        load_file(tmp_path / name / "model.safetensors") for name in ("f32", "bf16")
    )
    error = delta = 0.0
    shares = {}
    for module in told.modules:
        key = f"{module}.weight"
        change = (exact[key] - before[key]).double().square().sum().item()
        lost = (rounded[key].float() - exact[key]).double().square().sum().item()
        error, delta = error + lost, delta + change
        shares[module] = (lost / change) ** 0.5
    assert len(told.modules) == 2 * 7
    assert told.of_delta == pytest.approx((error / delta) ** 0.5, rel=1e-6)
    assert told.worst == pytest.approx(max(shares.values()), rel=1e-6)
    assert told.worst_module == max(shares, key=lambda module: shares[module])
    assert told.delta_norm == pytest.approx(delta**0.5, rel=1e-6)
    assert (whole.of_delta, whole.worst) == (0.0, 0.0)


def test_float16_loses_an_eighth_and_float32_nothing(
    tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    """Ten bits of a mantissa in place of seven."""
    lost = {}
    for name, dtype in DTYPES.items():
        out = tmp_path / name
        lost[name] = merge(tiny_base, trained, out, "dequant", FP32, dtype=dtype).of_delta
        assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {dtype}
        assert json.loads((out / "config.json").read_text())["dtype"] == name
    assert lost["float32"] == 0
    assert lost["float16"] == pytest.approx(lost["bfloat16"] / 8, rel=0.1)


def test_a_lightly_trained_adapter_is_warned_of_and_another_is_not(
    tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    light, heavy = scaled(trained, 0.01, tmp_path / "l"), scaled(trained, 10, tmp_path / "h")
    bf16 = ("--dtype", "bfloat16")
    told = merged_by_command(light, tiny_base, tmp_path / "1", *bf16)
    assert told.exit_code == 0, told.output
    assert "rounding to bfloat16 loses" in told.stderr
    assert "--dtype float16 or float32" in told.stderr
    told = merged_by_command(light, tiny_base, tmp_path / "2")
    assert "rounding to float32 / delta: 0.00%" in told.stdout
    assert "loses" not in told.stderr
    told = merged_by_command(heavy, tiny_base, tmp_path / "3", *bf16)
    assert "rounding to bfloat16 / delta:" in told.stdout
    assert "loses" not in told.stderr


def test_on_data_the_divergence_is_of_the_adapters_own_kind(
    tiny_base: Path, trained: Path, chats: Path, tmp_path: Path
) -> None:
    found = {
        dtype: merge_and_compare(
            tiny_base, trained, tmp_path / dtype, "dequant", dtype=dtype, data=chats, limit=5
        )
        for dtype in ("bfloat16", "float32")
    }
    reference = "nf4 base + adapter"
    for report in found.values():
        assert (report.data, report.samples) == ("chats.jsonl", 5)
        assert set(report.losses) == {"merged", reference, "16-bit base + adapter"}
        assert not [text for text in report.warnings() if "--data" in text]
    gaps = {d: r.divergences[reference].relative for d, r in found.items()}
    assert gaps["float32"] < 1e-5 < gaps["bfloat16"]
    whole = found["float32"].losses
    assert whole["merged"] == pytest.approx(whole[reference], abs=1e-5)
    written = json.loads((tmp_path / "float32" / REPORT_FILE).read_text())
    assert written["dtype"] == "float32"
    assert written["data"] == {"file": "chats.jsonl", "samples": 5}
    assert written["rounding"]["of_delta"] == 0.0
    assert written["loss"] == whole


def test_without_data_a_reader_is_told(tiny_base: Path, trained: Path, tmp_path: Path) -> None:
    more = ("--dtype", "bfloat16", "--json")
    told = merged_by_command(trained, tiny_base, tmp_path / "m", *more)
    assert "--data" in told.stderr
    facts = json.loads(told.stdout)
    assert facts["data"] == {"file": "", "samples": 0}
    assert facts["loss"] == {}
    assert 0 < facts["rounding"]["of_delta"] <= facts["rounding"]["worst"]


def test_bad_data_is_found_before_the_work(
    tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    with refused(InvalidField, file="bad.jsonl", line=1):
        merge_and_compare(tiny_base, trained, tmp_path / "m", "dequant", data=bad)
    assert not (tmp_path / "m").exists()


def test_what_float16_cannot_hold_is_refused_by_name(
    tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] = 1e5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    told = merged_by_command(trained, base, tmp_path / "m", "--dtype", "float16")
    assert told.exit_code == 1
    assert "model.embed_tokens.weight" in told.stderr
    assert "--dtype bfloat16 or float32" in told.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert merged_by_command(trained, base, tmp_path / "m").exit_code == 0


def test_a_folder_with_a_link_or_a_pickle_is_not_opened(
    tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    """Its template would be copied into the merged folder."""
    secret, adapter = tmp_path / "secret", tmp_path / "adapter"
    secret.write_text("secret")
    shutil.copytree(trained, adapter)
    (adapter / "chat_template.jinja").symlink_to(secret)
    with refused(AdapterInvalid, file="chat_template.jinja", cause="outside"):
        merge_and_compare(tiny_base, adapter, tmp_path / "m", "dequant")
    assert not (tmp_path / "m").exists()


def test_an_export_keeps_the_folders_dtype_and_says_what_a_narrower_one_loses(
    tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    merged: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        merged[dtype] = tmp_path / dtype
        merge_and_compare(tiny_base, trained, merged[dtype], "dequant", dtype=dtype)  # type: ignore[arg-type]
    lost = {
        (dtype, kind): export_model(folder, tmp_path / f"{dtype}-{kind}.gguf", kind)  # type: ignore[arg-type]
        for dtype, folder in merged.items()
        for kind in (None, "f32", "bf16", "q8_0")
    }
    assert lost["float32", None] == lost["float32", "f32"] == 0.0
    # The same bfloat16 weights, by either way.
    once = json.loads((merged["bfloat16"] / REPORT_FILE).read_text())["rounding"]["of_delta"]
    assert lost["bfloat16", None] == pytest.approx(once, rel=1e-6)
    assert lost["float32", "bf16"] == pytest.approx(once, rel=1e-3)
    assert lost["float32", "q8_0"] > once
    assert export_model(tiny_base, tmp_path / "base.gguf", "q8_0") == 0.0
    light = scaled(trained, 0.01, tmp_path / "light")
    merge_and_compare(tiny_base, light, tmp_path / "m", "dequant", dtype="float32")
    asked = ["export-gguf", str(tmp_path / "m"), "--out", str(tmp_path / "m.gguf")]
    assert "is lost" not in CliRunner().invoke(app, asked).stderr
    assert "is lost" in CliRunner().invoke(app, [*asked, "--type", "bf16"]).stderr
