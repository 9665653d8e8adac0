"""What a request that leaves sampling and length unset gets."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

__all__ = ["RequestDefaults", "read_defaults"]


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """Values of a base for what a request leaves unset.

    Attributes:
        max_tokens: new tokens at most; fewer where the context ends first.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 512


_BUNDLED: Final = {
    # As its model card recommends; the file that it is imported from says nothing.
    "smollm2-135m": RequestDefaults(temperature=0.2),
}


def read_defaults(
    folder: Path,
    name: str,
    *,
    max_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
) -> RequestDefaults:
    """Of a base: what the operator says, else its ``generation_config.json``, else ours.

    Transformers ignores temperature, top_k, top_p and min_p unless ``do_sample`` is true, so a
    file without it says nothing of these; its repetition penalty counts either way. Values
    out of range are left out. A file that samples and leaves one of them out means "off".

    Args:
        folder: of the base.
        name: that the base is served as.
        temperature: the operator's, as ``top_p``; None for the base's own.
    """
    found = _from_file(folder, _BUNDLED.get(name, RequestDefaults()))
    return replace(
        found,
        temperature=found.temperature if temperature is None else temperature,
        top_p=found.top_p if top_p is None else top_p,
        max_tokens=max_tokens,
    )


def _from_file(folder: Path, ours: RequestDefaults) -> RequestDefaults:
    try:
        raw = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ours
    if not isinstance(raw, dict):
        return ours

    def number(key: str, low: float, high: float, default: float) -> float:
        value: Any = raw.get(key)
        fits = isinstance(value, int | float) and low <= value <= high
        return float(value) if fits else default

    repetition_penalty = number("repetition_penalty", 0.01, 100.0, ours.repetition_penalty)
    if raw.get("do_sample") is not True:
        return replace(ours, repetition_penalty=repetition_penalty)
    return RequestDefaults(
        temperature=number("temperature", 0.0, 100.0, 1.0),
        top_k=int(number("top_k", 0, 1 << 31, 0)),
        top_p=number("top_p", 1e-6, 1.0, 1.0),
        min_p=number("min_p", 0.0, 1.0, 0.0),
        repetition_penalty=repetition_penalty,
    )
