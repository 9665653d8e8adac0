"""Unset sampling: the operator's values, the base's ``generation_config.json``, or ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from veneer_server.text.defaults import RequestDefaults, read_defaults
from veneer_server.wire.messages import SamplingParams

FULL = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
}
ALL = SamplingParams(temperature=0.6, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.1)
OURS = RequestDefaults(SamplingParams(temperature=0.7, top_p=0.9))


def defaults(folder: Path, name: str = "base", **operators: Any) -> RequestDefaults:
    return read_defaults(folder, name, **operators)


def read(folder: Path, **values: Any) -> RequestDefaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return defaults(folder)


def test_everything_is_taken(tmp_path: Path) -> None:
    assert read(tmp_path, **FULL) == RequestDefaults(ALL)


def test_without_sampling_only_the_penalty_counts(tmp_path: Path) -> None:
    said = read(tmp_path, **FULL | {"do_sample": False})
    assert said == RequestDefaults(
        SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    )


def test_a_base_that_samples_and_leaves_a_value_out_has_it_off(tmp_path: Path) -> None:
    said = read(tmp_path, do_sample=True, temperature=0.6)
    assert said == RequestDefaults(SamplingParams(temperature=0.6))


@pytest.mark.parametrize(
    ("bad", "off"),
    [
        ({"min_p": 1.5}, 0.0),
        ({"min_p": "x"}, 0.0),
        ({"repetition_penalty": 0}, 1.0),
        ({"temperature": -1}, 1.0),
        ({"top_p": 0}, 1.0),
    ],
)
def test_values_out_of_range_are_left_out(
    bad: dict[str, Any], off: float, tmp_path: Path
) -> None:
    [key] = bad
    assert getattr(read(tmp_path, **FULL | bad).sampling, key) == off


def test_where_the_base_says_nothing_answers_are_short_and_sober(tmp_path: Path) -> None:
    assert defaults(tmp_path) == OURS
    (tmp_path / "generation_config.json").write_text("[]")
    assert defaults(tmp_path) == OURS


def test_the_operator_comes_first(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(FULL))
    said = defaults(tmp_path, temperature=0.0, top_p=1.0, max_tokens=64)
    assert said == RequestDefaults(replace(ALL, temperature=0.0, top_p=1.0), max_tokens=64)


def test_the_bundled_base_has_its_model_cards_values(base_folder: Path) -> None:
    said = defaults(base_folder, "smollm2-135m")
    assert said == RequestDefaults(SamplingParams(temperature=0.2, top_p=0.9))


def test_who_sets_no_length_gets_the_operators_or_else_what_the_door_has(
    tmp_path: Path,
) -> None:
    unset, limited = defaults(tmp_path), defaults(tmp_path, max_tokens=64)
    assert unset.most_tokens() == 512
    assert unset.most_tokens(open_ended=True) is None
    assert limited.most_tokens() == limited.most_tokens(open_ended=True) == 64
