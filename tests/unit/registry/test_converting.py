"""Adapters of mlx-lm and llama.cpp become the PEFT folder that they were made from.

Both forms are written here from what those projects document, by their own libraries where
there is one: `gguf` is llama.cpp's. What llama.cpp computes with such a file is compared in
tests/integration/test_llama_cpp.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from veneer_registry.bundle_files import select_files
from veneer_registry.converting import convert_adapter
from veneer_registry.errors import AdapterInvalid, InvalidField
from veneer_registry.format import read_adapter
from veneer_registry.gguf_adapter import write_gguf_adapter
from veneer_registry.weights import WEIGHTS_FILE

from tests.foreign_adapters import EXAMPLE, write_gguf, write_mlx
from tests.refused import refused
from tests.unit.registry.kit import SHAPES
from tests.unit.registry.test_peft_agreement import make_model, save

pytestmark = pytest.mark.push

HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
"""Of the examples' base."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(HEADS))
    return tmp_path / "base"


def same_numbers(one: Path, other: Path) -> None:
    theirs, ours = load_file(one / WEIGHTS_FILE), load_file(other / WEIGHTS_FILE)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name].float(), tensor.float(), rtol=0, atol=0)


# ------------------------------------------------------------------- round trips


def test_an_mlx_adapter_is_the_example_again(tmp_path: Path) -> None:
    source = write_mlx(EXAMPLE, tmp_path / "mlx")
    done = convert_adapter(source, tmp_path / "out")
    assert (done.kind, done.rank, done.modules) == ("mlx", 8, 210)
    original, converted = read_adapter(EXAMPLE, None), read_adapter(tmp_path / "out", None)
    # The digest covers every bit of the tensors, and the scalings.
    assert converted.weights_digest == original.weights_digest
    assert converted.base_name == "mlx-community/SmolLM2-135M-Instruct-4bit"


def test_a_gguf_adapter_is_the_example_again(tmp_path: Path, base: Path) -> None:
    bf16 = gguf.GGMLQuantizationType.BF16
    source = write_gguf(EXAMPLE, tmp_path / "a.gguf", kind=bf16)
    done = convert_adapter(source, tmp_path / "out", base=base)
    assert (done.kind, done.rank, done.modules) == ("gguf", 8, 210)
    same_numbers(EXAMPLE, tmp_path / "out")
    original, converted = read_adapter(EXAMPLE, None), read_adapter(tmp_path / "out", None)
    assert converted.modules == original.modules
    assert converted.base_name == "unsloth/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 9},
        {"num_attention_heads": 3},
        {"num_attention_heads": 18, "num_key_value_heads": 6, "hidden_size": 1152},
        {"head_dim": 32},
        {"hidden_size": 1152, "head_dim": 64},  # its inputs differ, and no row does
    ],
)
def test_another_base_is_refused(config: dict[str, int], tmp_path: Path, base: Path) -> None:
    """With its heads the rows of q and k would be put into a wrong order, silently."""
    source = write_gguf(EXAMPLE, tmp_path / "a.gguf")
    (base / "config.json").write_text(json.dumps(HEADS | config))
    with refused(AdapterInvalid, file="a.gguf") as caught:
        convert_adapter(source, tmp_path / "out", base=base)
    assert "--base" in caught.value.message
    assert not (tmp_path / "out").exists()


