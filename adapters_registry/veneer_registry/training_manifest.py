"""``training_manifest.json``: the base an adapter was trained on, and flat facts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from veneer_registry.adapter import (
    NO_CLAIM,
    BaseClaim,
    BaseFingerprint,
    BaseSpec,
    BaseWord,
)
from veneer_registry.base_names import is_copy, is_named, meanings, says_its_origin
from veneer_registry.errors import BaseModelMismatch
from veneer_registry.lora_config import CONFIG_FILE
from veneer_registry.strict_json import canonical_json, parse_object, refuse, show

TRAINING_FILE: Final = "training_manifest.json"
TRAINING_LIMIT: Final = 1 << 20

_MAX_FACTS: Final = 256
_MAX_FACT: Final = 512
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_SAFE: Final = re.compile(r"[A-Za-z0-9._/@-]{1,200}")
"""A name that is safe in a command that users copy."""
_PARTS: Final = ("weights", "tokenizer", "quantization", "template")


@dataclass(frozen=True, slots=True)
class TrainingManifest:
    """Result of `parse_training`; ``facts`` are flat, with ``a.b`` for nested keys."""

    fingerprint: BaseFingerprint | None
    facts: Mapping[str, str]
    warnings: tuple[str, ...]


def parse_training(data: bytes) -> TrainingManifest:
    """Read ``training_manifest.json``.

    Facts beyond 256, and text beyond 512 characters, are cut with a warning: facts are for
    people to read, and every listing carries them.

    Raises:
        AdapterInvalid: metadata ``file`` and ``key``.
    """
    content = parse_object(data, file=TRAINING_FILE)
    fingerprint = _fingerprint(content.pop("base_fingerprint", None))
    metrics = content.get("metrics", {})
    if not isinstance(metrics, dict):
        refuse(TRAINING_FILE, "must map names to numbers", key="metrics")
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(TRAINING_FILE, "must be a number", key=f"metrics.{name}")
    facts: dict[str, str] = {}
    cut = False
    for name, text in _flatten("", content):
        if len(facts) == _MAX_FACTS:
            cut = True
            break
        cut = cut or len(name) > _MAX_FACT or len(text) > _MAX_FACT
        facts[name[:_MAX_FACT]] = text[:_MAX_FACT]
    warning = (
        f"{TRAINING_FILE}: only {_MAX_FACTS} facts of {_MAX_FACT} characters are listed; the "
        "file itself is kept complete"
    )
    return TrainingManifest(fingerprint, facts, (warning,) if cut else ())


def _fingerprint(value: object) -> BaseFingerprint | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        refuse(
            TRAINING_FILE,
            "must be an object with weights and tokenizer",
            key="base_fingerprint",
        )
    parts: dict[str, str] = {}
    for part in _PARTS:
        text = value.get(part, "")
        if text is None:
            text = ""
        if not isinstance(text, str) or (text and not _HEX.fullmatch(text)):
            refuse(TRAINING_FILE, "must be 64 hex digits", key=f"base_fingerprint.{part}")
        parts[part] = text
    if not parts["weights"] or not parts["tokenizer"]:
        refuse(TRAINING_FILE, "needs both weights and tokenizer", key="base_fingerprint")
    return BaseFingerprint(**parts)


def _flatten(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key in sorted(value):
            yield from _flatten(f"{prefix}.{key}" if prefix else key, value[key])
    elif isinstance(value, str):
        yield prefix, value
    elif value is not None:
        yield prefix, canonical_json(value).decode()


def plain_word(fingerprint: BaseFingerprint | None, base_name: str) -> BaseWord:
    """Return the evidence of an adapter's base that is in its own files; see `BaseWord`."""
    if fingerprint is not None:
        return "fingerprint"
    return "name" if base_name.strip() else "none"


