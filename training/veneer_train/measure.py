"""Measures an adapter on a data set against its base in 4 bits and a 16-bit reference."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from peft import PeftModel
from veneer_registry.bundle_files import TEMPLATE_FILE, read_small, select_files
from veneer_registry.errors import InvalidField
from veneer_registry.replacing import replace_file
from veneer_registry.training_manifest import TRAINING_FILE

from veneer_train.checks import Score
from veneer_train.config import DataConfig, QuantConfig
from veneer_train.data import DataSet, load_file
from veneer_train.evaluate import Evaluation, evaluate, measure_tasks
from veneer_train.model import (
    load_base,
    load_tokenizer,
    read_template,
    stored_quantization,
    training_device,
)
from veneer_train.plain_json import finite, plain_json

REFERENCE: Final = "16-bit base"


@dataclass(frozen=True, slots=True)
class Measured:
    """One model's figures.

    Attributes:
        tasks: scores by kind of check; empty if no sample has a check.
    """

    name: str
    loss: Evaluation
    tasks: Mapping[str, Score]

    def metrics(self) -> dict[str, float]:
        """The figures, each under a flat name."""
        found = {
            "loss": self.loss.loss,
            "perplexity": self.loss.perplexity,
            "accuracy": self.loss.accuracy,
            "tokens": float(self.loss.tokens),
        }
        for kind, score in self.tasks.items():
            found |= {
                f"{kind}_share": score.share,
                f"{kind}_low": score.low,
                f"{kind}_high": score.high,
                f"{kind}_asked": float(score.asked),
            }
        return {name: round(value, 6) for name, value in finite(found).items()}


def manifest_of(adapter: Path) -> dict[str, Any]:
    """Content of ``training_manifest.json``; empty if it is missing or unreadable.

    Raises:
        AdapterInvalid: it is not a regular file, or it is a link that leaves the folder.
    """
    if not os.path.lexists(adapter / TRAINING_FILE):
        return {}
    try:
        found = json.loads(read_small(adapter, TRAINING_FILE))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def quant_of(adapter: Path) -> QuantConfig:
    """How the base was quantized in training, by the manifest; the default if not recorded."""
    try:
        return QuantConfig(**manifest_of(adapter)["config"]["quant"])
    except (KeyError, TypeError):
        return QuantConfig()


def data_options(adapter: Path, data: Path, *, max_len: int | None = None) -> DataConfig:
    """Data options of the adapter's training, applied to another file.

    Args:
        max_len: replaces the recorded one.
    """
    chosen = {"format", "loss_on", "max_len", "on_truncated"}
    facts = manifest_of(adapter).get("config", {}).get("data", {})
    kept = {key: value for key, value in facts.items() if key in chosen}
    if kept.get("on_truncated", "error") == "error":
        kept["on_truncated"] = "drop"  # samples that are too long must not stop measuring
    if max_len is not None:
        kept["max_len"] = max_len
    return DataConfig(train=str(data), **kept)


def measure(
    base: Path,
    adapter: Path | None,
    data: Path,
    options: DataConfig,
    *,
    reference: bool = True,
    quant: QuantConfig | None = None,
    batch: int = 8,
    limit: int | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Measure loss and task scores of the reference, the base and the adapter, in this order.

    Args:
        adapter: None: measure only the bases.
        options: how to read the data; the files that it names are ignored.
        reference: also measure the 16-bit base.
        limit: use only the first samples, at most this many.
        told: called with a line for each step.

    Raises:
        InvalidField: data, base or adapter cannot be read.
        AdapterInvalid: a file of the adapter is missing, or not a regular file.
    """
    if adapter is not None:
        select_files(adapter)  # PEFT would open any file, even pickles
    reference = reference and stored_quantization(base) is None
    quant = quant or (quant_of(adapter) if adapter is not None else QuantConfig())
    tokenizer = load_tokenizer(base)
    samples = load_file(data, options, tokenizer, template_of(base, adapter, tokenizer))
    samples = replace(samples, samples=samples.samples[:limit])
    found = []
    if reference:
        model = load_base(base, replace(quant, type="none"), training_device())
        found.append(_measured(REFERENCE, model, tokenizer, samples, batch, told))
        del model
    # Nothing is trained here, so layers may pack their weights, as in serving.
    model = load_base(base, quant, training_device(), train=False)
    name = "16-bit" if quant.type == "none" else "4-bit"
    if quant.type != "none" or not reference:
        found.append(_measured(f"{name} base", model, tokenizer, samples, batch, told))
    if adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidField(
                f"{adapter} is not an adapter for this base: {error}",
                metadata={"field": "adapter"},
            ) from error
        found.append(
            _measured(f"{name} base + adapter", model, tokenizer, samples, batch, told)
        )
    return found


def template_of(base: Path, adapter: Path | None, tokenizer: Any) -> str:
    """The adapter's chat template, else the base's."""
    if adapter is not None and os.path.lexists(adapter / TEMPLATE_FILE):
        return read_small(adapter, TEMPLATE_FILE).decode("utf-8")
    return read_template(None, tokenizer)


def _measured(
    name: str,
    model: Any,
    tokenizer: Any,
    data: DataSet,
    batch: int,
    told: Callable[[str], None],
) -> Measured:
    told(f"{name}: loss on {len(data.samples)} samples")
    loss = evaluate(model, data.samples, batch)
    asked = sum(sample.task is not None for sample in data.samples)
    if asked:
        told(f"{name}: answering {asked} tasks")
    return Measured(name, loss, measure_tasks(model, tokenizer, data.samples))


def check_recordable(adapter: Path) -> None:
    """Raise InvalidField if the adapter has no manifest to record figures in."""
    if not manifest_of(adapter):
        raise InvalidField(
            f"{adapter / TRAINING_FILE} cannot be read: figures can be recorded only in "
            "adapters written by veneer-train",
            metadata={"file": TRAINING_FILE},
        )


def record(adapter: Path, data: Path, measured: Sequence[Measured]) -> None:
    """Record the figures in the adapter's manifest, replacing earlier ones for this file.
    Raises as `check_recordable`."""
    check_recordable(adapter)
    manifest = manifest_of(adapter)
    evaluations = manifest.setdefault("evaluations", {})
    evaluations[data.name] = {each.name: each.metrics() for each in measured}
    replace_file(adapter / TRAINING_FILE, plain_json(manifest), mode=0o644)
