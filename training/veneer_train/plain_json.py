"""Facts of a run as JSON, whatever their types: a run must never fail for its manifest.

Values that JSON cannot express are approximated: a non-finite number by null, half a
surrogate pair (from a file name that is not UTF-8, for example) by ``?``, a set by a sorted
list, anything unknown by its ``str``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import Enum


def finite(numbers: Mapping[str, float]) -> dict[str, float]:
    """The finite numbers, which are all that metrics may contain."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def plain_json(value: object, *, indent: int | None = 2) -> str:
    """A JSON document, or one line with ``indent=None``; ends with a newline."""
    text = json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def plain_text(text: str) -> str:
    """The text, made encodable as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {plain_text(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", 0) == 1:  # a numpy number
        return _plain(item())
    return plain_text(str(value))
