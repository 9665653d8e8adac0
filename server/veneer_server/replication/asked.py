"""What a call says that matters to a server that follows a registry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from veneer_registry.errors import InvalidField

__all__ = ["ASKED", "MOST_LAG", "Asked"]

MOST_LAG: Final = "veneer-max-registry-lag"
"""Metadata: the caller takes names from a view of at most so many seconds of age. In HTTP the
header has ``x-`` before it."""

_CALLERS: Final = (
    *("authorization", "x-api-key", "veneer-actor"),
    *("veneer-tenant", "x-veneer-tenant"),
)
"""Metadata that says who calls. A certificate cannot be passed on: see `Asked.secret`."""

_SECRETS: Final = frozenset({"authorization", "x-api-key"})


@dataclass(frozen=True, slots=True)
class Asked:
    """Of one call.

    Attributes:
        caller: what says who calls, to be shown to the registry.
        most_lag_s: the oldest view that the caller takes; infinite if any.
    """

    caller: tuple[tuple[str, str], ...] = ()
    most_lag_s: float = math.inf

    @property
    def secret(self) -> bool:
        """Whether `caller` has a key or token."""
        return any(key in _SECRETS for key, _ in self.caller)

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Asked:
        """From HTTP headers or gRPC metadata, by lower-case name. Raises InvalidField."""
        given = headers.get(MOST_LAG) or headers.get(f"x-{MOST_LAG}")
        caller = tuple((key, headers[key]) for key in _CALLERS if key in headers)
        return cls(caller, math.inf if given is None else _seconds(given))


ASKED: ContextVar[Asked | None] = ContextVar("asked", default=None)
"""Of the current call; None for what the server does by itself, which takes any view."""


def _seconds(given: str) -> float:
    try:
        found = float(given)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise InvalidField(
            f"{MOST_LAG} is {given[:40]!r}: give seconds, 0 or more",
            metadata={"field": MOST_LAG},
        )
    return found
