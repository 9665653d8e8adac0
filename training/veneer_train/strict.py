"""Strict settings: YAML into frozen dataclasses, with errors that name the key.

Every error is an `InvalidField` (metadata ``field``). The error for an unknown key suggests
the nearest known one, since ignoring a misspelt setting would cost a whole run.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
import yaml
from veneer_registry.errors import InvalidField

_T = TypeVar("_T")

_WANTED: Final = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def bad_setting(key: str, message: str, **metadata: str) -> InvalidField:
    """The error for ``key`` (dotted); the caller raises it."""
    return InvalidField(f"{key}: {message}", metadata={"field": key, **metadata})


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _value(kind: Any, value: object, key: str) -> object:
    """``value`` as the annotated type ``kind``. Converts only an int to a float, and a string
    such as ``2e-4``, which YAML does not read as a number."""
    options = typing.get_args(kind) or (kind,)
    if isinstance(value, bool) and {"on", "off"} <= set(options):
        value = "on" if value else "off"  # YAML reads on and off as booleans
    if float in options and type(value) in (str, int, float):
        return _number(typing.cast(str | float, value), key)
    try:
        if isinstance(value, set | frozenset | tuple):
            raise msgspec.ValidationError  # msgspec itself would accept them as lists
        found = msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError):  # neither says what is allowed
        if typing.get_origin(kind) is Literal:
            wanted = f"one of {', '.join(map(str, options))}"
        else:
            wanted = _WANTED[options[0]]  # the other types are less usual spellings
        raise bad_setting(key, f"must be {wanted}; got {value!r}") from None
    for text in found if isinstance(found, list) else [found]:
        if isinstance(text, str):
            _check_text(text, key)
    return found


def _number(value: str | float, key: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise bad_setting(key, f"must be a number; got {value!r}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise bad_setting(key, f"must be a finite number; got {str(value)[:40]}")
    return number


def _check_text(value: str, key: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise bad_setting(
            key,
            f"must be text that UTF-8 can encode; character {error.start + 1} of {value!r} "
            "is not: write it in UTF-8",
            cause="not_utf8",
        ) from None


def build(cls: type[_T], raw: object, prefix: str = "") -> _T:
    """Build a ``cls`` (a dataclass with simple field types) from parsed YAML.

    Raises:
        InvalidField: an unknown or missing key, or a value of another type.
    """
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise bad_setting(prefix.rstrip(".") or "config", f"must be a mapping; got {raw!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in fields:
            known = [prefix + name for name in fields]
            raise bad_setting(
                f"{prefix}{key}", f"unknown key; {_nearest(f'{prefix}{key}', known)}"
            )
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            values[key] = build(typing.cast(type, kind), value, f"{prefix}{key}.")
        else:
            values[key] = _value(kind, value, f"{prefix}{key}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in values and required:
            kind = hints[name]
            if dataclasses.is_dataclass(kind):  # the section's error names the missing key
                values[name] = build(typing.cast(type, kind), {}, f"{prefix}{name}.")
            else:
                raise bad_setting(
                    f"{prefix}{name}", "is required; add it or use --set", cause="required"
                )
    return cls(**values)


def apply_setting(raw: dict[str, Any], setting: str) -> None:
    """Put ``section.key=value`` (the value in YAML) into ``raw``.

    Raises:
        InvalidField: ``setting`` is malformed.
    """
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise bad_setting(key, f"write --set section.key=value; got {setting!r}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise bad_setting(key, f"{text!r} is not a YAML value; quote it") from None
    section = raw
    for part in parts[:-1]:
        inner = section.setdefault(part, {})
        if not isinstance(inner, dict):
            raise bad_setting(key, f"{part!r} is a value, not a section")
        section = inner
    section[parts[-1]] = value


def overlay(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``under`` overridden by the values of ``over``, section by section."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = overlay(below, value)
        else:
            merged[key] = value
    return merged


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys (YAML's last-wins rule hides mistakes)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise bad_setting(str(key), f"is given twice (line {line}); keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections in the file ``path``.

    Raises:
        InvalidField: it cannot be read, is not YAML, or gives a key twice.
    """
    try:
        raw = yaml.load(path.read_text("utf-8"), Loader=_StrictLoader)  # noqa: S506 # nosec B506 # a SafeLoader
    except OSError as error:
        raise bad_setting(
            "config", f"cannot read {path}: {error.strerror}", cause="unreadable"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Also for an impossible date, or a number with thousands of digits.
        raise bad_setting("config", f"{path} is not YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise bad_setting("config", f"{path} must have sections like 'model:' and 'data:'")
    return raw
