"""Exported files, read by llama.cpp itself, give the same next tokens as Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import xllamacpp
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from veneer_registry.fingerprint import fingerprint_base
from veneer_train.cli import app
from veneer_train.config import QuantConfig
from veneer_train.llama_cpp.export import export_adapter, export_model
from veneer_train.merge import merge, source_base
from veneer_train.model import load_tokenizer

pytestmark = [pytest.mark.verify, pytest.mark.real_base]

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nWrite a function that adds two numbers.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "In 1969, on the 20th of July, 2 of 3 men",
    "def mean(values):\n    return sum(values) /",
    "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nAhoy",
)
BOUND = 0.25
"""|difference of log-probabilities| of the five likeliest, nats: llama.cpp rounds activations
to bfloat16 before each product with bfloat16 weights, the reference computes in float32."""
TIED = 0.1
"""A sixth token as near as this to the fifth may stand in its place."""

Top = dict[int, float]


@contextmanager
def llama_cpp(model: Path, adapter: Path | None = None) -> Iterator[Any]:
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    yield xllamacpp.Server(params)


def top_of(server: Any, prompt: str) -> Top:
    """The five likeliest next tokens; llama.cpp tokenises by itself."""
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    (choice,) = server.handle_completions(asked)["choices"]
    (place,) = choice["logprobs"]["content"]
    return {each["id"]: each["logprob"] for each in place["top_logprobs"]}


def worst(server: Any, model: Any, tokenizer: Any) -> float:
    """Largest difference over the prompts; infinite where other tokens are the likeliest."""
    found = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0, -1].float().log_softmax(-1)
        fifth = float(logs.topk(5).values[-1])
        told = top_of(server, prompt)
        if any(float(logs[token]) < fifth - TIED for token in told):
            return float("inf")
        found = max(found, *(abs(value - float(logs[token])) for token, value in told.items()))
    return found


@pytest.fixture(scope="module")
def files(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    found = {"base": folder / "base.gguf"}
    export_model(base_folder, found["base"], "bf16")
    for name in ("chat", "code"):
        found[name] = folder / f"{name}.gguf"
        export_adapter(EXAMPLES / name, base_folder, found[name])
    return found


def test_base_and_adapters_answer_as_in_hugging_face(
    files: dict[str, Path], base_folder: Path
) -> None:
    tokenizer = load_tokenizer(base_folder)
    model = source_base(base_folder)
    with llama_cpp(files["base"]) as server:
        assert worst(server, model, tokenizer) <= BOUND
    for name in ("chat", "code"):
        adapted = PeftModel.from_pretrained(model, str(EXAMPLES / name)).float().eval()
        with llama_cpp(files["base"], files[name]) as server:
            assert worst(server, adapted, tokenizer) <= BOUND, name
        model = adapted.unload()


def test_the_control_without_the_turned_rows_fails(
    files: dict[str, Path], base_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "code.gguf"
    export_adapter(EXAMPLES / "code", base_folder, file, permute=lambda rows, heads: rows)
    model = PeftModel.from_pretrained(source_base(base_folder), str(EXAMPLES / "code"))
    with llama_cpp(files["base"], file) as server:
        assert worst(server, model.float().eval(), load_tokenizer(base_folder)) > BOUND


def test_a_merged_model_is_exported(base_folder: Path, tmp_path: Path) -> None:
    merged, file = tmp_path / "merged", tmp_path / "merged.gguf"
    adapter = EXAMPLES / "chat"
    merge(base_folder, adapter, merged, "dequant", QuantConfig(), dtype=torch.bfloat16)
    done = CliRunner().invoke(app, ["export-gguf", str(merged), "--out", str(file)])
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with llama_cpp(file) as server:
        assert worst(server, model, load_tokenizer(base_folder)) <= BOUND


def test_what_was_exported_can_be_imported(
    files: dict[str, Path], base_folder: Path, tmp_path: Path
) -> None:
    """The same weights to the bit, and the same tokens: one base in the eyes of a server."""
    out = tmp_path / "imported"
    done = CliRunner().invoke(app, ["import-gguf", str(files["base"]), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert fingerprint_base(out) == fingerprint_base(base_folder)
