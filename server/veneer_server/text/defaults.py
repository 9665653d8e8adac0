"""What the base model's ``generation_config.json`` says about unset sampling."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SamplingDefaults", "read_sampling_defaults"]


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Used where a request leaves a value unset; off where the model says nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """Of a base folder. Values out of range are left out.

    Transformers ignores temperature, top_k, top_p and min_p unless ``do_sample`` is
    true, so a file without it says nothing of these; its repetition penalty counts
    either way.
    """
    try:
        raw = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return SamplingDefaults()
    if not isinstance(raw, dict):
        return SamplingDefaults()

    def number(key: str, low: float, high: float, default: float) -> float:
        value: Any = raw.get(key)
        fits = isinstance(value, int | float) and low <= value <= high
        return float(value) if fits else default

    repetition_penalty = number("repetition_penalty", 0.01, 100.0, 1.0)
    if raw.get("do_sample") is not True:
        return SamplingDefaults(repetition_penalty=repetition_penalty)
    return SamplingDefaults(
        temperature=number("temperature", 0.0, 100.0, 1.0),
        top_k=int(number("top_k", 0, 1 << 31, 0)),
        top_p=number("top_p", 1e-6, 1.0, 1.0),
        min_p=number("min_p", 0.0, 1.0, 0.0),
        repetition_penalty=repetition_penalty,
    )
