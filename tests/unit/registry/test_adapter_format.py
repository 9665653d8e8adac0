"""What `read_adapter` accepts and refuses, with a crafted folder for each rule."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from veneer_registry.adapter import BaseFingerprint, BaseSpec
from veneer_registry.bundle_files import TEMPLATE_FILE, check_file_name, select_files
from veneer_registry.errors import AdapterCorrupt, AdapterInvalid, BaseModelMismatch
from veneer_registry.format import read_adapter, weights_digest
from veneer_registry.lora_config import CONFIG_FILE
from veneer_registry.manifest_json import manifest_from_json, manifest_to_json
from veneer_registry.safetensors_header import read_header
from veneer_registry.stored_adapter import open_stored, verify_weights
from veneer_registry.tensor_names import tensor_keys
from veneer_registry.training_manifest import TRAINING_FILE
from veneer_registry.weights import WEIGHTS_FILE, check_numbers, digest_weights, read_pieces

from tests.adapter_files import write_adapter
from tests.refused import refused
from tests.unit.registry.kit import (
    BASE,
    SHAPES,
    assert_checks_agree,
    make_adapter,
    make_tensors,
)

Q0A, Q0B = tensor_keys(0, "q_proj")


def refusal(folder: Path, base: BaseSpec | None = BASE) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter(folder, base)
    assert_checks_agree(folder)
    return caught.value


# ---------------------------------------------------------------- what is accepted


def test_a_plain_adapter(tmp_path: Path) -> None:
    manifest = read_adapter(make_adapter(tmp_path), BASE)
    assert [(m.layer, m.projection) for m in manifest.modules[:3]] == [
        (0, "q_proj"),
        (0, "k_proj"),
        (0, "v_proj"),
    ]
    assert len(manifest.modules) == 14
    assert {m.scaling for m in manifest.modules} == {2.0}
    assert manifest.max_rank == 4
    assert manifest.parameters == sum(4 * (a + b) for a, b in SHAPES.values()) * 2
    assert manifest.serving_bytes == manifest.parameters * 2
    assert manifest.file_dtype == "BF16"
    assert manifest.base_name == ""
    assert manifest.chat_template is None
    assert "does not record its base" in manifest.warnings[0]


def test_without_a_base_nothing_is_said_about_it(tmp_path: Path) -> None:
    assert read_adapter(make_adapter(tmp_path), None).warnings == ()


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"auto_mapping": {"base_model_class": "os", "parent_library": "os"}}, "auto_mapping"),
        ({"target_modules": "(.*)*x" * 3}, "target_modules"),
        ({"target_modules": ["q_proj"], "exclude_modules": "(a+)+$"}, "exclude_modules"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "layers"}, "layers"),
        ({"lora_dropout": 0.5, "inference_mode": False, "revision": "main"}, "revision"),
        ({"megatron_core": "megatron.core", "qalora_group_size": 16}, "megatron_core"),
        ({"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"}, "eva_config"),
        ({"init_lora_weights": "gaussian", "loftq_config": {}}, "init"),
        ({"task_type": None, "peft_version": "0.21.2"}, "task_type"),
        ({"invented_later": None, "and_this": False, "or_that": []}, "unused"),
    ],
)
def test_keys_without_effect_are_accepted(
    tmp_path: Path, config: dict[str, Any], key: str
) -> None:
    plain = read_adapter(make_adapter(tmp_path / "plain"), BASE)
    other = read_adapter(make_adapter(tmp_path / key, config), BASE)
    assert other.weights_digest == plain.weights_digest


def test_a_target_pattern_is_never_run(tmp_path: Path) -> None:
    """``(a|aa)+$``-like patterns take re.fullmatch minutes on such a name; the test's
    time limit would end it."""
    evil = {"target_modules": "(([a-z_.0-9]*)*)*!", "exclude_modules": "(.*.*.*.*.*.*.*.*)*!"}
    read_adapter(make_adapter(tmp_path / "a", evil), BASE)
    error = refusal(make_adapter(tmp_path / "b", {"rank_pattern": {"(([a-z.]*)*)*!": 4}}))
    assert "matches no adapted module" in error.message


def test_patterns_mean_what_peft_means(tmp_path: Path) -> None:
    config = {
        "use_rslora": False,
        "alpha_pattern": {
            "layers.0.self_attn.q_proj": 40,
            "q_proj": 20,
            "^model.layers.1.mlp.up_proj": 12,
            r"mlp\.down_proj$": 4,
            "model.layers.1.mlp.up_proj": 99,
        },
    }
    manifest = read_adapter(make_adapter(tmp_path, config), BASE)
    found = {(m.layer, m.projection): m.scaling for m in manifest.modules}
    assert found[0, "q_proj"] == 10
    assert found[1, "q_proj"] == 5
    assert found[1, "up_proj"] == 3  # the first key in file order wins
    assert found[0, "up_proj"] == 2
    assert found[0, "down_proj"] == found[1, "down_proj"] == 1


def test_overlapping_alphas_warn(tmp_path: Path) -> None:
    config = {"alpha_pattern": {"k_proj": 3, "layers.1.self_attn.k_proj": 11, "q_proj": 4}}
    manifest = read_adapter(make_adapter(tmp_path / "1", config), None)
    assert {m.scaling for m in manifest.modules if m.projection == "k_proj"} == {0.75}
    (warning,) = manifest.warnings
    assert "'k_proj'" in warning
    assert "'layers.1.self_attn.k_proj'" in warning
    config["alpha_pattern"]["layers.1.self_attn.k_proj"] = 3
    assert read_adapter(make_adapter(tmp_path / "2", config), None).warnings == ()


def test_mixed_ranks_and_dtypes(tmp_path: Path) -> None:
    tensors = make_tensors(4, projections=["v_proj"])
    tensors |= make_tensors(8, projections=["q_proj"], dtype="F32")
    config = {"rank_pattern": {"q_proj": 8}, "use_rslora": True}
    manifest = read_adapter(make_adapter(tmp_path, config, tensors), BASE)
    assert manifest.targets == ("q_proj", "v_proj")
    assert manifest.max_rank == 8
    assert manifest.file_dtype == "mixed"
    assert manifest.modules[0].scaling == 8 / np.sqrt(8)
    assert manifest.modules[1].scaling == 4.0


def test_other_files_are_not_opened(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"pickle")
    (tmp_path / "checkpoint-1").mkdir()
    read_adapter(tmp_path, BASE)
    selection = select_files(tmp_path)
    assert [path.name for path in selection.files] == [CONFIG_FILE, WEIGHTS_FILE]
    assert selection.skipped == ("checkpoint-1", "training_args.bin")


# ------------------------------------------------------------------ refused configs

BAD_CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    # name -> (changes, key to blame, words of the message)
    "other type": ({"peft_type": "ADALORA"}, "peft_type", "only LORA"),
    "no type": ({"peft_type": None}, "peft_type", "only LORA"),
    "classifier": ({"task_type": "SEQ_CLS"}, "task_type", "only CAUSAL_LM"),
    "bias": ({"bias": "lora_only"}, "bias", "bias='none'"),
    "fan in": ({"fan_in_fan_out": True}, "fan_in_fan_out", "must be false"),
    "dora": ({"use_dora": True}, "use_dora", "use_dora=False"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save", "without them"),
    "lora bias": ({"lora_bias": True}, "lora_bias", "lora_bias=False"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config", "Megatron"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication", "replicated"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices", "tokens"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens", "activated"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters", "bare parameters"),
    "qalora": ({"use_qalora": True}, "use_qalora", "QA-LoRA"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora", "block-diagonal"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config", "Arrow"),
    "arrow by default": ({"arrow_config": {}}, "arrow_config", "Arrow"),
    "arrow switch": ({"arrow_config": False}, "arrow_config", "Arrow"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config", "KaSA"),
    "monteclora": ({"monteclora_config": {"a": 1}}, "monteclora_config", "MonteCLoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights", "changes the base"),
    "pissa fast": (
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights",
        "'pissa_niter_4'",
    ),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights", "changes the base"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights", "changes the base"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights", "changes the base"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights", "changes the base"),
    "unknown": ({"shiny_new_trick": 1}, "shiny_new_trick", "unknown"),
    "no rank": ({"r": None}, "r", "a rank is 1"),
    "rank zero": ({"r": 0}, "r", "a rank is 1"),
    "rank bool": ({"r": True}, "r", "a rank is 1"),
    "rank float": ({"r": 4.0}, "r", "a rank is 1"),
    "rank vast": ({"r": 10**9}, "r", "a rank is 1"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha", "alpha must be a number"),
    "alpha text": ({"lora_alpha": "8"}, "lora_alpha", "alpha must be a number"),
    "alpha vast": ({"lora_alpha": 10**30}, "lora_alpha", "at most"),
    "rslora text": ({"use_rslora": "yes"}, "use_rslora", "true or false"),
    "base list": ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path", "string"),
    "pattern list": ({"rank_pattern": ["q_proj"]}, "rank_pattern", "must map"),
    "pattern value": ({"rank_pattern": {"q_proj": "8"}}, "q_proj", "a rank is"),
    "alpha value": ({"alpha_pattern": {"q_proj": None}}, "q_proj", "alpha must be a number"),
    "regex": ({"alpha_pattern": {"(?=x).*q_proj": 8}}, "(?=x).*q_proj", "RE2 does not read"),
    "regex choice": ({"rank_pattern": {"(x|y)_proj": 4}}, "(x|y)_proj", "matches no"),
    "no match": ({"alpha_pattern": {"lm_head": 8}}, "lm_head", "matches no"),
    "no boundary": ({"alpha_pattern": {"proj": 8}}, "proj", "matches no"),
    "wild dots": ({"alpha_pattern": {"self.attn.q_proj": 8}}, "self.attn.q_proj", "matches no"),
    "false anchor": ({"alpha_pattern": {"^q_proj": 8}}, "^q_proj", "matches no"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_refuses_config(case: str, tmp_path: Path) -> None:
    changes, key, words = BAD_CONFIGS[case]
    error = refusal(make_adapter(tmp_path, changes))
    assert error.metadata["file"] == CONFIG_FILE
    assert error.metadata["key"] == key
    assert words in error.message
    assert CONFIG_FILE in error.message
    assert repr(key) in error.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is empty"),
        (b" ", "not valid JSON"),
        (b"[]", "one JSON object"),
        (b'{"r": 4, "r": 8}', "'r' occurs twice"),
        (b'{"r": NaN}', "not valid JSON"),
        (b"{" + b" " * (1 << 20) + b"}", "larger than"),
        (b'{"a":' * 50_000, "nested"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_refuses_config_text(tmp_path: Path, text: bytes, words: str) -> None:
    make_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_bytes(text)
    error = refusal(tmp_path)
    assert words in error.message
    assert error.metadata["file"] == CONFIG_FILE


def test_many_pattern_keys_take_linear_time(tmp_path: Path) -> None:
    """20,000 keys x 14 modules by a loop would be seconds; by look-up it is nothing.
    The refusal names the first key that matches nothing."""
    keys = {f"layers.{n}.mlp.up_proj": 8 for n in range(20_000)}
    error = refusal(make_adapter(tmp_path, {"alpha_pattern": keys}))
    assert error.metadata["key"] == "layers.10.mlp.up_proj"  # sorted


# ------------------------------------------------------------------ refused tensors


def change(**changes: Any) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        tensors = make_tensors()
        for name, value in changes.items():
            key = {"a": Q0A, "b": Q0B}[name]
            if value is None:
                del tensors[key]
            else:
                tensors[key] = value
        return tensors

    return build


def with_value(value: float, dtype: str = "F32") -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        tensors = make_tensors(dtype=dtype)
        tensors[Q0B][3, 1] = value
        return tensors

    return build


def with_tensor(name: str) -> Callable[[], dict[str, Any]]:
    return lambda: {**make_tensors(), name: np.ones((4, 32), np.float32)}


STEM = "base_model.model.model.layers.0.self_attn.q_proj"

BAD_TENSORS: dict[str, tuple[Callable[[], dict[str, Any]], str | None, str]] = {
    # name -> (tensors, tensor to blame, words of the message)
    "nothing": (dict, None, "contains no LoRA tensors"),
    "no B": (change(b=None), Q0A, "no matching lora_B"),
    "no A": (change(a=None), Q0B, "no matching lora_A"),
    "vector": (change(a=np.ones(32, np.float32)), Q0A, "need a matrix"),
    "ranks differ": (change(b=np.ones((32, 5), np.float32)), Q0B, "has rank 5"),
    "rank not r": (
        change(a=np.ones((2, 32), np.float32), b=np.ones((32, 2), np.float32)),
        Q0A,
        "has rank 2, but adapter_config.json says 4",
    ),
    "inputs": (change(a=np.ones((4, 33), np.float32)), Q0A, "has 33 inputs"),
    "outputs": (change(b=np.ones((31, 4), np.float32)), Q0B, "has 31 outputs"),
    "layer": (
        lambda: make_tensors(layers=[0, 2]),
        tensor_keys(2, "q_proj")[0],
        "layers 0 to 1",
    ),
    "NaN": (with_value(float("nan")), Q0B, "NaN"),
    "infinite": (with_value(float("-inf")), Q0B, "infinite value"),
    "infinite once cast": (with_value(3.4e38), Q0B, "infinite in bfloat16"),
    "1e30": (with_value(-1e30), Q0B, "1e+30; the largest allowed"),
    "just too large": (with_value(10_001.0), Q0B, "1e+04; the largest allowed"),
    "fp16 infinite": (with_value(float("inf"), "F16"), Q0B, "infinite value"),
    "bf16 NaN": (with_value(0x7FC0, "BF16"), Q0B, "NaN"),
    "bf16 -inf": (with_value(0xFF80, "BF16"), Q0B, "infinite value"),
    "bf16 large": (with_value(0x7F00, "BF16"), Q0B, "largest allowed"),
    "embedding": (
        with_tensor("base_model.model.model.embed_tokens.lora_embedding_A"),
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "not a LoRA matrix",
    ),
    "head": (
        with_tensor("base_model.model.lm_head.lora_A.weight"),
        "base_model.model.lm_head.lora_A.weight",
        "not a LoRA matrix",
    ),
    "bias": (with_tensor(STEM + ".lora_B.bias"), STEM + ".lora_B.bias", "not a LoRA matrix"),
    "dora": (
        with_tensor(STEM + ".lora_magnitude_vector"),
        STEM + ".lora_magnitude_vector",
        "not a LoRA",
    ),
    "adapter name inside": (
        with_tensor(STEM + ".lora_A.default.weight"),
        STEM + ".lora_A.default.weight",
        "named differently",
    ),
    "path": (with_tensor("../../etc/x"), "../../etc/x", "not a LoRA matrix"),
    "wrong block": (
        with_tensor("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight"),
        "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
        "not a LoRA matrix",
    ),
    "other projection": (
        with_tensor("base_model.model.model.layers.0.mlp.x_proj.lora_A.weight"),
        "base_model.model.model.layers.0.mlp.x_proj.lora_A.weight",
        "not a LoRA matrix",
    ),
    "leading zero": (
        with_tensor("base_model.model.model.layers.00.mlp.up_proj.lora_A.weight"),
        "base_model.model.model.layers.00.mlp.up_proj.lora_A.weight",
        "not a LoRA matrix",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_refuses_tensors(case: str, tmp_path: Path) -> None:
    build, tensor, words = BAD_TENSORS[case]
    error = refusal(make_adapter(tmp_path, tensors=build()))
    assert words in error.message
    assert error.metadata["file"] == WEIGHTS_FILE
    assert error.metadata.get("tensor") == tensor
    if tensor is not None:
        assert repr(tensor)[:100] in error.message


def test_largest_allowed_values_pass(tmp_path: Path) -> None:
    read_adapter(make_adapter(tmp_path, tensors=with_value(-10_000.0)()), BASE)


def test_scaling_is_bounded(tmp_path: Path) -> None:
    error = refusal(make_adapter(tmp_path, {"alpha_pattern": {"q_proj": 1e6}}))
    assert "would be scaled by 250000" in error.message
    assert error.metadata["tensor"] == Q0A


def test_a_base_without_the_projection(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "gate_proj"}
    error = refusal(make_adapter(tmp_path), BaseSpec("old", 2, shapes, BASE.fingerprint))
    assert "targets gate_proj, but old has no such module" in error.message


def test_without_a_base_shapes_must_only_pair_up(tmp_path: Path) -> None:
    tensors = change(a=np.ones((4, 33), np.float32), b=np.ones((31, 4), np.float32))()
    read_adapter(make_adapter(tmp_path, tensors=tensors), None)


# -------------------------------------------------------------------- refused files


def test_only_a_pickle(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    error = refusal(tmp_path)
    assert "'adapter_model.bin' is a pickle" in error.message
    assert "safe_serialization=True" in error.message


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file(tmp_path: Path, name: str) -> None:
    make_adapter(tmp_path)
    (tmp_path / name).unlink()
    error = refusal(tmp_path)
    assert name in error.message
    assert error.metadata["file"] == name


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "x").message


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    make_adapter(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert "not a regular file" in refusal(tmp_path).message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_model.bin", "is a pickle"),
        ("optimizer.pt", "is a pickle"),
        ("../adapter_config.json", "does not belong"),
        ("adapter_config.json/x", "does not belong"),
        ("ADAPTER_CONFIG.JSON", "does not belong"),
        ("x" * 10_000, "does not belong"),
    ],
)
def test_file_names(name: str, words: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        check_file_name(name)
    assert words in caught.value.message
    assert len(caught.value.message) < 400


# --------------------------------------------------------------- template, manifest


def test_template_is_kept(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    (tmp_path / TEMPLATE_FILE).write_text("{{ messages }} é", encoding="utf-8")
    assert read_adapter(tmp_path, BASE).chat_template == "{{ messages }} é"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff", "not UTF-8 at byte 0"),
        (b" \n", "is empty"),
        (b"x" * 65_537, "larger than 65536"),
    ],
)
def test_bad_templates(tmp_path: Path, data: bytes, words: str) -> None:
    make_adapter(tmp_path)
    (tmp_path / TEMPLATE_FILE).write_bytes(data)
    error = refusal(tmp_path)
    assert words in error.message
    assert error.metadata["file"] == TEMPLATE_FILE


def train(folder: Path, document: object) -> Path:
    make_adapter(folder)
    (folder / TRAINING_FILE).write_text(json.dumps(document))
    return folder


PRINT = {"weights": "a" * 64, "tokenizer": "b" * 64, "quantization": "c" * 64}


def test_training_facts(tmp_path: Path) -> None:
    document = {
        "base_fingerprint": {**PRINT, "template": "d" * 64},
        "metrics": {"loss_after": 1.5, "steps": 3},
        "data": {"rows": 10, "files": ["a", "b"]},
        "seed": 0,
        "note": "hé",
        "absent": None,
        "flag": True,
    }
    manifest = read_adapter(train(tmp_path, document), BASE)
    assert manifest.base_fingerprint == BASE.fingerprint
    assert manifest.warnings == ()
    assert manifest.training == {
        "metrics.loss_after": "1.5",
        "metrics.steps": "3",
        "data.rows": "10",
        "data.files": '["a","b"]',
        "seed": "0",
        "note": "hé",
        "flag": "true",
    }


def test_many_facts_are_cut_with_a_warning(tmp_path: Path) -> None:
    manifest = read_adapter(train(tmp_path, {f"k{n}": "x" * 600 for n in range(300)}), None)
    assert len(manifest.training) == 256
    assert {len(text) for text in manifest.training.values()} == {512}
    assert "only 256 facts" in manifest.warnings[0]


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_another_base_is_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(BaseModelMismatch) as caught:
        read_adapter(train(tmp_path, {"base_fingerprint": {**PRINT, part: "e" * 64}}), BASE)
    assert caught.value.metadata[f"adapter_{part}"] == "e" * 64
    assert caught.value.metadata[f"base_{part}"] == getattr(BASE.fingerprint, part)
    assert "e" * 12 in caught.value.message
    assert getattr(BASE.fingerprint, part)[:12] in caught.value.message


@pytest.mark.parametrize("part", ["quantization", "template"])
def test_other_differences_warn(tmp_path: Path, part: str) -> None:
    document = {"base_fingerprint": {**PRINT, "template": "d" * 64, part: "e" * 64}}
    manifest = read_adapter(train(tmp_path, document), BASE)
    assert len(manifest.warnings) == 1
    assert part in manifest.warnings[0]


def test_what_the_server_does_not_know_cannot_differ(tmp_path: Path) -> None:
    base = BaseSpec("x", 2, SHAPES, BaseFingerprint("a" * 64, ""))
    document = {"base_fingerprint": {**PRINT, "template": None}}
    assert read_adapter(train(tmp_path, document), base).warnings == ()


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ({"base_fingerprint": "x"}, "base_fingerprint"),
        ({"base_fingerprint": {"weights": "a" * 64}}, "base_fingerprint"),
        ({"base_fingerprint": {**PRINT, "weights": "A" * 64}}, "base_fingerprint.weights"),
        ({"base_fingerprint": {**PRINT, "template": 3}}, "base_fingerprint.template"),
        ({"metrics": [1]}, "metrics"),
        ({"metrics": {"loss": "low"}}, "metrics.loss"),
        ({"metrics": {"loss": True}}, "metrics.loss"),
    ],
)
def test_bad_training_manifests(tmp_path: Path, document: object, key: str) -> None:
    error = refusal(train(tmp_path, document))
    assert error.metadata["file"] == TRAINING_FILE
    assert error.metadata["key"] == key


# ------------------------------------------------------------------ digest and views


def test_digest_ignores_order_metadata_and_spelling(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = make_tensors(dtype="F32")
    one = make_adapter(tmp_path / "1", {"r": 4, "lora_alpha": 8}, tensors)
    two = make_adapter(tmp_path / "2", {"lora_alpha": 8.0, "peft_version": "x"}, tensors)
    save_file(
        dict(reversed(tensors.items())), two / WEIGHTS_FILE, metadata={"format": "pt", "x": "y"}
    )
    three = make_adapter(tmp_path / "3", {"lora_alpha": 4, "use_rslora": True}, tensors)
    assert weights_digest(one) == weights_digest(two)
    # alpha 4 and sqrt(4) give the same factor as alpha 8 and 4.
    assert weights_digest(one) == weights_digest(three)


@pytest.mark.parametrize(
    "config",
    [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"layers.1.mlp.up_proj": 9}}],
)
def test_digest_depends_on_scaling(tmp_path: Path, config: dict[str, Any]) -> None:
    one = make_adapter(tmp_path / "1")
    assert weights_digest(one) != weights_digest(make_adapter(tmp_path / "2", config))


def test_digest_depends_on_every_byte_and_dtype(tmp_path: Path) -> None:
    tensors = make_tensors(dtype="F16")
    one = weights_digest(make_adapter(tmp_path / "1", tensors=tensors))
    as_bits = {name: array.view(np.uint16) for name, array in tensors.items()}
    two = weights_digest(make_adapter(tmp_path / "2", tensors=as_bits))
    tensors[Q0A] = tensors[Q0A].copy()
    tensors[Q0A].view(np.uint16)[0, 0] ^= 1
    three = weights_digest(make_adapter(tmp_path / "3", tensors=tensors))
    swapped = {**tensors, Q0A: tensors[tensor_keys(1, "q_proj")[0]]}
    swapped[tensor_keys(1, "q_proj")[0]] = tensors[Q0A]
    four = weights_digest(make_adapter(tmp_path / "4", tensors=swapped))
    assert len({one, two, three, four}) == 4


def test_verify(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    manifest = read_adapter(tmp_path, BASE)
    assert verify_weights(tmp_path, manifest.weights_digest).modules == manifest.modules
    path = tmp_path / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with refused(AdapterCorrupt, cause="digest"):
        verify_weights(tmp_path, manifest.weights_digest)
    path.write_bytes(data[:-1])
    with refused(AdapterCorrupt, cause="files"):
        verify_weights(tmp_path, manifest.weights_digest)
    path.unlink()
    with pytest.raises(AdapterCorrupt):
        verify_weights(tmp_path, manifest.weights_digest)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    with path.open("rb") as file:
        header = read_header(file, WEIGHTS_FILE)
        os.truncate(path, path.stat().st_size // 2)
        with refused(AdapterInvalid, file=WEIGHTS_FILE, cause="cut_off"):
            digest_weights(read_pieces(file), header, (), "bfloat16")
        with refused(AdapterInvalid, file=WEIGHTS_FILE, cause="cut_off"):
            check_numbers(read_pieces(file), header, "bfloat16")


def test_views_are_the_tensors(tmp_path: Path) -> None:
    tensors = make_tensors(dtype="F32")
    manifest = read_adapter(make_adapter(tmp_path, tensors=tensors), BASE)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    with open_stored(tmp_path, manifest.weights_digest) as (found, modules):
        assert found.modules == manifest.modules
        assert [view.module for view in modules] == list(manifest.modules)
        for view in modules:
            for side, key in ((view.a, view.module.a_key), (view.b, view.module.b_key)):
                array = np.frombuffer(side.data, np.float32).reshape(side.shape)
                np.testing.assert_array_equal(array, tensors[key])
                assert side.dtype == "F32"
                del array
        modules[0].a.data[0] = 1  # private: must not reach the file
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before
    with pytest.raises(ValueError, match="released"):  # Python's own words
        modules[0].a.data.tobytes()


def test_views_of_other_files(tmp_path: Path) -> None:
    manifest = read_adapter(make_adapter(tmp_path / "1"), BASE)
    other = make_adapter(tmp_path / "2", tensors=make_tensors(projections=["q_proj"]))
    with pytest.raises(AdapterCorrupt), open_stored(other, manifest.weights_digest):
        pass


def test_manifest_json_round_trip(tmp_path: Path) -> None:
    document = {"base_fingerprint": PRINT, "metrics": {"loss": 0.1}}
    folder = train(tmp_path, document)
    (folder / TEMPLATE_FILE).write_text("{{ x }}")
    write_adapter(folder, {"r": 4, "lora_alpha": 7, "use_rslora": True}, make_tensors())
    manifest = read_adapter(folder, BASE)
    text = manifest_to_json(manifest)
    assert manifest_from_json(text) == manifest
    assert manifest_to_json(manifest_from_json(text)) == text
    # An internal check: a ValueError without metadata.
    with pytest.raises(ValueError, match="version"):
        manifest_from_json(text.replace('"version":1', '"version":2'))


def test_modules_that_the_base_lacks_are_refused_before_patterns_are_matched(
    tmp_path: Path,
) -> None:
    """A file may have 70,000 of them, and each costs a match with each expression."""
    config = {"alpha_pattern": {"(no|such)_module": 4}}
    folder = make_adapter(tmp_path, config, make_tensors(layers=[0, 9], projections=["q_proj"]))
    with refused(AdapterInvalid, tensor=tensor_keys(9, "q_proj")[0]):
        read_adapter(folder, BASE)
    few = replace(BASE, shapes={"k_proj": SHAPES["k_proj"]})
    with refused(AdapterInvalid, tensor=tensor_keys(0, "q_proj")[0]):
        read_adapter(folder, few)


def test_a_manifest_of_a_later_version_is_read(tmp_path: Path) -> None:
    folder = train(tmp_path, {"base_fingerprint": PRINT})
    manifest = read_adapter(folder, BASE)
    document = json.loads(manifest_to_json(manifest))
    document |= {"new": [1]}
    document["base_fingerprint"] |= {"new": ""}
    text = json.dumps(document, separators=(",", ":"))
    assert manifest_from_json(text) == manifest


@pytest.mark.parametrize(
    ("config", "document", "word"),
    [
        ({"base_model_name_or_path": "tiny"}, {}, "name"),
        ({"base_model_name_or_path": None}, {}, "none"),
        ({}, {"base_fingerprint": PRINT}, "fingerprint"),
    ],
)
def test_an_older_version_reads_the_manifests_it_could_always_have(
    config: dict[str, Any], document: dict[str, Any], word: str, tmp_path: Path
) -> None:
    """It does not know the key ``base_word``, and refuses keys that it does not know."""
    folder = make_adapter(tmp_path, config)
    (folder / TRAINING_FILE).write_text(json.dumps(document))
    manifest = read_adapter(folder, BASE)
    assert manifest.base_word == word
    text = manifest_to_json(manifest)
    assert "base_word" not in json.loads(text)
    assert manifest_from_json(text) == manifest


@pytest.mark.parametrize(
    "text", ['"modules":[[0,"q_proj",1,1.0]],', '\\"modules\\":[[]]', "]],[[", '"modules":null']
)
def test_manifest_json_with_strings_that_look_like_it(tmp_path: Path, text: str) -> None:
    """A template, and a base's name, are a stranger's."""
    folder = make_adapter(tmp_path, {"base_model_name_or_path": text})
    (folder / TEMPLATE_FILE).write_text(text)
    manifest = replace(read_adapter(folder, None), base_word="name")
    assert manifest.chat_template == manifest.base_name == text
    assert manifest_from_json(manifest_to_json(manifest)) == manifest


def test_manifests_do_not_share_what_differs(tmp_path: Path) -> None:
    for number, projections in enumerate((["q_proj"], ["q_proj", "up_proj"], ["o_proj"])):
        tensors = make_tensors(projections=projections)
        manifest = read_adapter(make_adapter(tmp_path / f"{number}", tensors=tensors), BASE)
        assert manifest_from_json(manifest_to_json(manifest)) == manifest


def test_writer_refuses_other_dtypes(tmp_path: Path) -> None:
    # An internal check: the dtype is named.
    with pytest.raises(ValueError, match="int64"):
        write_adapter(tmp_path, {}, {"x": np.ones((2, 2), np.int64)})
