"""Data recipes: build JSONL from files on this machine, without a model hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from veneer_train.recipes import chat, code, sql

Recipe = Literal["chat", "code", "sql"]


def build(recipe: Recipe, out: Path, seed: int) -> dict[str, int]:
    """Write ``train.jsonl`` and ``val.jsonl`` of ``recipe`` under ``out``.

    Returns:
        file name -> number of samples.
    """
    train, val = {"chat": chat, "code": code, "sql": sql}[recipe].build(seed)
    out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for name, samples in (("train.jsonl", train), ("val.jsonl", val)):
        (out / name).write_text(lines_of(samples), "utf-8")
        counts[name] = len(samples)
    return counts


def lines_of(samples: Sequence[Mapping[str, Any]]) -> str:
    """The samples as the text of a JSONL file."""
    return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
