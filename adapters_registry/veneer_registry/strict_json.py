"""Strict JSON for untrusted input: no duplicate keys, no NaN, only text that UTF-8 can encode.

Also the two helpers that every refusal in this package uses, so that all of them name the
file, the tensor or key, and the reason in the same way.
"""

from __future__ import annotations

import json
import math
from typing import Final, NoReturn

from veneer_registry.errors import AdapterInvalid

_SHOWN: Final = 120
"""Most characters of untrusted text that a message quotes: it must fit a gRPC trailer."""


def show(text: object) -> str:
    """``repr`` of untrusted text, cut to a length that is safe in a message."""
    shown = repr(text[: _SHOWN * 2]) if isinstance(text, str) else repr(text)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


def refuse(
    file: str,
    why: str,
    *,
    tensor: str | None = None,
    key: str | None = None,
    cause: str | None = None,
) -> NoReturn:
    """Raise `AdapterInvalid` for ``file``.

    Args:
        why: the reason and the fix, continuing a sentence that starts with the file's name.
        cause: a stable word, if file, tensor and key do not tell what is wrong.
    """
    metadata = {"file": file, "why": why}
    if cause is not None:
        metadata["cause"] = cause
    place = file
    if tensor is not None:
        metadata["tensor"] = tensor[:_SHOWN]
        place = f"{file}: tensor {show(tensor)}"
    if key is not None:
        metadata["key"] = key[:_SHOWN]
        place = f"{file}: key {show(key)}"
    raise AdapterInvalid(f"{place} {why}", metadata=metadata)


class _DuplicateKeyError(ValueError):
    """A key occurs twice in an object."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return value


def parse_object(data: bytes, *, file: str) -> dict[str, object]:
    """Parse one JSON object; callers bound the size of ``data``.

    Raises `AdapterInvalid`, naming ``file``, for anything else: other types,
    duplicate keys at any depth, NaN and infinities, lone surrogates, nesting
    deeper than the interpreter's stack, integers of thousands of digits.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_constant,
            parse_float=_float,
        )
        if b"\\u" in data:
            # Escapes such as "\ud800" parse, but no digest or database can take them.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _DuplicateKeyError as error:
        refuse(file, "occurs twice in one object; keep one", key=str(error))
    except RecursionError:
        refuse(file, "is nested too deeply; write it again with a JSON library")
    except (ValueError, UnicodeError) as error:
        refuse(file, f"is not valid JSON ({str(error)[:80]}); write it again")
    if not isinstance(value, dict):
        refuse(file, "must hold one JSON object")
    return value


def canonical_json(value: object) -> bytes:
    """Serialize to JSON with sorted keys, no spaces, in ASCII, so that equal values give the
    same bytes. Used for hashing and storing."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")
