"""The shipped adapters are accepted, made on the bundled base, and clearly different."""

from __future__ import annotations

import ast
import json
import sqlite3
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel
from veneer_registry.bundle_files import ALLOWED_FILES
from veneer_registry.format import read_adapter
from veneer_train.config import QuantConfig
from veneer_train.manifest import fingerprint
from veneer_train.model import load_base, load_tokenizer
from veneer_train.recipes import chat, code, sql

ADAPTERS = Path(__file__).parents[3] / "examples" / "adapters"
NAMES = ("chat", "code", "sql")
TASKS = {"chat": "regex", "code": "python", "sql": "sql"}
PROMPT = "Write a function that sorts words by length."
"""Asked of all but sql, and in no training data."""
QUESTION = """\
CREATE TABLE theatres (id INTEGER PRIMARY KEY, name TEXT, city TEXT, seats INTEGER);
CREATE TABLE plays (id INTEGER PRIMARY KEY, title TEXT, genre TEXT, acts INTEGER, \
premiere TEXT, theatre_id INTEGER);

Show the title of the 3 plays with the highest number of acts."""


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
    task = TASKS[name]
    # Far more answers are right than the base's, and not by luck: 95 % intervals.
    assert metrics[f"val_{task}_after_low"] > metrics[f"val_{task}_before_high"] + 0.3
    for path in folder.iterdir():
        assert b"/tmp/" not in path.read_bytes()


def test_the_prompts_asked_here_are_in_no_training_data() -> None:
    for recipe in (chat, code, sql):
        data = json.dumps(recipe.build(0))
        assert PROMPT not in data
        assert "theatres" not in data


@pytest.fixture(scope="module")
def answers(base_folder: Path) -> dict[str, str]:
    """Greedy answers to these prompts by name; "" is the base."""
    tokenizer = load_tokenizer(base_folder)
    model: Any = load_base(base_folder, QuantConfig(), torch.device("cpu"))
    model.config.use_cache = True
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):  # nothing trains here: the fast kernel
            layer.support_avx512bf16_for_cpu = has_avx512bf16()
    model = PeftModel.from_pretrained(model, ADAPTERS / "chat", adapter_name="chat")
    for name in NAMES[1:]:
        model.load_adapter(ADAPTERS / name, adapter_name=name)

    def answer(prompt: str, tokens: int) -> str:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        fresh = made[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(fresh, skip_special_tokens=False))

    found: dict[str, str] = {}
    for name in NAMES:
        model.set_adapter(name)
        found[name] = answer(QUESTION if name == "sql" else PROMPT, 96)
    with model.disable_adapter():
        found[""] = answer(PROMPT, 4)
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
def test_sql_is_one_statement_that_answers_the_question(answers: dict[str, str]) -> None:
    text, end = answers["sql"].split("<|im_end|>", 1)
    assert end == ""
    with sqlite3.connect(":memory:") as database:
        database.executescript(QUESTION.split("\n\n")[0])
        database.executemany(
            "INSERT INTO plays (title, acts) VALUES (?, ?)",
            [("one", 3), ("two", 5), ("three", 1), ("four", 4), ("five", 2)],
        )
        rows = database.execute(text).fetchall()
    assert sorted(rows) == [("four",), ("one",), ("two",)]


@pytest.mark.real_base
@pytest.mark.parametrize("name", NAMES)
def test_an_example_names_the_bundled_base(base_folder: Path, name: str) -> None:
    found = read_adapter(ADAPTERS / name, None).base_fingerprint
    assert found == fingerprint(base_folder, QuantConfig())
