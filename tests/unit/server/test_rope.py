"""Rotary scalings: the context that configs promise, and the frequencies.

Logits beyond the original context: `native/test_long_contexts`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from veneer_server.config import load_config
from veneer_server.models.config import UnsupportedModel, read_decoder_config
from veneer_server.models.loader import load_weights
from veneer_server.models.source_weights import SourceWeights
from veneer_server.operate.doctor.base import base_checks

from tests.refused import refused
from tests.unit.server.test_decoder import LINEAR, LLAMA3, TINY, YARN, save_random

SCALINGS: dict[str, dict[str, Any]] = {
    "llama3": LLAMA3,
    "linear": LINEAR,
    "yarn": YARN,
    "yarn-fractions": YARN | {"truncate": False, "beta_fast": 16, "beta_slow": 2},
    "yarn-attention-factor": YARN | {"attention_factor": 1.3},
    "yarn-mscale": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
    # Without effect up to max_position_embeddings.
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}


def scaled(name: str) -> LlamaConfig:
    return LlamaConfig(**TINY, rope_parameters=dict(SCALINGS[name]))


def written(folder: Path, **changes: Any) -> Path:
    raw = {"model_type": "llama", **TINY, **changes}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


# What published configs have; theirs are longer, but nothing else in them matters here.
QWEN25 = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA31 = LLAMA3 | {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"max_position_embeddings": 8192, "rope_scaling": None}, 8192),
        # Llama 3.1 and 3.2, whose factors are 8 and 32.
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA31}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA31 | {"factor": 32}}, 131072),
        # Qwen2.5 as its model card says to turn it on, and Qwen3, whose own limit is more than
        # what YaRN begins with.
        ({"max_position_embeddings": 32768, "rope_scaling": QWEN25}, 131072),
        ({"max_position_embeddings": 40960, "rope_scaling": QWEN25}, 131072),
        ({"max_position_embeddings": 32768, "rope_parameters": QWEN25}, 131072),
        # Written after the context was raised too, as in Yarn-Llama-2-128k.
        ({"max_position_embeddings": 131072, "rope_scaling": QWEN25}, 131072),
        (
            {"max_position_embeddings": 1024, "rope_scaling": {"type": "yarn", "factor": 4}},
            4096,
        ),
        ({"max_position_embeddings": 1024, "rope_scaling": QWEN25 | {"factor": None}}, 1024),
        # deepseek-coder's limit is the scaled one.
        (
            {
                "max_position_embeddings": 16384,
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            16384,
        ),
        (
            {
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            16384,
        ),
        (
            {
                "max_position_embeddings": 4096,
                "rope_scaling": {"type": "dynamic", "factor": 2.0},
            },
            4096,
        ),
        # The key beside the scaling is the one that transformers computes with.
        (
            {
                "max_position_embeddings": 1024,
                "original_max_position_embeddings": 128,
                "rope_scaling": YARN,
            },
            512,
        ),
        # transformers prefers the older key.
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": QWEN25,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            131072,
        ),
    ],
)
def test_the_context_is_what_the_config_promises(
    config: dict[str, Any], tokens: int, tmp_path: Path
) -> None:
    assert read_decoder_config(written(tmp_path, **config)).context_length == tokens


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "yarn", "factor": "4"}, "factor"),
        ({"rope_type": "yarn", "factor": float("nan")}, "factor"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor"),
        ({"rope_type": "linear", "factor": None}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        (YARN | {"original_max_position_embeddings": "64"}, "original_max_position_embeddings"),
        (YARN | {"attention_factor": "x"}, "attention_factor"),
        (YARN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor"),
        ({"full_attention": YARN, "sliding_attention": YARN}, "rope_parameters"),
        ([YARN], "rope_scaling"),
        ({"rope_type": "longrope"}, "rope_type"),
        ({"type": "su"}, "rope_type"),
        ({"rope_type": None}, "rope_type"),
        ({"rope_type": ["yarn"]}, "rope_type"),
    ],
)
def test_a_scaling_that_cannot_be_computed_is_refused_by_its_key(
    rope: Any, key: str, tmp_path: Path
) -> None:
    for form in ("rope_scaling", "rope_parameters"):
        with refused(UnsupportedModel, key=key) as caught:
            read_decoder_config(written(tmp_path, **{form: rope}))
        if key == "rope_type":
            named = caught.value.metadata["supported"].split()
            assert named == ["default", "linear", "dynamic", "llama3", "yarn"]


@pytest.mark.parametrize("name", sorted(SCALINGS))
def test_frequencies_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """To the bit, in float32 whatever the base is served in; so are the self-test's."""
    config = scaled(name)
    save_random(config, tmp_path)
    frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    for dtype in (torch.float32, torch.bfloat16):
        weights = load_weights(
            tmp_path, quantization="none", dtype=dtype, device=torch.device("cpu")
        )
        assert torch.equal(weights.inv_freq, frequencies)
        assert weights.rotary_scale == factor
    with SourceWeights(tmp_path, "none", torch.float32) as source:
        assert torch.equal(source.inv_freq, frequencies)
        assert source.rotary_scale == factor
    scales = name.startswith("yarn")
    assert (factor != 1) == scales, "YaRN alone scales attention"


def test_the_doctor_tells_the_context(tmp_path: Path) -> None:
    def found(**rope: Any) -> list[Any]:
        written(tmp_path, rope_scaling=rope, max_position_embeddings=32768)
        return list(base_checks(load_config({"base": str(tmp_path)}, {})))

    base, *_ = found(**QWEN25)
    assert (base.status, "131,072" in base.found) == ("ok", True)
    base, *_ = found(type="dynamic", factor=2.0)
    assert (base.status, "32,768" in base.found) == ("warning", True)
    base, *_ = found(type="longrope")
    assert (base.status, "longrope" in base.found) == ("problem", True)
