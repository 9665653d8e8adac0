"""Unset sampling: what ``generation_config.json`` says, as transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from veneer_server.text.defaults import SamplingDefaults, read_sampling_defaults

FULL = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
}


def read(folder: Path, **values: Any) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return read_sampling_defaults(folder)


def test_everything_is_taken(tmp_path: Path) -> None:
    assert read(tmp_path, **FULL) == SamplingDefaults(0.6, 20, 0.9, 0.05, 1.1)


def test_without_sampling_only_the_penalty_counts(tmp_path: Path) -> None:
    said = read(tmp_path, **FULL | {"do_sample": False})
    assert said == SamplingDefaults(repetition_penalty=1.1)


@pytest.mark.parametrize(
    "bad", [{"min_p": 1.5}, {"min_p": "x"}, {"repetition_penalty": 0}, {"temperature": -1}]
)
def test_values_out_of_range_are_left_out(bad: dict[str, Any], tmp_path: Path) -> None:
    [key] = bad
    expected = getattr(SamplingDefaults(), key)
    assert getattr(read(tmp_path, **FULL | bad), key) == expected


def test_no_file_says_nothing(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()
    (tmp_path / "generation_config.json").write_text("[]")
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()
