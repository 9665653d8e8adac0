"""Which YAML values a setting of each type accepts, and how all others are refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml
from veneer_registry.errors import InvalidField
from veneer_train.strict import build

from tests.refused import refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    text: str = ""
    maybe_text: str | None = None
    names: str | list[str] = ""
    whole: int = 0
    number: float = 0.0
    maybe_number: float | None = None
    flag: bool = False
    word: Literal["nf4", "none"] = "nf4"
    switch: Literal["auto", "on", "off"] = "auto"
    only: Literal[64] = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    kinds: Kinds = field(default_factory=Kinds)


VALUES = (
    "null",
    "true",
    "on",
    "off",
    "0",
    "1",
    "64",
    "64.0",
    "1.0",
    "1.5",
    "-3",
    "2e-4",
    "'1_0'",
    ".nan",
    ".inf",
    "-.inf",
    "1e999",
    "nan",
    "9" * 400,
    "text",
    "''",
    "nf4",
    "none",
    "auto",
    "'64'",
    "' 1 '",
    "'true'",
    "[]",
    "[a, b]",
    "[1]",
    "[a, null]",
    "[[a]]",
    "{}",
    "{a: 1}",
    "2026-01-02",
    "2026-01-02 03:04:05",
    "!!binary aGk=",
    "!!set {a}",
    "!!omap [a: b]",
    '"\\ud83d"',
    '[a, "\\ud83d"]',
    "12:30:45",
    "0x10",
    "1" * 30,
)

TEXTS = {
    "2e-4": "2e-4", "'1_0'": "1_0", "1e999": "1e999", "nan": "nan", "text": "text", "''": "",
    "nf4": "nf4", "none": "none", "auto": "auto", "'64'": "64", "' 1 '": " 1 ",
    "'true'": "true",
}  # fmt: skip
WHOLES = {
    "0": 0, "1": 1, "64": 64, "-3": -3, "9" * 400: int("9" * 400), "12:30:45": 45045,
    "0x10": 16, "1" * 30: int("1" * 30),
}  # fmt: skip
NUMBERS = {
    "0": 0.0, "1": 1.0, "64": 64.0, "64.0": 64.0, "1.0": 1.0, "1.5": 1.5, "-3": -3.0,
    "2e-4": 2e-4, "'1_0'": 10.0, "'64'": 64.0, "' 1 '": 1.0, "12:30:45": 45045.0,
    "0x10": 16.0, "1" * 30: float("1" * 30),
}  # fmt: skip
FLAGS = {"true": True, "on": True, "off": False}
TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("must be text", TEXTS),
    "maybe_text": ("must be text", TEXTS | {"null": None}),
    "names": ("must be text", TEXTS | {"[]": [], "[a, b]": ["a", "b"]}),
    "whole": ("must be a whole number", WHOLES),
    "number": ("must be a number", NUMBERS),
    "maybe_number": ("must be a number", NUMBERS | {"null": None}),
    "flag": ("must be true or false", FLAGS),
    "word": ("must be one of nf4, none", {"nf4": "nf4", "none": "none"}),
    "switch": (
        "must be one of auto, on, off",
        {"auto": "auto", "true": "on", "on": "on", "off": "off"},
    ),
    "only": ("must be one of 64", {"64": 64}),
}
"""Of each key: how a refusal begins, and which values are taken as what."""
INFINITE = (".nan", ".inf", "-.inf", "1e999", "nan", "9" * 400)
MAY_BE_TEXT = ("text", "maybe_text", "names")


@pytest.mark.parametrize("text", VALUES, ids=lambda text: text[:20])
@pytest.mark.parametrize("key", TAKEN)
def test_a_value_is_taken_or_refused_by_its_type(key: str, text: str) -> None:
    told, taken = TAKEN[key]
    value = yaml.safe_load(text)
    if text in taken:
        found = getattr(build(Config, {"kinds": {key: value}}).kinds, key)
        assert found == taken[text]
        assert type(found) is type(taken[text])
        return
    with pytest.raises(InvalidField) as caught:
        build(Config, {"kinds": {key: value}})
    assert caught.value.metadata["field"] == f"kinds.{key}"
    message = caught.value.message.removeprefix(f"kinds.{key}: ")
    if key in ("number", "maybe_number") and text in INFINITE:
        assert message == f"must be a finite number; got {str(value)[:40]}"
    elif "\\ud83d" in text and "text that UTF-8 can encode" in message:
        assert key in MAY_BE_TEXT
        assert "character 1 of '\\ud83d'" in message
    else:
        assert message == f"{told}; got {value!r}"


@pytest.mark.parametrize("key", MAY_BE_TEXT)
def test_half_a_surrogate_pair_is_named(key: str) -> None:
    with refused(InvalidField, field=f"kinds.{key}", cause="not_utf8"):
        build(Config, {"kinds": {key: "a\ud83d"}})


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"kinds": {"flog": 1}}, "kinds.flog: unknown key; did you mean 'kinds.flag'?"),
        ({"kind": {}}, "kind: unknown key; did you mean 'kinds'?"),
        ({"zzz": {}}, "zzz: unknown key; known keys: kinds"),
        ({1: {}}, "1: unknown key; known keys: kinds"),
        ({"kinds": {None: 1}}, "kinds.None: unknown key"),
        ({"kinds": 3}, "kinds: must be a mapping; got 3"),
        ({"kinds": [1]}, "kinds: must be a mapping; got [1]"),
        ([1], "config: must be a mapping; got [1]"),
    ],
)
def test_keys_and_sections(raw: object, says: str) -> None:
    with pytest.raises(InvalidField) as caught:
        build(Config, raw)
    assert caught.value.message.startswith(says)
    assert caught.value.metadata["field"] == says.partition(":")[0]


def test_an_absent_section_has_its_defaults() -> None:
    assert build(Config, None) == build(Config, {"kinds": None}) == Config()


@pytest.mark.parametrize("value", [{"a"}, frozenset("a"), ("a",)])
def test_only_a_list_is_a_list(value: object) -> None:
    with refused(InvalidField, field="kinds.names"):
        build(Config, {"kinds": {"names": value}})
