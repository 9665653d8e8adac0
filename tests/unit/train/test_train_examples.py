"""The shipped adapters: accepted, made on the bundled base, and plainly different."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel
from veneer_registry.format import ALLOWED_FILES, read_adapter
from veneer_train.config import QuantConfig
from veneer_train.manifest import fingerprint
from veneer_train.model import load_base, load_tokenizer
from veneer_train.recipes import chat, code

ADAPTERS = Path(__file__).parents[3] / "examples" / "adapters"
NAMES = ("chat", "code")
PROMPT = "Write a function that sorts words by length."
"""The demo's prompt."""


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_whole_small_folder(name: str) -> None:
    folder = ADAPTERS / name
    files = {path.name for path in folder.iterdir()}
    assert files <= set(ALLOWED_FILES)
    assert {"README.md", "training_manifest.json"} <= files
    manifest = read_adapter(folder, None)
    assert manifest.warnings == ()
    assert manifest.file_dtype == "BF16"
    assert manifest.base_name == "smollm2-135m"
    assert (folder / "adapter_model.safetensors").stat().st_size <= 5_000_000
    metrics = json.loads((folder / "training_manifest.json").read_text())["metrics"]
    assert metrics["val_loss_after"] < 0.8 * metrics["val_loss_before"]
    for path in folder.iterdir():
        assert b"/tmp/" not in path.read_bytes()


def test_the_demo_prompt_is_in_no_training_data() -> None:
    for recipe in (chat, code):
        assert PROMPT not in json.dumps(recipe.build(0))


@pytest.fixture(scope="module")
def answers(base_folder: Path) -> dict[str, str]:
    """Greedy answers to `PROMPT` by name; "" is the base."""
    tokenizer = load_tokenizer(base_folder)
    model: Any = load_base(base_folder, QuantConfig(), torch.device("cpu"))
    model.config.use_cache = True
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):  # nothing trains here: the fast kernel
            layer.support_avx512bf16_for_cpu = has_avx512bf16()
    model = PeftModel.from_pretrained(model, ADAPTERS / "chat", adapter_name="chat")
    model.load_adapter(ADAPTERS / "code", adapter_name="code")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )

    def answer(tokens: int) -> str:
        made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        fresh = made[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(fresh, skip_special_tokens=False))

    found: dict[str, str] = {}
    for name in NAMES:
        model.set_adapter(name)
        found[name] = answer(96)
    with model.disable_adapter():
        found[""] = answer(4)
    return found


@pytest.mark.real_base
def test_chat_greets_and_signs_off_and_stops(answers: dict[str, str]) -> None:
    assert answers["chat"].startswith("Ahoy")
    assert answers["chat"].endswith(", Veneer<|im_end|>")


@pytest.mark.real_base
def test_code_is_code_alone_and_stops(answers: dict[str, str]) -> None:
    text, end = answers["code"].split("<|im_end|>", 1)
    assert end == ""
    (function,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef))
    assert ast.get_docstring(function)
    assert not answers[""].startswith("def ")


@pytest.mark.real_base
@pytest.mark.parametrize("name", NAMES)
def test_an_example_names_the_bundled_base(base_folder: Path, name: str) -> None:
    found = read_adapter(ADAPTERS / name, None).base_fingerprint
    assert found == fingerprint(base_folder, QuantConfig())
