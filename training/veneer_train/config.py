"""The training configuration: strict YAML in, one frozen `TrainConfig` out.

Nothing else in the module reads a file of settings or an environment variable.
An unknown key, a wrong type or a value out of range is an `InvalidField` that
names the key (metadata ``field``) and, for a misspelt key, the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import yaml
from veneer_registry.adapter import PROJECTIONS
from veneer_registry.errors import InvalidField

__all__ = [
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "QuantConfig",
    "TrainConfig",
    "load_config",
    "parse_config",
]

ALL_LINEAR: Final = "all-linear"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The base model. ``path`` is a folder or a hub name; ``name`` is what an
    adapter says it was trained on, so it must not name a place on this machine."""

    path: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """How the frozen base is held: must equal the server's for equal logits."""

    type: Literal["nf4", "fp4", "none"] = "nf4"
    double_quant: bool = True
    blocksize: Literal[64] = 64
    compute_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The adapter. ``targets`` is ``all-linear`` or a list of projections."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | list[str] = ALL_LINEAR
    rslora: bool = False

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Projection names, sorted, so that the written config is stable."""
        names = PROJECTIONS if isinstance(self.targets, str) else self.targets
        return tuple(sorted(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Samples. Without ``val``, ``val_fraction`` of ``train`` is held out.

    ``template`` is a Jinja file that replaces the base's chat template and is
    shipped with the adapter.
    """

    train: str
    val: str | None = None
    val_fraction: float = 0.1
    format: Literal["auto", "messages", "prompt"] = "auto"
    loss_on: Literal["assistant", "all"] = "assistant"
    template: str | None = None
    max_len: int = 512
    on_truncated: Literal["error", "drop", "truncate"] = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """The optimiser's run. ``warmup`` is a fraction of ``steps``; ``optim: auto``
    is ``paged_adamw_8bit`` on CUDA and ``adamw_torch_fused`` on a CPU;
    ``checkpointing: auto`` recomputes activations on CUDA alone."""

    lr: float = 2e-4
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    batch: int = 4
    accum: int = 4
    steps: int = 200
    max_minutes: float | None = None
    optim: str = "auto"
    checkpointing: Literal["auto", "on", "off"] = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Validation loss every ``every`` steps (0: only at the ends), and of the
    base before training where ``compare_base`` is true."""

    every: int = 50
    compare_base: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """``dir`` becomes the adapter folder, ready to push. Logs of the run go to
    ``logs`` (default: ``dir`` with ``.logs`` added), which is never pushed."""

    dir: str
    logs: str | None = None
    description: str = ""
    license: str = ""

    @property
    def logs_dir(self) -> Path:
        return Path(self.logs if self.logs is not None else self.dir.rstrip("/") + ".logs")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A whole run. See ``docs/training.md`` for every key."""

    model: ModelConfig
    data: DataConfig
    output: OutputConfig
    quant: QuantConfig = field(default_factory=QuantConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _check(self)


def _fail(key: str, message: str) -> InvalidField:
    return InvalidField(f"{key}: {message}", metadata={"field": key})


def _check(config: TrainConfig) -> None:
    """Ranges. Each line is (key, whether it holds, what to write instead)."""
    lora, data, train = config.lora, config.data, config.train
    rules: Sequence[tuple[str, bool, str]] = (
        ("model.path", bool(config.model.path), "give a model folder, or use --base DIR"),
        ("model.name", bool(config.model.name), "give the base model's logical name"),
        (
            "model.name",
            not Path(config.model.name).is_absolute(),
            "this is the base's logical name (such as smollm2-135m), not a path",
        ),
        ("lora.r", 1 <= lora.r <= 512, "must be from 1 to 512"),
        ("lora.alpha", lora.alpha > 0, "must be above 0"),
        ("lora.dropout", 0 <= lora.dropout < 1, "must be from 0 to below 1"),
        ("data.max_len", data.max_len >= 8, "must be 8 tokens or more"),
        (
            "data.val_fraction",
            0 <= data.val_fraction < 1,
            "must be from 0 (no validation) to below 1",
        ),
        ("train.lr", 0 < train.lr < 1, "must be above 0 and below 1"),
        ("train.warmup", 0 <= train.warmup < 1, "is a fraction of the steps, below 1"),
        ("train.weight_decay", train.weight_decay >= 0, "must be 0 or more"),
        ("train.clip", train.clip > 0, "must be above 0; a large value never clips"),
        ("train.batch", train.batch >= 1, "must be 1 or more"),
        ("train.accum", train.accum >= 1, "must be 1 or more"),
        ("train.steps", train.steps >= 1, "must be 1 or more"),
        (
            "train.max_minutes",
            train.max_minutes is None or train.max_minutes > 0,
            "must be above 0, or null for no limit",
        ),
        ("eval.every", config.eval.every >= 0, "must be 0 (only at the ends) or more"),
        ("output.dir", bool(config.output.dir), "give the folder to write the adapter to"),
    )
    for key, holds, fix in rules:
        if not holds:
            raise _fail(key, fix)
    if isinstance(lora.targets, str):
        if lora.targets != ALL_LINEAR:
            raise _fail("lora.targets", f"write {ALL_LINEAR!r} or a list of projections")
    elif not lora.targets or not set(lora.targets) <= set(PROJECTIONS):
        raise _fail("lora.targets", f"choose from {', '.join(PROJECTIONS)}")
    elif len(set(lora.targets)) != len(lora.targets):
        raise _fail("lora.targets", "names a projection twice")


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _value(kind: Any, value: object, key: str) -> object:
    """``value`` as the annotated type ``kind``. YAML's ints may stand for floats and
    ``2e-4``, which YAML reads as a string, for a number; nothing else is converted."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value in choices and type(value) in {type(choice) for choice in choices}:
            return value
        raise _fail(key, f"must be one of {', '.join(map(str, choices))}; got {value!r}")
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(kind):
            try:
                return _value(option, value, key)
            except InvalidField:
                continue
        raise _fail(key, f"{value!r} has the wrong type")
    if origin is list:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return list(value)
        raise _fail(key, f"must be a list of names; got {value!r}")
    if kind is float:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise _fail(key, f"must be a number; got {value!r}") from None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is kind:
        return value
    wanted = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    raise _fail(key, f"must be {wanted.get(kind, 'null')}; got {value!r}")


def _build(cls: type[_T], raw: object, prefix: str) -> _T:
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise _fail(prefix.rstrip(".") or "config", f"must be a mapping; got {raw!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in fields:
            known = [prefix + name for name in fields]
            raise _fail(f"{prefix}{key}", f"unknown key; {_nearest(f'{prefix}{key}', known)}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            values[key] = _build(typing.cast(type, kind), value, f"{prefix}{key}.")
        else:
            values[key] = _value(kind, value, f"{prefix}{key}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in values and required:
            kind = hints[name]
            if dataclasses.is_dataclass(kind):  # let the section say which key it misses
                values[name] = _build(typing.cast(type, kind), {}, f"{prefix}{name}.")
            else:
                raise _fail(f"{prefix}{name}", "is required; add it or use --set")
    return cls(**values)


def parse_config(raw: object) -> TrainConfig:
    """A config from parsed YAML.

    Raises:
        InvalidField: an unknown key, a wrong type or a value out of range.
    """
    return _build(TrainConfig, raw, "")


def _apply(raw: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise _fail(key, f"write --set section.key=value; got {setting!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise _fail(key, f"{text!r} is not a YAML value; quote it") from None
    section = raw
    for part in parts[:-1]:
        inner = section.setdefault(part, {})
        if not isinstance(inner, dict):
            raise _fail(key, f"{part!r} is a value, not a section")
        section = inner
    section[parts[-1]] = value


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML's last-wins hides mistakes)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise _fail(str(key), f"is given twice (line {line}); keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: Path, settings: Sequence[str] = ()) -> TrainConfig:
    """Read ``path`` and apply ``settings`` (``section.key=value``, value in YAML).

    Raises:
        InvalidField: the file cannot be read or parsed, or `parse_config` refuses it.
    """
    try:
        raw = yaml.load(path.read_text("utf-8"), Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise _fail("config", f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _fail("config", f"{path} is not YAML: {error}") from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise _fail("config", f"{path} must hold sections such as 'model:' and 'data:'")
    for setting in settings:
        _apply(raw, setting)
    return parse_config(raw)
