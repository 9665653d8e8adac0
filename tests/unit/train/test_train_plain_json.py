"""Facts of a run as JSON that every reader accepts, whatever their types."""

from __future__ import annotations

import json
import math
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from veneer_registry.strict_json import parse_object
from veneer_train.metrics_log import MetricsLog
from veneer_train.plain_json import finite, plain_json, plain_text

ANY_TEXT = st.text(st.characters(categories=None))  # halves of surrogate pairs, too
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.binary()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.sets(ANY_TEXT) | st.dictionaries(ANY_TEXT, inner),
    max_leaves=20,
)


class Kind(Enum):
    ONE = "one"


@given(st.dictionaries(st.text("abc"), VALUES))
def test_whatever_it_is_a_strict_reader_takes_it(value: dict[str, Any]) -> None:
    """The registry's own: no NaN, no half of a surrogate pair, no key twice."""
    assert parse_object(plain_json(value).encode("utf-8"), file="x").keys() == value.keys()


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (math.nan, None),
        (math.inf, None),
        (np.float32(0.5), 0.5),
        (np.float64("nan"), None),
        (np.int64(3), 3),
        ({"b", "a"}, ["a", "b"]),
        (Kind.ONE, "one"),
        (Path("a/b"), "a/b"),
        ((1, [2.5, True]), [1, [2.5, True]]),
        ("half \ud83d", "half ?"),
        ({1: "a"}, {"1": "a"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_has_no_form_for(value: object, written: object) -> None:
    assert json.loads(plain_json({"x": value})) == {"x": written}


def test_text_and_metrics() -> None:
    assert plain_text("caf\udce9") == "caf?"
    assert finite({"a": 1.0, "b": math.nan, "c": math.inf}) == {"a": 1.0}


def test_metrics_of_a_run_that_went_bad_are_json(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with MetricsLog(file, lambda row: None) as log:
        log.write(event="step", step=1, loss=math.nan, grad_norm=math.inf)
    row = parse_object(file.read_bytes(), file=file.name)
    assert row == {"event": "step", "step": 1, "loss": None, "grad_norm": None}
    with MetricsLog(file, lambda row: None, after=1) as log:
        log.write(event="step", step=2, loss=1.0, grad_norm=1.0)
        assert len(log.rows) == 2
