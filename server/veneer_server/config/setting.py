"""One setting, as declared by its field in `ServerConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from veneer_registry.errors import VeneerError

from veneer_server.config.kinds import Kind

PREFIX: Final = "VENEER_"
"""Prefix of the environment variables."""

T = TypeVar("T")


class ConfigInvalid(VeneerError):
    """A setting is unknown or has a value that cannot be used."""

    code = "INVALID_ARGUMENT"
    reason = "CONFIG_INVALID"


def setting(
    default: str,
    kind: Kind[T],
    help: str,
    *,
    also: tuple[str, ...] = (),
    repeated: bool = False,
) -> T:
    """Declare a field of the record; see `Option` for the arguments.

    Typed as the value, so that mypy checks the field's type against the kind's.
    """
    metadata = {
        "default": default,
        "kind": kind,
        "help": help,
        "also": also,
        "repeated": repeated,
    }
    declared: Any = field(default_factory=lambda: kind.parse(default), metadata=metadata)
    return declared  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Option:
    """A setting by name.

    Attributes:
        name: field of `ServerConfig` and key of the file; the flag and the ``VENEER_``
            variable are derived from it.
        default: as a user would write it.
        kind: which values it takes, and how they are parsed.
        also: other names of the flag, as used by other servers.
        repeated: the flag may be given several times, the file's key is a list, and the
            variable is comma-separated.
    """

    name: str
    default: str
    kind: Kind[Any]
    help: str
    also: tuple[str, ...]
    repeated: bool

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    @property
    def flags(self) -> tuple[str, ...]:
        """The flag and its other names."""
        return (self.flag, *map(flag_of, self.also))

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def metavar(self) -> str:
        return self.kind.metavar

    @property
    def switch(self) -> bool:
        return not self.metavar


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")
