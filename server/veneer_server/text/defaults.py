"""What the base model's ``generation_config.json`` says about unset sampling."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SamplingDefaults", "read_sampling_defaults"]


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Used where a request leaves a value unset; ``top_k`` 0 and ``top_p`` 1 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """Of a base folder. Values count only where the file asks for sampling.

    Transformers ignores temperature, top_k and top_p unless ``do_sample`` is true,
    so a file without it says nothing. Values out of range are left out as well.
    """
    try:
        raw = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return SamplingDefaults()
    if not isinstance(raw, dict) or raw.get("do_sample") is not True:
        return SamplingDefaults()

    def number(key: str, low: float, high: float, default: float) -> float:
        value: Any = raw.get(key)
        fits = isinstance(value, int | float) and low <= value <= high
        return float(value) if fits else default

    return SamplingDefaults(
        temperature=number("temperature", 0.0, 100.0, 1.0),
        top_k=int(number("top_k", 0, 1 << 31, 0)),
        top_p=number("top_p", 1e-6, 1.0, 1.0),
    )
