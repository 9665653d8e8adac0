"""Parses what users type: labels, sizes, modes, shares. Each error shows the correct form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from veneer_registry.errors import InvalidField

from veneer_client.records import EvictMode

__all__ = ["MODES", "parse_bytes", "parse_labels", "parse_mode", "parse_shares"]

MODES: Final = tuple(mode.value.replace("_", "-") for mode in EvictMode)

_UNITS: Final = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def parse_labels(pairs: Iterable[str], shown: str = "--label team=data") -> dict[str, str]:
    """Parse KEY=VALUE pairs; ``shown`` is the example in the error."""
    labels: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InvalidField(
                f"label {pair!r} is not KEY=VALUE, for example {shown}",
                metadata={"field": "labels"},
            )
        labels[key] = value
    return labels


def parse_bytes(text: str, flag: str) -> int:
    """Parse bytes, as ``veneer-server`` does: ``1073741824``, ``512MiB`` or ``2GB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise InvalidField(
            f"{flag} {text!r} is not a size: give bytes, such as 1073741824, 512MiB or 2GB",
            metadata={"field": flag},
        )
    return int(float(match[1]) * _UNITS[match[2]]) if match[2] else int(float(match[1]))


def parse_mode(text: str) -> EvictMode:
    """Parse ``drain``, ``fail-if-busy`` or ``abort``."""
    try:
        return EvictMode(text.replace("-", "_").lower())
    except ValueError as error:
        raise InvalidField(
            f"--mode {text!r} is unknown: give {', '.join(MODES[:-1])} or {MODES[-1]}",
            metadata={"field": "mode"},
        ) from error


def parse_shares(pairs: Iterable[str]) -> dict[str, int]:
    """Parse REVISION=WEIGHT pairs of a canary."""
    shares: dict[str, int] = {}
    for pair in pairs:
        revision, _, weight = pair.partition("=")
        if not revision or not re.fullmatch(r"[0-9]{1,5}", weight):
            raise InvalidField(
                f"--canary {pair!r} is not REVISION=WEIGHT, for example --canary "
                "1a2b3c4d5e6f=90 --canary 6f5e4d3c2b1a=10",
                metadata={"field": "targets"},
            )
        shares[revision] = int(weight)
    return shares
