"""What PEFT saves is accepted, and ranks and scalings are PEFT's own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from veneer_registry.adapter import BaseFingerprint, BaseSpec
from veneer_registry.errors import AdapterInvalid
from veneer_registry.format import read_adapter
from veneer_registry.stored_adapter import open_stored
from veneer_registry.tensor_names import module_path

from tests.refused import refused
from tests.unit.registry.kit import SHAPES

pytestmark = pytest.mark.push

LAYERS = 3
BASE = BaseSpec(
    "tiny",
    LAYERS,
    SHAPES,
    BaseFingerprint("a" * 64, "b" * 64),
    names=("someone/some-model",),
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

VARIANTS: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1, "lora_alpha": 1, "target_modules": "all-linear"},
    "rank 64": {"r": 64, "lora_alpha": 16, "target_modules": "all-linear"},
    "rslora": {"r": 7, "lora_alpha": 13, "use_rslora": True, "target_modules": "all-linear"},
    "rank pattern": {"r": 4, "rank_pattern": {"q_proj": 8, "layers.2.mlp.up_proj": 2}}
    | {"target_modules": [*ATTENTION, "up_proj"]},
    "alpha pattern": {"r": 6, "lora_alpha": 5, "target_modules": "all-linear"}
    | {"alpha_pattern": {"layers.1.self_attn.k_proj": 11, "k_proj": 3, "down_proj": 17}},
    "both patterns, rslora": {"r": 4, "use_rslora": True, "target_modules": "all-linear"}
    | {"rank_pattern": {"model.layers.0.self_attn.q_proj": 3, "mlp.gate_proj": 5}}
    | {"alpha_pattern": {"self_attn.q_proj": 3, r"^model\.layers\.2\.mlp\.up_proj": 7}},
    "attention only": {"r": 4, "target_modules": ATTENTION},
    "MLP only": {"r": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "some layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "regex targets": {"r": 4, "target_modules": r".*layers\.[02]\..*(q|up)_proj"},
    "no task type": {"r": 4, "target_modules": ["v_proj"], "task_type": None},
    "gaussian": {"r": 4, "target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
    "dropout": {"r": 4, "target_modules": ["v_proj"], "lora_dropout": 0.3},
    "exclude": {"r": 4, "target_modules": ATTENTION, "exclude_modules": ["o_proj"]},
}


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        # Two names that must not leak into anything but messages.
        name_or_path="someone/some-model",
    )
    return LlamaForCausalLM(config)


def save(folder: Path, **options: Any) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make_model(), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
        # PEFT sorts pattern keys on saving, which may change what they mean: what
        # counts is what it makes of the file.
        return PeftModel.from_pretrained(make_model(), folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_peft(variant: str, tmp_path: Path) -> None:
    model = save(tmp_path, **VARIANTS[variant])
    manifest = read_adapter(tmp_path, BASE)
    theirs = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    ours = {module_path(m.layer, m.projection): m for m in manifest.modules}
    assert ours.keys() == theirs.keys()
    with open_stored(tmp_path, manifest.weights_digest) as (_, tensors):
        for view in tensors:
            path = module_path(view.module.layer, view.module.projection)
            module = theirs[path]
            assert view.module.rank == module.r["default"]
            assert view.module.scaling == module.scaling["default"], path
            for side, weight in ((view.a, module.lora_A), (view.b, module.lora_B)):
                array = np.frombuffer(side.data, np.float32).reshape(side.shape).copy()
                np.testing.assert_array_equal(array, weight["default"].weight.detach().numpy())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, {"key": "use_dora"}),
        ({"modules_to_save": ["lm_head"]}, {"key": "modules_to_save"}),
        ({"lora_bias": True}, {"key": "lora_bias"}),
        ({"bias": "lora_only"}, {"key": "bias"}),
        ({"init_lora_weights": "pissa"}, {"key": "init_lora_weights"}),
        ({"init_lora_weights": "olora"}, {"key": "init_lora_weights"}),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            {"tensor": "base_model.model.model.embed_tokens.base_layer.weight"},
        ),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            {"tensor": "base_model.model.lm_head.base_layer.weight"},
        ),
        ({"trainable_token_indices": [1, 2]}, {"key": "trainable_token_indices"}),
        ({"layer_replication": [(0, 2), (1, 3)]}, {"key": "layer_replication"}),
    ],
)
def test_refuses_what_peft_can_save_but_we_cannot_serve(
    options: dict[str, Any], named: dict[str, str], tmp_path: Path
) -> None:
    save(tmp_path, **{"r": 4, "target_modules": ["q_proj"], **options})
    with refused(AdapterInvalid, **named):
        read_adapter(tmp_path, BASE)
