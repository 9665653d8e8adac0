"""An adapter whose config names another base is refused; naming none is a warning."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from veneer_registry.adapter import BaseFingerprint
from veneer_registry.base_names import is_named, known_names
from veneer_registry.errors import BaseModelMismatch
from veneer_registry.format import read_adapter
from veneer_registry.training_manifest import TRAINING_FILE

from tests.unit.registry.kit import BASE, make_adapter

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        (HUB, HUB),
        (HUB.upper(), HUB),
        (f" {HUB}/ ", HUB),
        ("SmolLM2-135M-Instruct", HUB),
        ("smollm2_135m_instruct", HUB),
        ("/home/a/models/SmolLM2-135M-Instruct/", HUB),
        ("./SmolLM2-135M-Instruct", HUB),
        ("C:\\models\\SmolLM2-135M-Instruct", HUB),
        (
            f"/root/.cache/huggingface/hub/models--{HUB.replace('/', '--')}/snapshots/12fd25f",
            HUB,
        ),
        (HUB, "smollm2-135m-instruct"),
        (HUB, f"/srv/hub/models--{HUB.replace('/', '--')}/snapshots/12fd25f"),
    ],
)
def test_names_of_one_base(name: str, known: str) -> None:
    assert is_named(name, ["something else", known])


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-3.2-1B",
        "HuggingFaceTB/SmolLM2-135M",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        "someone/SmolLM2-135M-Instruct",
        "/models/SmolLM2-135M-Instruct/checkpoint-500",
        "/root/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B/snapshots/12fd25f",
        "/",
        "SmolLM2-135M-Instruct-GGUF",
    ],
)
def test_names_of_other_bases(name: str) -> None:
    assert not is_named(name, [HUB])


def test_what_a_base_is_known_by(tmp_path: Path) -> None:
    folder = tmp_path / "my-base"
    folder.mkdir()
    (tmp_path / "latest").symlink_to(folder)
    (folder / "config.json").write_text(json.dumps({"_name_or_path": HUB}))
    assert known_names("latest", tmp_path / "latest", "extra/name") == (
        *("latest", "my-base", HUB, "extra/name"),
    )
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "/home/anna/secret/base"}))
    assert known_names("x", folder) == ("x", "my-base", "base")
    (folder / "config.json").write_text("[]")
    assert HUB in known_names("smollm2-135m", folder)


def named(folder: Path, name: object) -> Path:
    return make_adapter(folder, {"base_model_name_or_path": name})


def test_another_base_is_refused_with_both_names(tmp_path: Path) -> None:
    with pytest.raises(BaseModelMismatch) as caught:
        read_adapter(named(tmp_path, "meta-llama/Llama-3.2-1B"), BASE)
    facts = caught.value.metadata
    assert (facts["base"], facts["adapter_base"]) == ("tiny", "meta-llama/Llama-3.2-1B")
    assert "someone/base" in facts["base_names"]
    assert "--allow-base-name meta-llama/Llama-3.2-1B" in caught.value.message


@pytest.mark.parametrize("name", ["tiny", "someone/base", "/models/tiny"])
def test_a_name_of_the_base_is_accepted_without_a_warning(tmp_path: Path, name: str) -> None:
    assert read_adapter(named(tmp_path, name), BASE).warnings == ()


@pytest.mark.parametrize("name", ["", " ", None])
def test_no_name_is_accepted_with_a_warning(tmp_path: Path, name: object) -> None:
    (warning,) = read_adapter(named(tmp_path, name), BASE).warnings
    assert "does not record its base" in warning


def test_an_allowed_name_is_accepted(tmp_path: Path) -> None:
    base = replace(BASE, names=("meta-llama/Llama-3.2-1B",))
    assert read_adapter(named(tmp_path, "meta-llama/llama-3.2-1b"), base).warnings == ()


def test_a_fingerprint_decides_over_the_name(tmp_path: Path) -> None:
    folder = named(tmp_path, "meta-llama/Llama-3.2-1B")
    (folder / TRAINING_FILE).write_text(
        json.dumps({"base_fingerprint": asdict(BASE.fingerprint)})
    )
    assert read_adapter(folder, BASE).base_name == "meta-llama/Llama-3.2-1B"
    other = asdict(BaseFingerprint("9" * 64, "8" * 64))
    folder = named(tmp_path, "tiny")
    (folder / TRAINING_FILE).write_text(json.dumps({"base_fingerprint": other}))
    with pytest.raises(BaseModelMismatch) as caught:
        read_adapter(folder, BASE)
    assert "adapter_weights" in caught.value.metadata


def test_a_strangers_name_is_shown_safely(tmp_path: Path) -> None:
    with pytest.raises(BaseModelMismatch) as caught:
        read_adapter(named(tmp_path, "x'; rm -rf /\n" * 100), BASE)
    assert len(caught.value.message) < 800
    assert "\n" not in caught.value.message
