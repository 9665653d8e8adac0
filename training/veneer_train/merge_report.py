"""Merge, then compare the written model with what it stands for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from veneer_registry.errors import InvalidField

from veneer_train.measure import quant_of
from veneer_train.merge import Into, adapted, dequantized_base, divergence, merge, source_base
from veneer_train.model import load_tokenizer

__all__ = ["TEXTS", "merge_and_compare"]

TEXTS = (
    "Water boils at a lower temperature on a mountain, because the air above it is thinner.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "SELECT name FROM users WHERE age > 30 ORDER BY name LIMIT 5;",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
)
"""What divergences are measured on, beside each other."""


def merge_and_compare(base: Path, adapter: Path, out: Path, into: Into) -> dict[str, Any]:
    """Write the merged folder; divergences of it (in the dtype that it is written in) from the
    4-bit base with the adapter and from the 16-bit base with it.

    Raises:
        InvalidField: ``out`` exists, or the adapter does not fit the base.
    """
    if out.exists():
        raise InvalidField(
            f"{out} exists: remove it, or choose another folder", metadata={"field": "out"}
        )
    if not (adapter / "adapter_config.json").is_file():
        raise InvalidField(
            f"{adapter} is no adapter folder (no adapter_config.json)",
            metadata={"field": "adapter"},
        )
    quant = quant_of(adapter)
    try:
        merge(base, adapter, out, into, quant, dtype=torch.bfloat16)
    except (ValueError, RuntimeError) as error:
        raise InvalidField(
            f"{adapter} does not fit this base: {error}", metadata={"field": "adapter"}
        ) from error
    tokenizer = load_tokenizer(base)
    batches = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    merged = source_base(out)
    references = {"16-bit base + adapter": source_base}
    if quant.type != "none":
        references = {
            f"{quant.type} base + adapter": lambda folder: dequantized_base(folder, quant),
            **references,
        }
    return {
        name: asdict(divergence(merged, adapted(made(base), adapter), batches))
        for name, made in references.items()
    }
