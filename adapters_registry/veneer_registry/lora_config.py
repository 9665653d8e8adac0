"""Reads ``adapter_config.json`` by our own strict schema of PEFT 0.21's keys.

Nothing in it is ever run, imported or fetched. PEFT itself has imported modules
that a config named (PEFT #3085), and matches ``target_modules`` by ``re.fullmatch``,
where a 12-byte pattern took seconds. Here the tensors' names decide what is
adapted. Keys of ``rank_pattern`` and ``alpha_pattern`` are names or, where they must be,
regular expressions, which RE2 matches in time linear in the name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NoReturn, TypeVar

from veneer_registry.strict_json import parse_object, refuse, show

CONFIG_FILE: Final = "adapter_config.json"
CONFIG_LIMIT: Final = 1 << 20
"""Size limit of the file in bytes; PEFT's, with every module listed by name, is 30 KB."""

MAX_RANK: Final = 4096
MAX_ALPHA: Final = 1e6
MAX_EXPRESSIONS: Final = 8
"""Regular expressions in each of ``rank_pattern`` and ``alpha_pattern``."""

MAX_EXPRESSION_LENGTH: Final = 200
_EXPRESSION_MEMORY: Final = 1 << 16
"""Bytes that RE2 may use for one expression: enough for some 4,000 instructions."""

# Keys that cannot change what the tensors and scalings of this project compute.
_WITHOUT_EFFECT: Final = frozenset(
    {
        "auto_mapping",  # class and module names; never imported
        "corda_config",  # these four configure an initialisation, which is
        "eva_config",  #   done; `init_lora_weights` says whether it changed
        "lora_ga_config",  # the base
        "loftq_config",
        "ensure_weight_tying",  # for embeddings and heads, which are refused by name
        "exclude_modules",  # the tensors' names decide
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",  # off at inference
        "megatron_core",  # read only together with megatron_config
        "peft_version",
        "qalora_group_size",  # read only together with use_qalora
        "revision",  # of the base; never fetched
        "runtime_config",
        "target_modules",
        "velora_config",  # changes the backward pass only
    }
)

_REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "alora_invocation_tokens": "activated LoRA is not supported; train plain LoRA",
        "arrow_config": "Arrow routing is not supported; upload the adapters separately",
        "kasa_config": "KaSA changes the base weights; train plain LoRA",
        "layer_replication": "replicated layers are not supported; train on the unmodified "
        "base",
        "lora_bias": "biases are not supported; train with lora_bias=False",
        "megatron_config": "Megatron layers are not supported; train plain LoRA",
        "modules_to_save": (
            "whole modules (embeddings, heads) are not supported; train without them"
        ),
        "monteclora_config": "MonteCLoRA is not supported; train plain LoRA",
        "target_parameters": "bare parameters are not supported; target linear projections",
        "trainable_token_indices": "trained tokens are not supported; train without them",
        "use_bdlora": "block-diagonal LoRA is not supported; train plain LoRA",
        "use_dora": "DoRA is not supported yet; train with use_dora=False",
        "use_qalora": "QA-LoRA is not supported; train with use_qalora=False",
    }
)

_USED_UNLESS_NULL: Final = frozenset({"arrow_config"})
"""Keys that only null turns off: PEFT reads ``{}`` as a configuration with all its defaults."""

# Initialisations that do not change the base. The others (PiSSA, OLoRA, CorDA,
# LoftQ, LoRA-GA) subtract something from it, so the adapter alone is not enough.
_INITS: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})

_Number = TypeVar("_Number", int, float)