def check_base(
    trained: BaseFingerprint | None,
    base: BaseSpec,
    named: str = "",
    claim: BaseClaim = NO_CLAIM,
) -> tuple[BaseWord, tuple[str, ...]]:
    """Check that an adapter was trained on this base. Returns the evidence and warnings.

    If there is a fingerprint, it decides; a part that either side lacks ("") counts as equal.
    Without one, a name in the adapter's config must be one of the base's names or that of a
    copy, unless the publisher says that it means this base.

    Args:
        named: ``base_model_name_or_path``, or "".
        claim: what the publisher says.

    Raises:
        BaseModelMismatch: weights or tokenizer differ, or the config names another base;
            metadata holds both sides.
    """
    if trained is None:
        return _check_name(named, base, claim)
    served = base.fingerprint
    differing = [
        part
        for part in _PARTS
        if getattr(trained, part)
        and getattr(served, part)
        and getattr(trained, part) != getattr(served, part)
    ]
    hard = [part for part in differing if part in ("weights", "tokenizer")]
    soft = tuple(
        f"the base's {part} differs from the one used in training "
        f"({getattr(trained, part)[:12]}, here {getattr(served, part)[:12]})"
        for part in differing
        if part not in hard
    )
    same_tokens = "tokenizer" not in hard or _same_tokens(base, claim)
    if hard and base.origin and same_tokens and _means_origin(named, base, claim):
        _refuse_other_weights(named, base)
        word: BaseWord = "publisher" if claim.same else "rule"
        return word, (_of_origin(named, base), *soft)
    if hard:
        shown = "; ".join(
            f"{part} {getattr(trained, part)[:12]} (adapter), "
            f"{getattr(served, part)[:12]} (server)"
            for part in hard
        )
        more = ""
        if base.origin and same_tokens:
            safe = _SAFE.fullmatch(named) is not None
            more = (
                f". {base.name} is quantized from {show(base.origin)}: if the adapter is for "
                f"that, start this server with --allow-base-name {named if safe else 'NAME'}"
            )
        metadata = {"base": base.name}
        for part in hard:
            metadata[f"adapter_{part}"] = getattr(trained, part)
            metadata[f"base_{part}"] = getattr(served, part)
        raise BaseModelMismatch(
            f"the adapter was trained on a base other than {base.name}: {shown}; push it to a "
            f"server with its base, or retrain it on this one{more}",
            metadata=metadata,
        )
    return "fingerprint", soft


def _same_tokens(base: BaseSpec, claim: BaseClaim) -> bool:
    """Whether the tokenizer beside the adapter is known to have the base's tokens."""
    return bool(base.vocabulary) and claim.vocabulary == base.vocabulary


def _means_origin(named: str, base: BaseSpec, claim: BaseClaim) -> bool:
    """Whether an adapter's config, or its publisher, says that it is for the model that was
    quantized."""
    names = (base.origin, base.name, *base.names)
    return claim.same or any(
        is_named(each, names) or is_copy(each, (base.origin,)) for each in meanings(named)
    )


def _of_origin(named: str, base: BaseSpec) -> str:
    trained = show(named) if named.strip() else show(base.origin)
    return (
        f"the adapter was trained on {trained}; {base.name} has the weights of "
        f"{show(base.origin)} in fewer bits, so answers differ a little from those in training"
    )


def _refuse_other_weights(named: str, base: BaseSpec) -> None:
    """Raise BaseModelMismatch if the operator requires the weights of the training."""
    if base.require_same_weights:
        raise BaseModelMismatch(
            f"the adapter was trained on {show(named or base.origin)}, and this server serves "
            f"{base.name}, which was quantized from it, with --require-same-weights: train the "
            "adapter on this base, or serve the original",
            metadata={
                "base": base.name,
                "adapter_base": named[:200],
                "origin": base.origin,
                "cause": "same_weights",
            },
        )


def _check_name(
    named: str, base: BaseSpec, claim: BaseClaim
) -> tuple[BaseWord, tuple[str, ...]]:
    if not named.strip():
        why = f"the adapter does not record its base model; its shapes fit {base.name}"
        return "none", (why,)
    names = (base.name, *base.names)
    if base.origin and any(
        is_named(each, (base.origin,))
        or (is_copy(each, (base.origin,)) and says_its_origin(each))
        for each in meanings(named)
    ):
        if not claim.vocabulary or not base.vocabulary or _same_tokens(base, claim):
            _refuse_other_weights(named, base)
            return "rule", (_of_origin(named, base),)
    elif is_named(named, names):
        return "name", ()
    config = f"the adapter's config names {show(named)}"
    copy = is_copy(named, names)
    compared = bool(claim.vocabulary and base.vocabulary)
    same_tokens = claim.vocabulary == base.vocabulary
    if copy and (same_tokens if compared else says_its_origin(named)):
        how = "its tokenizer" if compared else "its shapes"
        return "rule", (f"{config}: taken for {base.name} by its name and {how}",)
    if claim.same:
        why = (
            f"the adapter's config names {show(named)}: taken for {base.name} since you say so"
        )
        return "publisher", (why,)
    if copy and compared:
        more = ", and the tokenizer beside the adapter is not this base's"
    elif copy:
        more = (
            ": the same name by another owner. Use `veneer adapter push` with the "
            "tokenizer.json that it was trained with beside it, so that they can be compared"
        )
    else:
        more = ""
    safe = _SAFE.fullmatch(named) is not None
    raise BaseModelMismatch(
        f"the adapter's config names another base, {show(named)}; this server serves "
        f"{base.name}{more}. Push it to a server with its base; if it is the same base by "
        "another name, push it with `same_base`, or start this server with --allow-base-name "
        f"{named if safe else 'NAME'}",
        metadata={
            "base": base.name,
            "adapter_base": named[:200],
            "base_names": ", ".join(dict.fromkeys(names)),
            "file": CONFIG_FILE,
            "key": "base_model_name_or_path",
        },
    )
