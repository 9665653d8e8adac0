"""What a merged model computes, and that its files for llama.cpp contain the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from veneer_registry.errors import AdapterInvalid, InvalidField
from veneer_registry.gguf_adapter import interleave_halves
from veneer_train.cli import app
from veneer_train.config import QuantConfig
from veneer_train.llama_cpp.export import export_adapter, export_model
from veneer_train.merge import dequantized_base, divergence, merge
from veneer_train.model import load_base

from tests.refused import refused
from tests.unit.train.test_train_run import config, run

FP32 = QuantConfig(compute_dtype="fp32")
CPU = torch.device("cpu")
SEED = 19


@pytest.fixture(scope="module", params=["lora", "rslora", "dora"])
def trained(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    chats = folder / "data.jsonl"
    turns = [
        [
            {"role": "user", "content": f"Say {n}."},
            {"role": "assistant", "content": f"I say {n}, and {n * n}."},
        ]
        for n in range(12)
    ]
    chats.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    kind = {} if request.param == "lora" else {request.param: True}
    run(config(tiny_base, chats, folder / "mine", lora=kind, train={"steps": 8}))
    return folder / "mine"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))


def four_bit(base: Path, adapter: Path) -> Any:
    """The 4-bit base with the adapter, computed in fp32 without packing."""
    return PeftModel.from_pretrained(load_base(base, FP32, CPU), str(adapter)).eval()


def test_into_dequant_is_what_was_trained(
    tiny_base: Path, trained: Path, tmp_path: Path, ids: torch.Tensor
) -> None:
    """Relative 1e-3 in fp32: bf16 adapters, the same 4-bit weights, another order of sums.
    Into the source weights it is another model, which is the control."""
    reference = four_bit(tiny_base, trained)
    gaps = {}
    for into in ("dequant", "source"):
        out = tmp_path / into
        merge(tiny_base, trained, out, into, FP32, dtype=torch.float32)  # type: ignore[arg-type]
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        gaps[into] = divergence(merged, reference, [ids]).relative
    assert gaps["dequant"] < 1e-3
    assert gaps["source"] > 1e-2


def test_a_dequantized_weight_is_what_a_4_bit_layer_holds(tiny_base: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    layer = load_base(tiny_base, FP32, CPU).model.layers[0].mlp.down_proj
    held = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    ours = dequantized_base(tiny_base, FP32).model.layers[0].mlp.down_proj.weight
    # fp32 layers are restored from the same codes and scales, bf16 ones rounded: 2^-8.
    torch.testing.assert_close(ours, held, rtol=2**-8, atol=1e-6)


class Told:
    """A FAKE model: the same logits whatever it is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, ids: torch.Tensor) -> Told:
        return self


def test_a_divergence_is_never_less_than_nothing() -> None:
    """Of models that are nearly the same it is 1e-13 or so: what float32 sums of terms near 1
    get wrong is a million times that, on any CPU, and as often below 0 as above."""
    random = np.random.default_rng(SEED)
    for _ in range(50):
        wanted = random.normal(size=(1, 8, 320), scale=2).astype(np.float32)
        told = wanted + random.normal(size=wanted.shape, scale=1e-6).astype(np.float32)
        ids = torch.zeros(1, 8, dtype=torch.int64)
        found = divergence(Told(torch.tensor(told)), Told(torch.tensor(wanted)), [ids]).kl
        p, q = (
            logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            for logits in (wanted.astype(np.longdouble), told.astype(np.longdouble))
        )
        assert found >= 0
        # float64's sums of 320 terms near 1: some units of 1e-16.
        assert found == pytest.approx(float((np.exp(p) * (p - q)).sum(-1).mean()), abs=2e-15)
        assert divergence(Told(torch.tensor(told)), Told(torch.tensor(told)), [ids]).kl == 0


