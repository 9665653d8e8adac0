"""Content of ``training_manifest.json``: an adapter's origin, in plain facts.

It contains no path of this machine: files are given by base name and hash, the base by its
logical name and fingerprint.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from veneer_registry.adapter import BaseFingerprint
from veneer_registry.fingerprint import fingerprint_base

from veneer_train.checks import Score
from veneer_train.config import QuantConfig, TrainConfig
from veneer_train.data import DataSet, Split
from veneer_train.evaluate import Evaluation
from veneer_train.plain_json import finite

FORMAT: Final = 1
_PACKAGES: Final = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "veneer")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts of a run.

    Attributes:
        steps: optimiser steps.
        tokens: input tokens seen; see `trainer.Fitted`.
        seconds: wall time from loading the base to the last evaluation.
        last_loss: the last step's training loss.
        before, after: validation of the base and of the written adapter.
        tasks_before, tasks_after: task scores of both, by kind of check.
    """

    steps: int
    tokens: int
    seconds: float
    last_loss: float
    before: Evaluation | None
    after: Evaluation | None
    tasks_before: Mapping[str, Score] = field(default_factory=dict)
    tasks_after: Mapping[str, Score] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The figures, each under a flat name."""
        found = {"train_loss_last": self.last_loss}
        for when, measured in (("before", self.before), ("after", self.after)):
            if measured is not None:
                found[f"val_loss_{when}"] = measured.loss
                found[f"val_accuracy_{when}"] = measured.accuracy
                found[f"val_perplexity_{when}"] = measured.perplexity
        for when, scores in (("before", self.tasks_before), ("after", self.tasks_after)):
            for kind, score in scores.items():
                found[f"val_{kind}_{when}"] = score.share
                found[f"val_{kind}_{when}_low"] = score.low
                found[f"val_{kind}_{when}_high"] = score.high
        # Readers accept only numbers, and JSON cannot express non-finite ones.
        return {name: round(value, 6) for name, value in finite(found).items()}


def fingerprint(folder: Path, quant: QuantConfig) -> BaseFingerprint:
    """The base's identity in four parts, from its files (never from live modules)."""
    quantization: dict[str, object] | None = None
    if quant.type != "none":
        # The server uses the same keys: equal settings must give equal digests.
        quantization = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quant.type,
            "bnb_4bit_use_double_quant": quant.double_quant,
        }
    return fingerprint_base(folder, quantization=quantization, cache_dir=None)


def hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(0)
    return facts


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _data(data: DataSet | None) -> dict[str, Any] | None:
    if data is None:
        return None
    return {
        "file": data.file,
        "sha256": data.sha256,
        "samples": len(data.samples),
        "tokens": data.tokens,
        "learned_tokens": data.learned,
        "dropped": data.dropped,
        "truncated": data.truncated,
    }


def config_facts(config: TrainConfig) -> dict[str, Any]:
    """The config without this machine's paths."""
    facts = asdict(config)
    facts["model"] = {"name": config.model.name}
    del facts["output"]
    for key in ("train", "val", "template"):
        if facts["data"][key] is not None:
            facts["data"][key] = Path(facts["data"][key]).name
    return facts


def build_manifest(
    config: TrainConfig, split: Split, base: BaseFingerprint, facts: RunFacts
) -> dict[str, Any]:
    """The manifest as JSON-ready data. The same run gives the same data, except times."""
    return {
        "format": FORMAT,
        "base_name": config.model.name,
        "base_fingerprint": asdict(base),
        "data": {"train": _data(split.train), "val": _data(split.val)},
        "config": config_facts(config),
        "versions": versions(),
        "hardware": hardware(),
        "seed": config.train.seed,
        "steps": facts.steps,
        "tokens": facts.tokens,
        "wall_seconds": round(facts.seconds, 1),
        "metrics": facts.metrics(),
    }
