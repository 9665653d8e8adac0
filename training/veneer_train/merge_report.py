"""Merges, then compares the written model with the base plus adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from veneer_registry.errors import InvalidField

from veneer_train.data import TrainingSample, load_file
from veneer_train.evaluate import evaluate
from veneer_train.measure import data_options, quant_of, template_of
from veneer_train.merge import (
    DTYPES,
    Divergence,
    Dtype,
    Into,
    Rounding,
    adapted,
    dequantized_base,
    divergence,
    merge,
    source_base,
)
from veneer_train.model import load_tokenizer
from veneer_train.plain_json import plain_json

MUCH_ROUNDING: Final = 0.1
"""Share of the delta's norm lost to rounding above which the report warns."""

REPORT_FILE: Final = "veneer_merge.json"
"""Report file in the merged folder: how it was merged, and how far it is from the base plus
adapter."""

_BATCH: Final = 8

TEXTS = (
    "Water boils at a lower temperature on a mountain, because the air above it is thinner.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "SELECT name FROM users WHERE age > 30 ORDER BY name LIMIT 5;",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
)
"""Texts that divergences are measured on, if no data is given."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """How far a merged model, as written, is from the base plus adapter.

    Attributes:
        data: the file used for measuring; "" for `TEXTS`.
        samples: number of its samples that were used.
        divergences: by the model that the merged one is compared with.
        losses: nats per token over the expected answers in ``data``, of the merged model
            (``merged``) and of the others.
    """

    dtype: Dtype
    into: Into
    rounding: Rounding
    data: str
    samples: int
    divergences: dict[str, Divergence]
    losses: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """The report as plain data, for scripts and for the merged folder."""
        return {
            "dtype": self.dtype,
            "into": self.into,
            "rounding": asdict(self.rounding),
            "data": {"file": self.data, "samples": self.samples},
            "divergence": {name: asdict(found) for name, found in self.divergences.items()},
            "loss": self.losses,
        }

    def warnings(self) -> list[str]:
        """Warnings for the user."""
        found = []
        rounding = self.rounding
        if not rounding.modules:
            found.append("the adapter changes no weight: the merged model is the base")
        if rounding.of_delta > MUCH_ROUNDING:
            wider = "float32" if self.dtype == "float16" else "float16 or float32"
            found.append(
                f"rounding to {self.dtype} loses {rounding.of_delta:.0%} of what the adapter "
                f"changes ({rounding.worst:.0%} of {rounding.worst_module}): use --dtype "
                f"{wider}, or serve the adapter beside its base"
            )
        if not self.data:
            found.append(
                "measured on four general texts, on which the adapter may have little effect: "
                "give a file from its domain with --data"
            )
        return found


def rounding_of(folder: Path) -> Rounding | None:
    """The rounding in a merged folder's report; None if the folder is not a merged one."""
    try:
        facts = json.loads((folder / REPORT_FILE).read_bytes())["rounding"]
        return Rounding(**{**facts, "modules": tuple(facts["modules"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def merge_and_compare(
    base: Path,
    adapter: Path,
    out: Path,
    into: Into,
    *,
    dtype: Dtype = "float32",
    data: Path | None = None,
    limit: int = 64,
) -> MergeReport:
    """Write the merged folder, and compare it, in the written dtype, with the 4-bit and the
    16-bit base plus adapter.

    Args:
        data: JSONL from the adapter's domain to compare on; None: `TEXTS`.
        limit: use only its first samples, at most this many.

    Raises:
        InvalidField: ``out`` exists, the data cannot be read, a weight is not finite in
            ``dtype``, or the adapter does not fit the base.
        AdapterInvalid: a file of the adapter is missing, or not a regular file.
    """
    if out.exists():
        raise InvalidField(
            f"{out} exists: remove it, or choose another folder", metadata={"field": "out"}
        )
    if not (adapter / "adapter_config.json").is_file():
        raise InvalidField(
            f"{adapter} is not an adapter folder (it has no adapter_config.json)",
            metadata={"field": "adapter"},
        )
    quant = quant_of(adapter)
    tokenizer = load_tokenizer(base)
    samples: tuple[TrainingSample, ...] = ()
    if data is not None:  # before the work, since it may be unreadable
        template = template_of(base, adapter, tokenizer)
        options = data_options(adapter, data)
        samples = load_file(data, options, tokenizer, template).samples[:limit]
    try:
        rounding = merge(base, adapter, out, into, quant, dtype=DTYPES[dtype])
    except (ValueError, RuntimeError) as error:
        raise InvalidField(
            f"{adapter} does not fit this base: {error}", metadata={"field": "adapter"}
        ) from error
    batches = [torch.tensor([sample.input_ids]) for sample in samples]
    if data is None:
        batches = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    merged = source_base(out)
    references = {"16-bit base + adapter": source_base}
    if quant.type != "none":
        references = {
            f"{quant.type} base + adapter": lambda folder: dequantized_base(folder, quant),
            **references,
        }
    losses = _losses("merged", merged, samples)
    divergences = {}
    for name, made in references.items():
        reference = adapted(made(base), adapter)
        divergences[name] = divergence(merged, reference, batches)
        losses |= _losses(name, reference, samples)
    report = MergeReport(
        dtype, into, rounding, data.name if data else "", len(samples), divergences, losses
    )
    (out / REPORT_FILE).write_text(plain_json(report.as_json()), "utf-8")
    return report


def _losses(name: str, model: Any, samples: Sequence[TrainingSample]) -> dict[str, float]:
    return {name: evaluate(model, samples, _BATCH).loss} if samples else {}
