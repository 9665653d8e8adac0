"""The training configuration: strict YAML in, one frozen `TrainConfig` out.

No setting of a run comes from an environment variable.
An unknown key, a wrong type or a value out of range is an `InvalidField` that
names the key (metadata ``field``) and, for a misspelt key, the nearest one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

from veneer_registry.adapter import PROJECTIONS
from veneer_registry.lora_config import MAX_ALPHA
from veneer_registry.weights import MAX_SCALING

from veneer_train.strict import apply_setting, bad_setting, build, overlay, read_yaml

ALL_LINEAR: Final = "all-linear"

_PRESETS_DIR: Final = Path(__file__).parent / "presets"
PRESETS: Final = ("quick", "chat", "code", "sql", "paper")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The base model. ``path`` is a folder or a hub name; ``name`` is the base's name in
    the adapter's files, so it must not contain a path of this machine."""

    path: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """How the frozen base is quantized; must equal the server's for equal logits."""

    type: Literal["nf4", "fp4", "none"] = "nf4"
    double_quant: bool = True
    blocksize: Literal[64] = 64
    compute_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The adapter. ``targets`` is ``all-linear`` or a list of projections; ``dora`` also
    trains magnitudes, and a server accepts such an adapter only when merged."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | list[str] = ALL_LINEAR
    rslora: bool = False
    dora: bool = False

    @property
    def scaling(self) -> float:
        """The factor that B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Projection names, sorted, so that the written config is stable."""
        names = PROJECTIONS if isinstance(self.targets, str) else self.targets
        return tuple(sorted(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Samples. Without ``val``, ``val_fraction`` of ``train`` is held out.

    ``template`` is a Jinja file that replaces the base's chat template and is
    shipped with the adapter. ``packing`` fills rows of ``max_len`` with several samples that
    do not attend to each other; ``bucketing`` batches samples of similar length.
    """

    train: str
    val: str | None = None
    val_fraction: float = 0.1
    format: Literal["auto", "messages", "prompt"] = "auto"
    loss_on: Literal["assistant", "all"] = "assistant"
    template: str | None = None
    max_len: int = 512
    on_truncated: Literal["error", "drop", "truncate"] = "error"
    packing: bool = False
    bucketing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Optimiser and steps. ``warmup`` is a fraction of ``steps``; ``optim: auto``
    is ``paged_adamw_8bit`` on CUDA, and ``adamw_torch_fused`` on a CPU or with DeepSpeed;
    ``checkpointing: auto`` recomputes activations only on CUDA."""

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
    """Validation loss is measured every ``every`` steps (0: only before and after), and for the
    base before training if ``compare_base``. Before and after training, the model answers
    ``tasks`` samples that have a check, and the answers are scored."""

    every: int = 50
    compare_base: bool = True
    tasks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """``dir`` becomes the adapter folder, ready to push. Logs and checkpoints go to ``logs``
    (default: ``dir`` with ``.logs`` added), which is never pushed.

    A checkpoint is saved every ``save_every`` steps (0: never), and the newest ``keep`` are
    kept; ``resume: auto`` resumes from the newest if there is one.
    """

    dir: str
    logs: str | None = None
    description: str = ""
    license: str = ""
    save_every: int = 50
    keep: int = 2
    resume: Literal["auto", "never", "must"] = "auto"

    @property
    def checkpoints_dir(self) -> Path:
        return self.logs_dir / "checkpoints"

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


def _check_finite(config: TrainConfig) -> None:
    """Check numbers, even in a config that was not read from YAML."""
    for section in fields(config):
        settings = getattr(config, section.name)
        for setting in fields(settings):
            value = getattr(settings, setting.name)
            if isinstance(value, float) and not math.isfinite(value):
                key = f"{section.name}.{setting.name}"
                raise bad_setting(key, f"must be a finite number; got {value}")


def _check(config: TrainConfig) -> None:
    """Check ranges. Each line is (key, whether it is valid, what to write instead)."""
    _check_finite(config)
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
        (
            "lora.alpha",
            0 < lora.alpha <= MAX_ALPHA,
            f"must be above 0, and at most {MAX_ALPHA:g}: a server accepts no more",
        ),
        (
            "lora.alpha",
            lora.r < 1 or lora.scaling <= MAX_SCALING,
            f"alpha / r (with rslora: / sqrt(r)) must be at most {MAX_SCALING:g}: a server "
            "accepts no more",
        ),
        ("lora.dropout", 0 <= lora.dropout < 1, "must be from 0 to below 1"),
        ("data.max_len", data.max_len >= 8, "must be 8 tokens or more"),
        (
            "data.val_fraction",
            0 <= data.val_fraction < 1,
            "must be from 0 (no validation) to below 1",
        ),
        ("train.lr", 0 < train.lr < 1, "must be above 0 and below 1"),
        ("train.warmup", 0 <= train.warmup < 1, "must be a fraction of the steps, below 1"),
        ("train.weight_decay", train.weight_decay >= 0, "must be 0 or more"),
        ("train.clip", train.clip > 0, "must be above 0; a large value never clips"),
        ("train.batch", train.batch >= 1, "must be 1 or more"),
        ("train.accum", train.accum >= 1, "must be 1 or more"),
        ("train.steps", train.steps >= 1, "must be 1 or more"),
        ("train.seed", 0 <= train.seed < 2**32, "must be from 0 to 4294967295"),
        (
            "train.max_minutes",
            train.max_minutes is None or train.max_minutes > 0,
            "must be above 0, or null for no limit",
        ),
        ("eval.every", config.eval.every >= 0, "must be 0 (only at the ends) or more"),
        ("eval.tasks", config.eval.tasks >= 0, "must be 0 (none) or more"),
        ("output.dir", bool(config.output.dir), "give the folder to write the adapter to"),
        (
            "output.dir",
            Path(config.output.dir).name not in ("", ".."),
            "give a separate folder, because its content is replaced",
        ),
        (
            "output.logs",
            not config.output.logs_dir.resolve().is_relative_to(
                Path(config.output.dir).resolve()
            ),
            "must not lie in output.dir, which is replaced at the end",
        ),
        ("output.save_every", config.output.save_every >= 0, "must be 0 (never) or more"),
        ("output.keep", config.output.keep >= 1, "must be 1 or more"),
        (
            "data.bucketing",
            not (data.bucketing and data.packing),
            "packed rows all have one length: set data.packing or data.bucketing, not both",
        ),
    )
    for key, holds, fix in rules:
        if not holds:
            raise bad_setting(key, fix)
    if isinstance(lora.targets, str):
        if lora.targets != ALL_LINEAR:
            raise bad_setting("lora.targets", f"write {ALL_LINEAR!r} or a list of projections")
    elif not lora.targets or not set(lora.targets) <= set(PROJECTIONS):
        raise bad_setting("lora.targets", f"choose from {', '.join(PROJECTIONS)}")
    elif len(set(lora.targets)) != len(lora.targets):
        raise bad_setting("lora.targets", "names a projection twice")


_PATHS: Final = (
    ("model", "path"),
    ("data", "train"),
    ("data", "val"),
    ("data", "template"),
    ("output", "dir"),
    ("output", "logs"),
)


def _at_home(raw: object) -> object:
    """Expand ``~`` in paths to the home folder, as a shell does."""
    if not isinstance(raw, Mapping):
        return raw
    found = dict(raw)
    for section, key in _PATHS:
        inner = found.get(section)
        if isinstance(inner, Mapping) and isinstance(inner.get(key), str):
            found[section] = {**inner, key: str(Path(inner[key]).expanduser())}
    return found


def parse_config(raw: object) -> TrainConfig:
    """A config from parsed YAML.

    Raises:
        InvalidField: an unknown key, a wrong type or a value out of range.
    """
    return build(TrainConfig, _at_home(raw))


def load_config(
    path: Path | None = None,
    settings: Sequence[str] = (),
    preset: str | None = None,
    *,
    under: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> TrainConfig:
    """Read a preset, overridden by the file ``path``, overridden by ``settings``
    (``section.key=value``, value in YAML).

    Args:
        preset: a name in `PRESETS`; the file may name one too, with the key ``preset``.
        under: sections that all of these override.
        base: replaces ``model.path``; if ``model.name`` is not given, the folder's name is
            used for it.

    Raises:
        InvalidField: the file cannot be read or parsed, or `parse_config` refuses it.
    """
    raw = {} if path is None else read_yaml(path)
    preset = preset or raw.pop("preset", None)
    raw.pop("preset", None)
    if preset is not None:
        raw = overlay(read_preset(preset), raw)
    raw = overlay(under or {}, raw)
    for setting in settings:
        apply_setting(raw, setting)
    if base is not None:
        named = {"model": {"name": Path(base).resolve().name}}
        raw = overlay(overlay(named, raw), {"model": {"path": base}})
    return parse_config(raw)


def read_preset(name: object) -> dict[str, Any]:
    """The sections of a preset.

    Raises:
        InvalidField: there is no preset of that name.
    """
    if name not in PRESETS:
        raise bad_setting("preset", f"must be one of {', '.join(PRESETS)}; got {name!r}")
    return read_yaml(_PRESETS_DIR / f"{name}.yaml")
