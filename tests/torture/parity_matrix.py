"""Fifteen adapters of every kind, made by PEFT itself, and the base; and prompts for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from veneer_server.models.source import BUNDLED

from tests.integration.test_parity import load_reference
from tests.peft_adapters import ALL_LINEAR, variants
from tests.places import REPOSITORY
from tests.tiny_llama import VOCABULARY, make_tiny_llama
from tests.torture.row import Scale


@dataclass(frozen=True, slots=True)
class Matrix:
    """A base, prompts, and the folders of adapters by name."""

    base: Path
    prompts: list[list[int]]
    folders: Mapping[str, Path]
    seed: int

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """Every adapter ("" is the base) with every prompt, in an order that mixes adapters."""
        found = [(name, p) for p in range(len(self.prompts)) for name in ("", *self.folders)]
        Random(self.seed).shuffle(found)
        return found

    @property
    def size(self) -> str:
        """The size as text for a table's cell."""
        return (
            f"{len(self.prompts)} prompts x {len(self.folders) + 1} = {len(self.pairs):,} pairs"
        )


def _configs() -> dict[str, LoraConfig]:
    """Return the configs of fifteen adapters (sixteen with the base)."""
    more: dict[str, dict[str, Any]] = {
        "rank-2": {"r": 2, "lora_alpha": 3},
        "rank-32": {"r": 32},
        "rslora-64": {"r": 64, "use_rslora": True, "lora_alpha": 8},
        "one-module": {"r": 8, "target_modules": ["down_proj"]},
    }
    options = {"target_modules": ALL_LINEAR, "lora_alpha": 16, "init_lora_weights": False}
    return variants() | {
        name: LoraConfig(task_type="CAUSAL_LM", **(options | given))
        for name, given in more.items()
    }


def _make(model: Any, folder: Path, *, strength: float, seed: int) -> dict[str, Path]:
    """Make adapters, saved by PEFT itself, with random A and B."""
    folders = {}
    for index, (name, config) in enumerate(_configs().items()):
        torch.manual_seed(seed + index)
        wrapped = get_peft_model(model, config)
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=strength)
        wrapped.save_pretrained(folder / name)
        model = wrapped.unload()
        folders[name] = folder / name
    return folders


def tiny_matrix(scale: Scale, prompts: int) -> Matrix:
    base = make_tiny_llama(scale.folder("tiny"), seed=scale.seed)
    return _matrix(scale, base, prompts, VOCABULARY, strength=0.2)


def bundled_matrix(scale: Scale, prompts: int) -> Matrix:
    base = REPOSITORY / ".cache" / "veneer" / "bases" / BUNDLED
    return _matrix(scale, base, prompts, 40_000, strength=0.02)


def _matrix(
    scale: Scale, base: Path, prompts: int, vocabulary: int, *, strength: float
) -> Matrix:
    random = scale.random(base.name)
    texts = [
        [random.randrange(3, vocabulary) for _ in range(random.randint(4, 40))]
        for _ in range(prompts)
    ]
    model = load_reference(base, "none", torch.float32)
    folder = scale.folder(f"adapters of {base.name}")
    folders = _make(model, folder, strength=strength, seed=scale.seed)
    return Matrix(base, texts, folders, scale.seed)
