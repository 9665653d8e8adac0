from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from veneer_registry.errors import InvalidField
from veneer_train.config import TrainConfig, load_config, parse_config

from tests.refused import refused

MINIMAL = """
model: {path: base, name: tiny}
data: {train: data.jsonl}
output: {dir: out}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_design(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert (config.quant.type, config.quant.double_quant, config.quant.blocksize) == (
        "nf4",
        True,
        64,
    )
    assert (config.lora.r, config.lora.alpha, config.lora.targets) == (16, 32, "all-linear")
    assert (config.train.batch, config.train.accum, config.train.steps) == (4, 4, 200)
    assert config.data.on_truncated == "error"
    assert config.output.logs_dir == Path("out.logs")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 1  # type: ignore[misc]


def test_set_overrides_and_scientific_numbers_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "train: {lr: 2e-4}\n")
    config = load_config(
        path, ["train.steps=7", "lora.targets=[v_proj, q_proj]", "train.lr=1e-3", "data.val=v"]
    )
    assert config.train.steps == 7
    assert config.train.lr == 1e-3
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.data.val == "v"
    assert load_config(path).train.lr == 2e-4


@pytest.mark.parametrize(
    ("setting", "field", "says"),
    [
        ("train.step=3", "train.step", "did you mean 'train.steps'"),
        ("trian.steps=3", "trian", "did you mean 'train'"),
        ("zzz=3", "zzz", "known keys: model, data"),
        ("train.steps=many", "train.steps", "must be a whole number; got 'many'"),
        ("train.steps=true", "train.steps", "must be a whole number"),
        ("train.steps=1.5", "train.steps", "must be a whole number"),
        ("train.steps=0", "train.steps", "must be 1 or more"),
        ("train.lr=fast", "train.lr", "must be a number; got 'fast'"),
        ("train.seed=-1", "train.seed", "from 0 to 4294967295"),
        ("train.lr=" + "9" * 400, "train.lr", "must be a finite number"),
        ("lora.alpha=1000001", "lora.alpha", "at most 1e+06"),
        ("lora.alpha=160001", "lora.alpha", "alpha / r"),
        ('output.description="\\ud83d"', "output.description", "UTF-8"),
        ("output.license=2026-13-45", "output.license", "is not a YAML value"),
        ("train.steps=" + "9" * 5000, "train.steps", "is not a YAML value"),
        ("train.schedule=cosin", "train.schedule", "must be one of constant"),
        ("quant.double_quant=1", "quant.double_quant", "must be true or false"),
        ("quant.blocksize=128", "quant.blocksize", "must be one of 64"),
        ("quant.type=int4", "quant.type", "must be one of nf4, fp4, none"),
        ("lora.r=0", "lora.r", "from 1 to 512"),
        ("lora.targets=all", "lora.targets", "'all-linear' or a list"),
        ("lora.targets=[lm_head]", "lora.targets", "choose from q_proj"),
        ("lora.targets=[q_proj, q_proj]", "lora.targets", "twice"),
        ("lora.targets=[]", "lora.targets", "choose from"),
        ("lora.dropout=1", "lora.dropout", "below 1"),
        ("model.name=/srv/models/x", "model.name", "not a path"),
        ("model.name=", "model.name", "must be text"),
        ("data=none", "data", "must be a mapping"),
        ("data.train", "data.train", "write --set section.key=value"),
        ("data.train.x=1", "data.train.x", "is a value, not a section"),
        ("data.train='", "data.train", "is not a YAML value"),
    ],
)
def test_refusals_name_the_key_and_the_fix(
    tmp_path: Path, setting: str, field: str, says: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        load_config(write(tmp_path, MINIMAL), [setting])
    assert caught.value.metadata["field"] == field
    assert says in caught.value.message


def _numbers() -> list[tuple[str, str]]:
    """Every setting that may be a number with a point."""
    return [
        (section.name, setting.name)
        for section in dataclasses.fields(TrainConfig)
        for setting in dataclasses.fields(typing.get_type_hints(TrainConfig)[section.name])
        if "float" in str(setting.type)
    ]


@pytest.mark.parametrize(("section", "name"), _numbers())
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999", "nan"])
def test_numbers_are_finite(section: str, name: str, value: str, tmp_path: Path) -> None:
    """In a file, by --set, and of a config that was made in Python."""
    field = f"{section}.{name}"
    path = write(tmp_path, MINIMAL)
    good = load_config(path)
    with pytest.raises(InvalidField) as by_set:
        load_config(path, [f"{field}={value}"])
    raw = {"model": {"path": "base", "name": "tiny"}, "data": {"train": "d"}}
    raw |= {"output": {"dir": "out"}}
    raw[section] = raw.get(section, {}) | {name: value.replace(".", "")}
    with pytest.raises(InvalidField) as by_text:
        parse_config(raw)
    number = float(value.replace(".", ""))
    changed = dataclasses.replace(getattr(good, section), **{name: number})
    with pytest.raises(InvalidField) as in_python:
        dataclasses.replace(good, **{section: changed})
    for caught in (by_set, by_text, in_python):
        assert caught.value.metadata["field"] == field
        assert "must be a finite number" in caught.value.message


def test_the_numbers_that_are_checked_are_these() -> None:
    """The test above finds them by their types: here is what it must find at the least."""
    wanted = {("train", "clip"), ("train", "lr"), ("lora", "alpha"), ("train", "max_minutes")}
    assert wanted <= set(_numbers())


@pytest.mark.parametrize("missing", ["model.path", "model.name", "data.train", "output.dir"])
def test_a_missing_required_key_is_named(missing: str) -> None:
    raw: dict[str, dict[str, Any]] = {
        "model": {"path": "base", "name": "tiny"},
        "data": {"train": "x"},
        "output": {"dir": "out"},
    }
    section, key = missing.split(".")
    del raw[section][key]
    with refused(InvalidField, field=missing, cause="required"):
        parse_config(raw)
    del raw[section]  # a section that is wholly absent says so too
    with refused(InvalidField, cause="required") as caught:
        parse_config(raw)
    assert caught.value.metadata["field"].startswith(f"{section}.")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [", "is not YAML"),
        ("- a list", "must have sections"),
        (MINIMAL + "train: {steps: 1, steps: 2}\n", "steps: is given twice (line 5)"),
    ],
)
def test_files_that_are_not_configs(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidField) as caught:
        load_config(write(tmp_path, text))
    assert says in caught.value.message


def test_a_missing_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with refused(InvalidField, field="config", cause="unreadable"):
        load_config(tmp_path / "none.yaml")


def test_the_shipped_configs_are_valid() -> None:
    folder = Path(__file__).parents[3] / "examples" / "configs"
    # Accelerate's is for `accelerate launch`: see test_train_deepspeed.
    configs = sorted(set(folder.glob("*.yaml")) - set(folder.glob("accelerate-*")))
    assert [path.stem for path in configs] == ["chat", "code", "sql"]
    for path in configs:
        config = load_config(path)
        assert isinstance(config, TrainConfig)
        assert config.lora.r == 8  # 4.9 MB in bf16 on the bundled base; the limit is 5


def test_the_documented_keys_are_the_real_ones_with_their_defaults() -> None:
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text("utf-8")
    documented: dict[str, str] = {}
    sections = "|".join(field.name for field in dataclasses.fields(TrainConfig))
    row = rf"^\| ((?:`(?:{sections})\.\w+`(?:, )?)+) \| (.+?) \|"
    for keys, told in re.findall(row, text, re.M):
        names = re.findall(r"`(.+?)`", keys)
        documented |= zip(names, itertools.cycle(told.replace("`", "").split(", ")))
    assert documented == dict(_defaults())


def _defaults() -> Iterator[tuple[str, str]]:
    raw = {"model": {"path": "p", "name": "n"}, "data": {"train": "t"}, "output": {"dir": "d"}}
    config = parse_config(raw)
    words = {"None": "none", "": "empty", "True": "true", "False": "false", "0.0002": "2e-4"}
    for section in dataclasses.fields(config):
        options = getattr(config, section.name)
        for option in dataclasses.fields(options):
            value = str(getattr(options, option.name))
            key = f"{section.name}.{option.name}"
            if option.default is dataclasses.MISSING:
                yield key, "required"
            elif key == "output.logs":
                yield key, "<dir>.logs"
            else:
                yield key, words.get(value, value)
