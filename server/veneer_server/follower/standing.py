"""How a follower stands with its registry: connected or not, and how old its view is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from veneer_registry.errors import AdapterNotFound, FailedPrecondition, Unavailable

from veneer_server.replication.states import HEARTBEAT_S

RETRY_S: Final = 1.0
"""When a caller should ask again for what a cut-off follower does not know."""

_FRESH_S: Final = 4 * HEARTBEAT_S
"""A view that was current less than this ago counts as current: heartbeats may be late."""


class Standing:
    """May be read from any thread.

    Attributes:
        registry: its address, for messages.
        connected: whether there is a connection whose snapshot or changes were received.
        sequence: the last change that was applied.
        fault: why the registry cannot be followed, in words; "" if it can.
        unfit: the same, where the registry knows callers in another way than this server.
    """

    def __init__(
        self,
        registry: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        most_lag_s: float = math.inf,
    ) -> None:
        """Args: most_lag_s: the oldest view by which calls are answered."""
        self.registry = registry
        self._most_lag_s = most_lag_s
        self.connected = False
        self.sequence = 0
        self.fault = ""
        self.unfit = ""
        self._clock = clock
        self._started = clock()
        self._current: float | None = None

    def current(self) -> None:
        """The view was all that there was to know, just now."""
        self.connected = True
        self._current = self._clock()

    def restored(self, age_s: float) -> None:
        """The view is that of an earlier run, which knew it to be current so long ago."""
        self._current = self._clock() - age_s

    def cut(self) -> None:
        """The connection has ended."""
        self.connected = False

    @property
    def synced(self) -> bool:
        """Whether the view was ever current."""
        return self._current is not None

    @property
    def lag_s(self) -> float:
        """Seconds since the view was known to be current, or since the start."""
        since = self._started if self._current is None else self._current
        return max(0.0, self._clock() - since)

    def check(self, most_s: float) -> None:
        """Raise Unavailable if a call, which takes a view of at most this age, or this server
        takes no view as old as this one. What the server does by itself takes any."""
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
        """The error for a name that the view does not have: `error` only if the view is
        current."""
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
        """Note how this server and its registry know callers. Unless both ask who calls, or
        neither does, a caller could change at one what the other hides from it.

        Raises:
            FailedPrecondition: only one of them asks.
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
        """Raise FailedPrecondition if the registry knows callers in another way."""
        if self.unfit:
            raise FailedPrecondition(
                self.unfit, metadata={"cause": "callers", "registry": self.registry}
            )

    def unreachable(self, what: str, why: str) -> Unavailable:
        """The error for something that takes the registry, which cannot be reached."""
        return Unavailable(
            f"{what} needs the registry, which does not answer: retry",
            metadata={"cause": "registry_away", "lag_s": f"{self.lag_s:.1f}"},
            retry_after_s=RETRY_S,
            detail=f"{self.registry}: {why}",
        )

    def refused(self, what: str) -> FailedPrecondition:
        """The error for a change that this server does not make."""
        return FailedPrecondition(
            f"{what} is not possible on this server, which follows the registry at "
            f"{self.registry}: send it there, or by gRPC to this server, which forwards it",
            metadata={"cause": "follower", "registry": self.registry},
        )