_LITERAL: Final = re.compile(r"[A-Za-z0-9_.]+")
_OTHERWISE: Final = re.compile(r"\{,|\[:|\\[pPCQ]|\(\?[A-Za-z-]*U")
"""Syntax that RE2 reads differently from Python's ``re``, or that only RE2 reads."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The settings that change the result, and the base's name.

    Attributes:
        rank, alpha: defaults for modules that match no pattern.
        rslora: scaling is alpha / sqrt(rank) instead of alpha / rank.
        rank_pattern, alpha_pattern: keys as written, in the order of the file.
        base_name: ``base_model_name_or_path`` as written, "" if there is none. Does not
            change the result.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_name: str

    def scaling(self, alpha: float, rank: int) -> float:
        """The factor of B A x, computed exactly as PEFT does, so that it is bit-identical."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def ranks(self, paths: Iterable[str]) -> dict[str, int]:
        """Declared rank of each module; refuses a key that matches no module."""
        return _by_path("rank_pattern", self.rank_pattern, self.rank, paths)

    def alphas(self, paths: Iterable[str]) -> dict[str, float]:
        """Alpha of each module; refuses a key that matches no module."""
        return _by_path("alpha_pattern", self.alpha_pattern, self.alpha, paths)

    def alpha_warnings(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Warnings about keys that give the same module different alphas.

        PEFT sorts keys when it saves, so their order in training may have been different.
        Ranks do not have this problem: the tensors show them.
        """
        keys = list(self.alpha_pattern)
        for path, found in _hits("alpha_pattern", keys, paths).items():
            for first, key in ((keys[found[0]], keys[index]) for index in found[1:]):
                if self.alpha_pattern[key] != self.alpha_pattern[first]:
                    return (
                        f"{CONFIG_FILE}: alpha_pattern keys {show(first)} and {show(key)} both "
                        f"match {path}; {show(first)} is used, since it comes first in the "
                        "file (PEFT sorts keys when it saves)",
                    )
        return ()


def parse_config(data: bytes) -> LoraSettings:
    """Read ``adapter_config.json``.

    Raises:
        AdapterInvalid: metadata ``file`` and, if one key is at fault, ``key``.
    """
    config = parse_object(data, file=CONFIG_FILE)
    if "peft_type" not in config and "lora_parameters" in config:
        _bad(
            "lora_parameters",
            "is mlx-lm's, not PEFT's: make it a PEFT folder with `veneer adapter convert IN "
            "OUT`, and push OUT",
        )
    if config.get("peft_type") != "LORA":
        _bad("peft_type", f"is {show(config.get('peft_type'))}; only LORA is supported")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        _bad("task_type", f"is {show(config['task_type'])}; only CAUSAL_LM is supported")
    if config.get("bias") not in (None, "none"):
        _bad("bias", "must be 'none': biases are not supported; train with bias='none'")
    if config.get("fan_in_fan_out") not in (None, False):
        _bad("fan_in_fan_out", "must be false: decoder projections are plain Linear layers")
    _check_init(config.get("init_lora_weights"))
    for key, value in config.items():
        if key not in _WITHOUT_EFFECT and key not in _READ and not _is_unused(key, value):
            _bad(key, _REFUSED.get(key, "is unknown and may change the result; remove it"))
    rslora = config.get("use_rslora")
    if rslora is not None and not isinstance(rslora, bool):
        _bad("use_rslora", "must be true or false")
    base_name = config.get("base_model_name_or_path")
    if base_name is not None and not isinstance(base_name, str):
        _bad("base_model_name_or_path", "must be a string or null")
    return LoraSettings(
        rank=_rank("r", config.get("r")),
        alpha=_alpha("lora_alpha", config.get("lora_alpha")),
        rslora=bool(rslora),
        rank_pattern={k: _rank(k, v) for k, v in _pattern(config, "rank_pattern").items()},
        alpha_pattern={k: _alpha(k, v) for k, v in _pattern(config, "alpha_pattern").items()},
        base_name=base_name or "",
    )


_READ: Final = frozenset(
    {"peft_type", "task_type", "bias", "fan_in_fan_out", "init_lora_weights", "use_rslora"}
    | {"base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
)


def _bad(key: str, why: str) -> NoReturn:
    refuse(CONFIG_FILE, why, key=key)


def _is_unused(key: str, value: object) -> bool:
    """Whether a value turns its key off: null does; so do false and empty, for all keys but
    those in `_USED_UNLESS_NULL`."""
    if key in _USED_UNLESS_NULL:
        return value is None
    return value is None or value is False or value in ("", [], {})


def _check_init(value: object) -> None:
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str) or value.lower() not in _INITS:
        refuse(
            CONFIG_FILE,
            f"is {show(value)}, which changes the base weights; convert the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) first",
            key="init_lora_weights",
        )


def _rank(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        refuse(CONFIG_FILE, f"is {show(value)}; a rank is 1 to {MAX_RANK}", key=key)
    return value


def _alpha(key: str, value: object) -> float:
    # An int stays an int: PEFT divides the value as it is in the file, and so do we.
    if not isinstance(value, int | float) or isinstance(value, bool):
        refuse(CONFIG_FILE, f"is {show(value)}; alpha must be a number", key=key)
    if abs(value) > MAX_ALPHA:
        refuse(CONFIG_FILE, f"is {show(value)}; at most {MAX_ALPHA:g} is allowed", key=key)
    return value


def _pattern(config: Mapping[str, object], name: str) -> dict[str, object]:
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse(CONFIG_FILE, "must map module names to numbers", key=name)
    return value


def _literal(key: str) -> tuple[str, bool] | None:
    """The plain text of a pattern key, and whether it is anchored at the start; None for a
    regular expression.

    PEFT reads a key as ``(.*\\.)?(key)$``. A literal, with or without anchors or escaped
    dots, means the same here.
    """
    text = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return (text, key.startswith("^")) if _LITERAL.fullmatch(text) else None


def _expression(pattern: str, key: str) -> Any:
    """Compile a key, as PEFT matches it, with RE2, which never backtracks. An untrusted key
    must not reach Python's ``re``."""
    if len(key) > MAX_EXPRESSION_LENGTH:
        _bad(
            key,
            f"of {pattern} is a regular expression of {len(key)} characters; at most "
            f"{MAX_EXPRESSION_LENGTH} are allowed: write the module names out",
        )
    if (found := _OTHERWISE.search(key)) is not None:
        _bad(
            key,
            f"of {pattern} has {found[0]!r}, which RE2 reads differently from PEFT; write "
            "the module names out, for example 'layers.0.self_attn.q_proj'",
        )
    try:
        import re2  # only few adapters need it
    except ModuleNotFoundError:
        _bad(
            key,
            f"of {pattern} is a regular expression, and the package that reads it is not "
            "installed: pip install google-re2, or write the module names out",
        )
    options = re2.Options()
    options.max_mem = _EXPRESSION_MEMORY
    options.log_errors = False
    try:
        return re2.compile(rf"(.*\.)?({key})$", options=options)
    except (re2.error, UnicodeEncodeError) as error:
        why = error.args[0] if error.args else ""
        why = why.decode("utf-8", "replace") if isinstance(why, bytes) else str(why)
        _bad(
            key,
            f"of {pattern} is a regular expression that RE2 does not read ({why[:80]}); use no "
            "lookarounds or back-references, or write the module names out, for example "
            "'layers.0.self_attn.q_proj'",
        )


def _by_path(
    pattern: str, values: Mapping[str, _Number], default: _Number, paths: Iterable[str]
) -> dict[str, _Number]:
    """Return path -> value of the first key, in file order, that matches it; else the
    default."""
    if not values:
        return dict.fromkeys(paths, default)
    keys = list(values)
    hits = _hits(pattern, keys, paths)
    used = {_literal(keys[index]) or keys[index] for found in hits.values() for index in found}
    for key in keys:
        if (_literal(key) or key) not in used:
            refuse(
                CONFIG_FILE,
                f"of {pattern} matches no adapted module; remove it or correct the name",
                key=key,
            )
    return {path: values[keys[found[0]]] if found else default for path, found in hits.items()}


def _hits(pattern: str, keys: Sequence[str], paths: Iterable[str]) -> dict[str, list[int]]:
    """For each path, the keys (by position, ascending) that match it.

    Literal keys are looked up by the few dotted suffixes of a path, so that the time is linear
    in keys + paths, however many an upload has. Expressions are few.
    """
    order: dict[tuple[str, bool], int] = {}
    expressions: list[tuple[int, Any]] = []
    for index, key in enumerate(keys):
        if (literal := _literal(key)) is not None:
            order.setdefault(literal, index)
        elif len(expressions) == MAX_EXPRESSIONS:
            _bad(
                pattern,
                f"has more than {MAX_EXPRESSIONS} regular expressions; write the module names "
                "out, or join some of them with |",
            )
        else:
            expressions.append((index, _expression(pattern, key)))
    hits: dict[str, list[int]] = {}
    for path in paths:
        parts = path.split(".")
        forms = [(".".join(parts[n:]), False) for n in range(len(parts))] + [(path, True)]
        found = [order[form] for form in forms if form in order]
        found += [index for index, expression in expressions if expression.match(path)]
        hits[path] = sorted(found)
    return hits
