"""Facts of a run as JSON, whatever they are: a run is never lost to a value in its manifest.

What JSON has no form for is written as near as it can be: a number that is not finite as
null, half a surrogate pair (of a file name that is not UTF-8, for example) as ``?``, a set
as a sorted list, anything unknown as its text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import Enum

__all__ = ["finite", "plain_json", "plain_text"]


def finite(numbers: Mapping[str, float]) -> dict[str, float]:
    """Those that are finite: what metrics may hold."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def plain_json(value: object, *, indent: int | None = 2) -> str:
    """A document, or with ``indent=None`` one line; ends with a newline."""
    text = json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def plain_text(text: str) -> str:
    """Text that can be UTF-8."""
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
    if callable(item) and getattr(value, "size", 0) == 1:  # a number of numpy
        return _plain(item())
    return plain_text(str(value))
