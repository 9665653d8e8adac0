"""A follower's state towards its registry: connected or not, and how old its view is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from veneer_registry.errors import AdapterNotFound, FailedPrecondition, Unavailable

from veneer_server.replication.states import HEARTBEAT_S

RETRY_S: Final = 1.0
"""Retry-after in seconds for requests that a cut-off follower cannot answer."""

_FRESH_S: Final = 4 * HEARTBEAT_S
"""A view counts as current for this many seconds, since heartbeats may be late."""


class Standing:
    """State of the connection to the registry. May be read from any thread.

    Attributes:
        registry: the registry's address, for messages.
        connected: whether a connection is up and its snapshot or changes have been received.
        sequence: number of the last applied change.
        fault: why the registry cannot be followed, in words; "" if it can.
        unfit: the same if only one of this server and the registry authenticates callers.
    """

    def __init__(
        self,
        registry: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        most_lag_s: float = math.inf,
    ) -> None:
        """Args: most_lag_s: maximum age of the view for answering calls."""
        self.registry = registry
        self._most_lag_s = most_lag_s
        self.connected = False
        self.sequence = 0
        self.fault = ""
        self.unfit = ""
        self._clock = clock
        self._started = clock()
        self._current: float | None = None

    def current(self, at: float | None = None) -> None:
        """Note that the view is complete and has all that the registry had.

        Args:
            at: when, on this object's clock; None for now.
        """
        self.connected = True
        now = self._clock()
        at = now if at is None else min(at, now)
        self._current = at if self._current is None else max(self._current, at)

    def restored(self, age_s: float) -> None:
        """Note that the view was restored from an earlier run and was current ``age_s`` ago."""
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
        """Whether the view was ever current."""
        return self._current is not None

    @property
    def usable(self) -> bool:
        """Whether there is a view, and it is not older than this server allows."""
        return self.synced and self.lag_s <= self._most_lag_s

    @property
    def lag_s(self) -> float:
        """Seconds since the view was known to be current, or since the start."""
        since = self._started if self._current is None else self._current
        return max(0.0, self._clock() - since)

    def check(self, most_s: float) -> None:
        """Raise Unavailable if the view is older than the call or this server allows.

        Args:
            most_s: maximum age of the view for the call; infinite for no limit.
        """
        most_s = min(most_s, self._most_lag_s)
        if most_s == math.inf or (self.synced and self.lag_s <= most_s):
            return
        raise Unavailable(
            f"this server's view of its registry is {self.lag_s:.3f} s old, and the call "
            f"allows {most_s:g} s: retry, or use another server",
            metadata={
                "cause": "registry_lag",
                "lag_s": f"{self.lag_s:.3f}",
                "limit_s": f"{most_s:g}",
            },
            retry_after_s=RETRY_S,
        )

    def absent(self, error: AdapterNotFound) -> AdapterNotFound | Unavailable:
        """The error for a name that the view does not have: ``error`` if the view is current,
        otherwise Unavailable, since the name may exist."""
        if self.connected and self.lag_s < _FRESH_S:
            return error
        name = error.metadata.get("adapter", "")
        return Unavailable(
            f"this server cannot tell whether adapter {name!r} exists: its registry last "
            f"answered {self.lag_s:.1f} s ago; retry, or use another server",
            metadata={"adapter": name, "cause": "registry_away", "lag_s": f"{self.lag_s:.1f}"},
            retry_after_s=RETRY_S,
        )

    def fit(self, *, asks_here: bool, asks_there: bool) -> None:
        """Note whether this server and its registry authenticate callers. If only one does, a
        caller could see or change at one of them what the other denies.

        Raises:
            FailedPrecondition: only one of them authenticates callers.
        """
        self.unfit = ""
        if asks_here and not asks_there:
            self.unfit = (
                "this server requires keys (--keys-file or --jwt-issuer) but the registry at "
                f"{self.registry} does not, so a caller could change every tenant's adapters "
                "there: start the registry with the same --keys-file or --jwt-issuer"
            )
        elif asks_there and not asks_here:
            self.unfit = (
                f"the registry at {self.registry} requires keys (--keys-file or --jwt-issuer) "
                "but this server does not, so every caller would see all tenants' adapters "
                "here: start this server with the registry's --keys-file or --jwt-issuer"
            )
        self.check_fit()

    def check_fit(self) -> None:
        """Raise FailedPrecondition if `unfit` is set."""
        if self.unfit:
            raise FailedPrecondition(
                self.unfit, metadata={"cause": "callers", "registry": self.registry}
            )

    def unreachable(self, what: str, why: str) -> Unavailable:
        """The error for an operation that needs the registry while it cannot be reached."""
        return Unavailable(
            f"{what} needs the registry, which does not answer: retry",
            metadata={"cause": "registry_away", "lag_s": f"{self.lag_s:.1f}"},
            retry_after_s=RETRY_S,
            detail=f"{self.registry}: {why}",
        )

    def refused(self, what: str) -> FailedPrecondition:
        """The error for a change that only the registry can make."""
        return FailedPrecondition(
            f"{what} is not possible on this server, which follows the registry at "
            f"{self.registry}: send it there, or by gRPC to this server, which forwards it",
            metadata={"cause": "follower", "registry": self.registry},
        )
