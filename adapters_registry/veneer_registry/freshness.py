"""How current a registry's names are.

A registry that owns its catalog is always current (`Owned`). One whose catalog is a copy of a
database or of another server's catalog knows how old the copy is (`CopyAge`). A caller may
limit that age, and a name that an old copy does not have may exist all the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final, Protocol

from veneer_registry.adapter import AdapterRef
from veneer_registry.errors import AdapterNotFound, Unavailable, VeneerError

HEARTBEAT_S: Final = 0.5
"""Seconds after which a copy looks again whether it is current, if nothing wakes it before."""

RETRY_S: Final = 1.0
"""Retry-after in seconds for requests that an old copy cannot answer."""

_FRESH_S: Final = 4 * HEARTBEAT_S
"""A copy counts as current for this many seconds, since a heartbeat may be late."""


class Freshness(Protocol):
    """What the lookups of a registry ask about the age of its names. Thread-safe."""

    @property
    def lag_s(self) -> float:
        """Seconds since the names were known to be current."""

    def check(self, most_s: float) -> None:
        """Raise Unavailable if the names are older than the call or this server allows.

        Args:
            most_s: maximum age for the call; infinite for no limit.
        """

    def absent(self, error: AdapterNotFound) -> VeneerError:
        """The error for a name that is not there."""

    def missing(self, ref: AdapterRef) -> VeneerError:
        """The error for a revision that its name has, but whose row is not there."""


class Owned:
    """`Freshness` of a registry that owns its catalog."""

    lag_s: Final = 0.0

    def check(self, most_s: float) -> None:
        """Do nothing."""

    def absent(self, error: AdapterNotFound) -> VeneerError:
        """``error``: the name does not exist."""
        return error

    def missing(self, ref: AdapterRef) -> VeneerError:
        """AdapterNotFound: a delete has reached the catalog but not yet the index."""
        return just_deleted(ref)


class CopyAge:
    """`Freshness` of a copy.

    Attributes:
        connected: whether the original can be reached, as far as is known.
    """

    def __init__(
        self,
        original: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        most_lag_s: float = math.inf,
    ) -> None:
        """Args:
        original: what this is a copy of, for errors: "its registry".
        most_lag_s: maximum age of the copy for answering calls.
        """
        self.connected = False
        self._original = original
        self._most_lag_s = most_lag_s
        self._clock = clock
        self._started = clock()
        self._current: float | None = None

    def current(self, at: float | None = None) -> None:
        """Note that the copy is complete and has all that the original had.

        Args:
            at: when, on this object's clock; None for now.
        """
        self.connected = True
        now = self._clock()
        at = now if at is None else min(at, now)
        self._current = at if self._current is None else max(self._current, at)

    def restored(self, age_s: float) -> None:
        """Note that the copy is from an earlier run and was current ``age_s`` ago."""
        self._current = self._clock() - age_s

    def cut(self) -> None:
        """Note that the connection has ended."""
        self.connected = False

    @property
    def now(self) -> float:
        """The time of the clock by which ages are measured."""
        return self._clock()

    @property
    def synced(self) -> bool:
        """Whether the copy was ever current."""
        return self._current is not None

    @property
    def usable(self) -> bool:
        """Whether there is a copy, and it is not older than this server allows."""
        return self.synced and self.lag_s <= self._most_lag_s

    @property
    def lag_s(self) -> float:
        """See `Freshness`; since the start if the copy was never current."""
        since = self._started if self._current is None else self._current
        return max(0.0, self._clock() - since)

    def check(self, most_s: float) -> None:
        """See `Freshness`."""
        most_s = min(most_s, self._most_lag_s)
        if most_s == math.inf or (self.synced and self.lag_s <= most_s):
            return
        raise Unavailable(
            f"this server's view of {self._original} is {self.lag_s:.3f} s old, and the call "
            f"allows {most_s:g} s: retry, or use another server",
            metadata={
                "cause": "registry_lag",
                "lag_s": f"{self.lag_s:.3f}",
                "limit_s": f"{most_s:g}",
            },
            retry_after_s=RETRY_S,
        )

    def absent(self, error: AdapterNotFound) -> VeneerError:
        """``error`` if the copy is current, otherwise Unavailable, since the name may exist."""
        if self.connected and self.lag_s < _FRESH_S:
            return error
        name = error.metadata.get("adapter", "")
        return Unavailable(
            f"this server cannot tell whether adapter {name!r} exists: {self._original} last "
            f"answered {self.lag_s:.1f} s ago; retry, or use another server",
            metadata={"adapter": name, "cause": "registry_away", "lag_s": f"{self.lag_s:.1f}"},
            retry_after_s=RETRY_S,
        )

    def missing(self, ref: AdapterRef) -> VeneerError:
        """As for a name that is not there: another process may just have deleted it."""
        return self.absent(just_deleted(ref))


def just_deleted(ref: AdapterRef) -> AdapterNotFound:
    """The error for a revision that is being deleted."""
    return AdapterNotFound(
        f"adapter {ref.short} has just been deleted; push it again",
        metadata={"adapter": ref.name, "cause": "deleted"},
    )
