"""Random damage to an adapter folder never raises anything but a `VeneerError`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from veneer_registry.bundle_files import TEMPLATE_FILE
from veneer_registry.errors import VeneerError
from veneer_registry.format import read_adapter
from veneer_registry.lora_config import CONFIG_FILE
from veneer_registry.training_manifest import TRAINING_FILE
from veneer_registry.weights import WEIGHTS_FILE

from tests.unit.registry.kit import (
    BASE,
    assert_checks_agree,
    make_adapter,
    make_tensors,
    raw_file,
)

PARTS = (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE, TEMPLATE_FILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = make_tensors(2, layers=[0], projections=["q_proj", "up_proj"])
    config = {"r": 2, "alpha_pattern": {"q_proj": 3}, "target_modules": ["q_proj", "up_proj"]}
    folder = make_adapter(tmp_path_factory.mktemp("a"), config, tensors)
    prints = {"weights": "a" * 64, "tokenizer": "b" * 64}
    document = {"base_fingerprint": prints, "metrics": {"loss": 1.0}, "n": [1, {"a": None}]}
    (folder / TRAINING_FILE).write_text(json.dumps(document))
    (folder / TEMPLATE_FILE).write_text("{{ messages }} é")
    read_adapter(folder, BASE)
    return folder


def try_reading(folder: Path) -> bool:
    assert_checks_agree(folder)
    try:
        manifest = read_adapter(folder, BASE)
    except VeneerError as error:
        refusal = error
    else:
        assert manifest.modules
        return True
    # What it says must fit a gRPC trailer.
    said = json.dumps([refusal.message, refusal.metadata])
    assert len(said) < 4000
    return False


def test_random_damage(folder: Path) -> None:
    """Flips, cuts, insertions and swaps of bytes, mostly where the structure is."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    good = {name: (folder / name).read_bytes() for name in PARTS}
    refused = 0
    for _ in range(600):
        name = rng.choice(PARTS)
        data = bytearray(good[name])
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(min(len(data), 900) or 1)
            match rng.randrange(5):
                case 0:
                    data[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)])
                case 2:
                    del data[at : at + rng.choice((1, 2, 50))]
                case 3:
                    data[at:at] = rng.choice(
                        (b"0", b"9" * 20, b'"', b"{", b"[", b"\\ud800", b",")
                    )
                case 4:
                    del data[rng.randrange(len(data) + 1) :]
            if not data:
                break
        (folder / name).write_bytes(data)
        refused += not try_reading(folder)
        (folder / name).write_bytes(good[name])
    assert refused > 250, "the damage reaches nothing that matters"
    assert try_reading(folder)


KEYS = st.sampled_from(
    [
        "r",
        "lora_alpha",
        "peft_type",
        "task_type",
        "bias",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "init_lora_weights",
        "target_modules",
        "modules_to_save",
        "use_dora",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "loftq_config",
        "new",
    ]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["LORA", "CAUSAL_LM", "none", "q_proj", "^q_proj$", "(a+)+", 2]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.just("q_proj"), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.push
@settings(deadline=None, print_blob=True, max_examples=150)
@given(changes=st.dictionaries(KEYS, JSON, max_size=4))
def test_any_config(folder: Path, changes: dict[str, Any]) -> None:
    good = (folder / CONFIG_FILE).read_bytes()
    (folder / CONFIG_FILE).write_text(json.dumps({**json.loads(good), **changes}))
    try_reading(folder)
    (folder / CONFIG_FILE).write_bytes(good)


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", 3]),
        "shape": st.lists(st.integers(-1, 1 << 62) | st.integers(0, 4), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 64) | st.integers(0, 1 << 63), max_size=3),
    }
)
TENSOR_NAMES = st.sampled_from(
    sorted(make_tensors(layers=[0], projections=["q_proj"]))
) | st.text(max_size=10)


@settings(deadline=None, print_blob=True, max_examples=150)
@given(
    header=st.dictionaries(TENSOR_NAMES, ENTRIES | JSON, max_size=3),
    size=st.integers(0, 128),
    cut=st.integers(0, 64),
)
def test_any_header(folder: Path, header: dict[str, Any], size: int, cut: int) -> None:
    good = (folder / WEIGHTS_FILE).read_bytes()
    data = raw_file(header, bytes(size))
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) - cut])
    try_reading(folder)
    (folder / WEIGHTS_FILE).write_bytes(good)
