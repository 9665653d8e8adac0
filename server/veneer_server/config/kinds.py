"""The kinds of values that settings take: how each is parsed, and its name in the help.

Each parser turns a flag's or variable's string, or a TOML value, into the field's type, and
raises ValueError with a phrase that completes "... is not allowed: ".
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """Values that a setting takes.

    Attributes:
        metavar: the value's name in the help; empty for a switch.
        parse: string or TOML value -> field value.
    """

    metavar: str
    parse: Callable[[Any], T]


class Address(NamedTuple):
    """Where a socket listens. Port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


_UNITS: Final = {
    "": 1,
    "b": 1,
    # As in Docker and the JVM.
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("give a text that is not empty")
    return value.strip()


def _maybe_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("give text")
    return value.strip()


def _path(value: Any) -> Path:
    return Path(_text(value)).expanduser()


def _bytes(value: Any) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower())
    if isinstance(value, bool) or match is None or match[2] not in _UNITS:
        raise ValueError("give bytes, such as 1073741824, 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2]]) if match[2] else int(float(match[1]))


def whole(low: int, high: int) -> Kind[int]:
    def parse(value: Any) -> int:
        text = str(value).strip()
        if isinstance(value, bool) or not re.fullmatch(r"\d{1,12}", text):
            raise ValueError(f"give a whole number of {low} or more")
        number = int(text)
        if not low <= number <= high:
            raise ValueError(f"give a whole number from {low} to {high}")
        return number

    return Kind("N", parse)


def _time(unit: str, most: int) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not 0 <= number <= most:
            raise ValueError(f"give {unit} from 0 to {most}")
        return number

    return parse


_seconds: Final = _time("seconds", 86400)


def _some_seconds(value: Any) -> float:
    if (number := _seconds(value)) == 0:
        raise ValueError("give more than 0 seconds")
    return number


def _cpu_seconds(value: Any) -> float:
    number = _seconds(value)
    if not 0.001 <= number <= 60:
        raise ValueError("give seconds from 0.001 to 60")
    return number


def bytes_between(low: str, high: str) -> Kind[int]:
    def parse(value: Any) -> int:
        number = _bytes(value)
        if not _bytes(low) <= number <= _bytes(high):
            raise ValueError(f"give {low} to {high}")
        return number

    return Kind("BYTES", parse)


def auto_whole(low: int, high: int) -> Kind[int]:
    """As `whole`, but ``auto`` is 0, which means the same."""
    kind = whole(low, high)

    def parse(value: Any) -> int:
        if value == "auto" or str(value).strip() == "0":
            return 0
        try:
            return kind.parse(value)
        except ValueError as error:
            raise ValueError(f"{error}, or auto") from None

    return Kind(kind.metavar, parse)


def auto_number(low: float, high: float) -> Kind[float | None]:
    def parse(value: Any) -> float | None:
        if value == "auto":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not low <= number <= high:
            raise ValueError(f"give a number from {low:g} to {high:g}, or auto")
        return number

    return Kind("X", parse)


def _flag(value: Any) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    parsed = known.get(str(value).strip().lower())
    if parsed is None:
        raise ValueError("give true or false")
    return parsed


def _names(value: Any) -> tuple[str, ...]:
    """Several names: a list, or comma-separated text."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(p, str) for p in parts):
        raise ValueError("give names, such as meta-llama/Llama-3.2-1B")
    return tuple(name for part in parts for p in part.split(",") if (name := p.strip()))


def _folders(value: Any) -> tuple[Path, ...]:
    """Several absolute folders: a list, or comma-separated text."""
    try:
        folders = tuple(Path(name).expanduser() for name in _names(value))
    except ValueError:
        raise ValueError("give folders, such as /srv/adapters") from None
    for folder in folders:
        if not folder.is_absolute():
            raise ValueError(f"{str(folder)!r} is not an absolute path")
    return folders


def _origins(value: Any) -> tuple[str, ...]:
    """Several origins of web pages: a list, or comma-separated text."""
    origins = tuple(name.lower().removesuffix("/") for name in _names(value))
    for origin in origins:
        if origin != "*" and not re.fullmatch(
            r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?", origin
        ):
            raise ValueError(
                f"{origin!r} is not an origin: give scheme, host and port, such as "
                "https://chat.example.org or http://localhost:3000, or *"
            )
    return origins


_SHORT: Final = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "gpu": "cuda",
}
"""Aliases of choices."""


def one_of(*choices: str, metavar: str = "") -> Kind[Any]:
    """One of some words; the help shows ``metavar`` where they do not fit in a line."""

    def parse(value: Any) -> str:
        found = _SHORT.get(value, value) if isinstance(value, str) else value
        if found not in choices:
            raise ValueError(f"choose one of {', '.join(choices)}")
        return cast(str, found)

    return Kind(metavar or "|".join(choices), parse)


def _address(value: Any) -> Address:
    match = re.fullmatch(
        r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s]+)):(\d{1,5})", str(value).strip()
    )
    if match is None or int(match[3]) > 65535:
        raise ValueError("give HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    return Address(match[1] or match[2], int(match[3]))


def _hosts(value: Any) -> tuple[str, ...]:
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError("give names, such as veneer.internal,gpu1")
    names = tuple(name.strip().lower() for name in given if name.strip())
    for name in names:
        if name != "*" and not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", name):
            raise ValueError(
                f"{name!r} is not a valid host name: give it without scheme and port"
            )
    return names


BASE: Final = Kind("PATH|HUB_ID|NAME", _text)
TEXT: Final = Kind("TEXT", _maybe_text)
ADDRESS: Final = Kind("HOST:PORT", _address)
HOSTS: Final = Kind("NAME,NAME", _hosts)
NAMES: Final = Kind("NAME", _names)
ORIGINS: Final = Kind("ORIGIN", _origins)
SWITCH: Final = Kind("", _flag)
FOLDER: Final = Kind("DIR", _path)
FOLDERS: Final = Kind("DIR", _folders)
FILE: Final = Kind("FILE", _path)
BYTES: Final = Kind("BYTES", _bytes)
HOURS: Final = Kind("HOURS", _time("hours", 8760))
SECONDS: Final = Kind("SECONDS", _seconds)
SOME_SECONDS: Final = Kind("SECONDS", _some_seconds)
CPU_SECONDS: Final = Kind("SECONDS", _cpu_seconds)


def optional(kind: Kind[T], none: str = "") -> Kind[T | None]:
    """The same kind, but the text ``none`` stands for None."""
    return Kind(kind.metavar, lambda value: None if value == none else kind.parse(value))