def test_what_we_export_for_llama_cpp_comes_back(tmp_path: Path, base: Path) -> None:
    """`write_gguf_adapter` folds the scaling into B, and llama.cpp itself agrees with it."""
    write_gguf_adapter(EXAMPLE, tmp_path / "a.gguf", heads=9, kv_heads=3)
    convert_adapter(tmp_path / "a.gguf", tmp_path / "out", base=base / "config.json")
    converted = read_adapter(tmp_path / "out", None)
    assert {module.scaling for module in converted.modules} == {1.0}
    theirs, ours = load_file(EXAMPLE / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    for name, tensor in theirs.items():
        factor = 2.0 if "lora_B" in name else 1.0  # alpha 16, rank 8
        torch.testing.assert_close(ours[name], tensor.float() * factor, rtol=0, atol=0)


def test_peft_computes_the_same_with_a_converted_one(tmp_path: Path) -> None:
    """Mixed ranks too, which one alpha scales differently in llama.cpp."""
    options = {"r": 4, "lora_alpha": 6, "rank_pattern": {"down_proj": 8, "q_proj": 2}}
    model = save(tmp_path / "peft", target_modules=list(SHAPES), **options).eval()
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    (tmp_path / "c.json").write_text(json.dumps(config))
    source = write_gguf(tmp_path / "peft", tmp_path / "a.gguf", heads=(4, 2))
    convert_adapter(source, tmp_path / "out", base=tmp_path / "c.json")
    assert read_adapter(tmp_path / "out", None).max_rank == 8
    tokens = torch.arange(40)[None] % 64
    theirs = model(tokens).logits
    torch.manual_seed(0)  # `save` made its base with it
    again = PeftModel.from_pretrained(make_model(), tmp_path / "out").eval()
    again.base_model.model.load_state_dict(
        {n: t for n, t in model.base_model.model.state_dict().items() if "lora_" not in n},
        strict=False,
    )
    torch.testing.assert_close(again(tokens).logits, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["F16", "Q8_0"])
def test_other_types_of_gguf(name: str, tmp_path: Path, base: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    source = write_gguf(EXAMPLE, tmp_path / "a.gguf", kind=kind)
    convert_adapter(source, tmp_path / "out", base=base)
    theirs, ours = load_file(EXAMPLE / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    for key, tensor in theirs.items():
        array = tensor.float().numpy()
        if array.shape[-1] % 32 == 0:
            array = gguf.dequantize(gguf.quantize(array, kind), kind).reshape(array.shape)
        np.testing.assert_array_equal(ours[key].float().numpy(), array)


def test_a_qwen_s_rows_are_not_interleaved(tmp_path: Path) -> None:
    source = write_gguf(EXAMPLE, tmp_path / "a.gguf", arch="qwen2")
    convert_adapter(source, tmp_path / "out")  # so it needs no --base
    same_numbers(EXAMPLE, tmp_path / "out")


@pytest.mark.parametrize("scale", [20.0, 10, 0.1, 1 / 3, 1e-3])
def test_a_scale_is_kept_to_the_last_bit(scale: float, tmp_path: Path) -> None:
    options = {"rank": 8, "scale": scale, "dropout": 0.0, "alpha": 16}
    source = write_mlx(EXAMPLE, tmp_path / "mlx", lora_parameters=options)
    done = convert_adapter(source, tmp_path / "out")
    scalings = {module.scaling for module in read_adapter(tmp_path / "out", None).modules}
    assert scalings == {scale}
    assert any("alpha" in note for note in done.notes)


@pytest.mark.parametrize("scale", [10**400, -(10**400), 10_001, 1e300], ids="abcd")
def test_a_scale_beyond_what_is_served_is_refused(scale: float, tmp_path: Path) -> None:
    options = {"rank": 8, "scale": scale, "dropout": 0.0}
    source = write_mlx(EXAMPLE, tmp_path / "mlx", lora_parameters=options)
    with refused(AdapterInvalid, key="lora_parameters"):
        convert_adapter(source, tmp_path / "out")


def test_alpha_0_means_no_scaling(tmp_path: Path, base: Path) -> None:
    source = write_gguf(EXAMPLE, tmp_path / "a.gguf", alpha=0.0)
    convert_adapter(source, tmp_path / "out", base=base)
    scalings = {module.scaling for module in read_adapter(tmp_path / "out", None).modules}
    assert scalings == {1.0}


# ------------------------------------------------------------------------ refusals


def test_a_push_names_the_command(tmp_path: Path) -> None:
    mlx = write_mlx(EXAMPLE, tmp_path / "mlx")
    with refused(AdapterInvalid, cause="mlx") as caught:
        select_files(mlx)
    assert "veneer adapter convert" in caught.value.message
    source = write_gguf(EXAMPLE, tmp_path / "a.gguf")
    for given in (source, tmp_path / "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder/a.GGUF").write_bytes(b"")
        with refused(AdapterInvalid, cause="gguf") as caught:
            select_files(given)
        assert "veneer adapter convert" in caught.value.message


def test_an_mlx_config_beside_peft_s_file_is_named(tmp_path: Path) -> None:
    mlx = write_mlx(EXAMPLE, tmp_path / "mlx")
    (mlx / "adapters.safetensors").rename(mlx / WEIGHTS_FILE)
    with refused(AdapterInvalid, key="lora_parameters") as caught:
        read_adapter(mlx, None)
    assert "veneer adapter convert" in caught.value.message


def test_a_peft_folder_needs_no_conversion(tmp_path: Path) -> None:
    with refused(AdapterInvalid) as caught:
        convert_adapter(EXAMPLE, tmp_path / "out")
    assert "veneer adapter push" in caught.value.message


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with refused(InvalidField, field="out"):
        convert_adapter(write_mlx(EXAMPLE, tmp_path / "mlx"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type"),
        ({"fine_tune_type": "full"}, "fine_tune_type"),
        ({"lora_parameters": {"rank": 8}}, "lora_parameters"),
        ({"lora_parameters": {"rank": 8, "scale": True}}, "lora_parameters"),
        ({"lora_parameters": None}, "lora_parameters"),
    ],
)
def test_what_mlx_can_train_but_we_cannot_serve(
    config: dict[str, Any], key: str, tmp_path: Path
) -> None:
    with refused(AdapterInvalid, key=key):
        convert_adapter(write_mlx(EXAMPLE, tmp_path / "mlx", **config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.m",
        "model.embed_tokens.lora_a",
        "model.layers.0.mlp.switch_mlp.gate_proj.lora_a",
        "lm_head.lora_b",
        "language_model.model.layers.0.mlp.up_proj.lora_a",
    ],
)
def test_other_tensors_of_mlx_are_refused(name: str, tmp_path: Path) -> None:
    source = write_mlx(EXAMPLE, tmp_path / "mlx")
    tensors = load_file(source / "adapters.safetensors")
    save_file({**tensors, name: torch.ones(4, 4)}, source / "adapters.safetensors")
    with refused(AdapterInvalid, tensor=name):
        convert_adapter(source, tmp_path / "out")


def test_a_llama_needs_its_base(tmp_path: Path) -> None:
    source = write_gguf(EXAMPLE, tmp_path / "a.gguf")
    with refused(InvalidField, field="base", cause="heads") as caught:
        convert_adapter(source, tmp_path / "out")
    assert "--base" in caught.value.message
    no_heads, no_size = HEADS | {"num_attention_heads": 0}, HEADS | {"hidden_size": None}
    for text in ("", "[]", "{}", json.dumps(no_heads), json.dumps(no_size), "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with refused(InvalidField, field="base"):
            convert_adapter(source, tmp_path / "out", base=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "facts",
    [
        {gguf.Keys.General.TYPE: "model"},
        {gguf.Keys.Adapter.TYPE: "other"},
        {gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS: [1, 2]},
    ],
)
def test_other_gguf_files_are_refused(
    facts: dict[str, Any], tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(self: gguf.GGUFWriter, key: str, value: Any, *more: Any, **most: Any) -> None:
        plain(self, key, facts.get(key, value), *more, **most)

    plain = gguf.GGUFWriter.add_key_value
    new = {key: value for key, value in facts.items() if "alora" in key}
    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", add)
    source = write_gguf(EXAMPLE, tmp_path / "a.gguf", facts=new)
    with refused(AdapterInvalid, file="a.gguf"):
        convert_adapter(source, tmp_path / "out", base=base)


def test_an_unknown_architecture_is_refused(tmp_path: Path, base: Path) -> None:
    source = write_gguf(EXAMPLE, tmp_path / "a.gguf", arch="granite")
    with refused(AdapterInvalid) as caught:
        convert_adapter(source, tmp_path / "out", base=base)
    assert "granite" in caught.value.message


HEAD = b"GGUF" + struct.pack("<I", 3)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GG",
        b"GGUF",
        b"PK\x03\x04" + bytes(100),
        b"GGUF" + struct.pack(">I", 3) + bytes(64),
        HEAD + struct.pack("<QQ", 1 << 60, 0),
        HEAD + struct.pack("<QQ", 0, 1 << 60),
        HEAD + struct.pack("<QQ", 0, 4000),
        HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1 << 63) + b"x",
        # An array that claims to be longer than any file, of numbers, strings and arrays.
        *(
            HEAD + struct.pack("<QQ", 0, 1) + _text(b"k") + struct.pack("<IIQ", 9, t, 1 << 62)
            for t in (0, 8, 9)
        ),
        HEAD + struct.pack("<QQ", 0, 1) + _text(b"k") + struct.pack("<IIQ", 9, 9, 1) * 1000,
        HEAD + struct.pack("<QQ", 0, 1) + _text(b"k") + struct.pack("<I", 99),
        HEAD + struct.pack("<QQ", 1, 0) + _text(b"t") + struct.pack("<I", 1 << 31),
        HEAD
        + struct.pack("<QQ", 1, 0)
        + _text(b"t")
        + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0),
        HEAD
        + struct.pack("<QQ", 1, 0)
        + _text(b"t")
        + struct.pack("<IQQIQ", 2, 32, 32, 0, 1 << 62),
        HEAD + struct.pack("<QQ", 1, 0) + _text(b"t") + struct.pack("<IQQIQ", 2, 4, 4, 77, 0),
    ],
)
def test_a_hostile_gguf_is_refused_at_once(data: bytes, tmp_path: Path, base: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    with refused(AdapterInvalid, file="a.gguf"):
        convert_adapter(tmp_path / "a.gguf", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [write_mlx, write_gguf])
def test_a_file_that_is_cut_off_is_refused(
    make: Callable[[Path, Path], Path], tmp_path: Path, base: Path
) -> None:
    source = make(EXAMPLE, tmp_path / "made.gguf")
    file = source / "adapters.safetensors" if source.is_dir() else source
    whole = file.read_bytes()
    for size in (4, 40, 4000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(AdapterInvalid):
            convert_adapter(source, tmp_path / "out", base=base)
        assert not (tmp_path / "out").exists()


def test_nothing_that_is_no_adapter_is_converted(tmp_path: Path) -> None:
    for given in (tmp_path, tmp_path / "nothing"):
        with refused(AdapterInvalid):
            convert_adapter(given, tmp_path / "out")


def test_bad_numbers_are_refused(tmp_path: Path) -> None:
    source = write_mlx(EXAMPLE, tmp_path / "mlx")
    tensors = load_file(source / "adapters.safetensors")
    first = next(iter(tensors))
    tensors[first][0, 0] = float("nan")
    save_file(tensors, source / "adapters.safetensors")
    with refused(AdapterInvalid):
        convert_adapter(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