def test_the_command_says_how_far_it_is_from_both(
    tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    asked = ["merge", str(trained), "--base", str(tiny_base), "--out", str(out), "--json"]
    asked += ["--dtype", "bfloat16"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["divergence"]
    near, far = found["nf4 base + adapter"], found["16-bit base + adapter"]
    assert 0 < near["relative"] < far["relative"]
    assert 0 <= near["kl"] < far["kl"]
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 1
    assert "exists" in again.stderr


def test_what_does_not_fit_is_refused(tiny_base: Path, trained: Path, tmp_path: Path) -> None:
    asked = ["merge", str(tiny_base), "--base", str(tiny_base), "--out", str(tmp_path / "m")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 1
    assert "not an adapter folder" in done.stderr
    assert not (tmp_path / "m").exists()


def _fields(file: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(file)
    return {name: field.contents() for name, field in reader.fields.items()}


def _gguf_tensors(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(file).tensors}


def test_an_exported_model_holds_every_weight(tiny_base: Path, tmp_path: Path) -> None:
    """Read back by gguf; llama.cpp itself reads it in test_train_llama_cpp."""
    tokenizer = json.loads((tiny_base / "tokenizer.json").read_text())
    assert tokenizer["pre_tokenizer"]["type"] == "ByteLevel"
    file = tmp_path / "base.gguf"
    export_model(tiny_base, file, "f32")
    fields, tensors = _fields(file), _gguf_tensors(file)
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 1
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    with safe_open(tiny_base / "model.safetensors", "pt") as stored:
        weights = {n: stored.get_tensor(n).float() for n in stored.keys()}  # noqa: SIM118
    q = weights["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(
        tensors["blk.0.attn_q.weight"], interleave_halves(q.numpy(), 2)
    )
    up = weights["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"], up.numpy())
    tied = [n for n in weights if n != "lm_head.weight"]
    assert len(tensors) == len(tied)
    assert not list(tmp_path.glob(".*"))


def test_an_exported_adapter_is_scaled_and_turned(
    tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    if json.loads((trained / "adapter_config.json").read_text())["use_dora"]:
        with refused(AdapterInvalid, key="use_dora"):
            export_adapter(trained, tiny_base, tmp_path / "a.gguf")
        return
    file = tmp_path / "a.gguf"
    export_adapter(trained, tiny_base, file)
    facts = json.loads((trained / "adapter_config.json").read_text())
    scaling = facts["lora_alpha"] / facts["r"] ** (0.5 if facts["use_rslora"] else 1)
    tensors = _gguf_tensors(file)
    assert _fields(file)["adapter.lora.alpha"] == 0
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    with safe_open(trained / "adapter_model.safetensors", "pt") as stored:
        b = stored.get_tensor(f"{prefix}.lora_B.weight").float() * scaling
        a = stored.get_tensor(f"{prefix}.lora_A.weight").float()
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_a"], a.numpy())
    turned = interleave_halves(b.numpy(), 2)
    np.testing.assert_allclose(tensors["blk.0.attn_q.weight.lora_b"], turned, rtol=1e-6)
    assert len(tensors) == 2 * 7 * 2


def test_an_export_that_cannot_be_says_what_can(tiny_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "qwen"
    other.mkdir()
    for file in tiny_base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    facts = json.loads((other / "config.json").read_text())
    facts |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (other / "config.json").write_text(json.dumps(facts))
    with refused(InvalidField, field="base", model_type="qwen2"):
        export_model(other, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_an_import_that_cannot_be_leaves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "broken.gguf", tmp_path / "out"
    export_model(tiny_base, broken, "bf16")
    broken.write_bytes(broken.read_bytes()[:1000])
    for file, target, told in (
        (broken, out, "could not be converted"),
        (broken, tiny_base, "exists"),
        (tmp_path / "none.gguf", out, "no file"),
    ):
        asked = ["import-gguf", str(file), "--out", str(target)]
        done = CliRunner().invoke(app, asked)
        assert (done.exit_code, told in done.stderr) == (1, True), done.output
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]
