"""Base class of all routers: tracks the replicas, their reports, and requests under way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from veneer_registry.errors import Unavailable

from veneer_server.routing.fleet import Fleet
from veneer_server.routing.records import ReplicaReport, RoutedTo, Wanted

WINDOW_S: Final = 30.0
"""Time constant of recent work: a request this many seconds ago counts 1 / e."""

_RETRY_S: Final = 1.0


class Router(ABC):
    """Chooses a replica for each request. Belongs to one thread; call `finished` once for each
    choice, however the request ends.

    Times are seconds of any monotonic clock.
    """

    def __init__(self) -> None:
        self.fleet = Fleet(WINDOW_S)

    def join(self, replica: str) -> None:
        """Add a replica, or end its draining: it takes requests from now on. Idempotent."""
        self.fleet.join(replica)

    def drain(self, replica: str) -> None:
        """Send a replica no new requests; its requests continue. Idempotent."""
        self.fleet.drain(replica)

    def leave(self, replica: str) -> None:
        """Remove a replica that is gone, with its requests. Idempotent."""
        self.fleet.leave(replica)

    def report(self, replica: str, report: ReplicaReport, now: float) -> None:
        """Take in a replica's report. Ignored if the replica has left."""
        self.fleet.report(replica, report, now)

    def choose(self, wanted: Wanted, now: float) -> RoutedTo:
        """Choose the replica for a request.

        Raises:
            Unavailable: no replica takes requests.
        """
        if not self.fleet.names:
            raise Unavailable(
                "no replica takes requests now: retry, or start one",
                metadata={"cause": "no_replica"},
                retry_after_s=_RETRY_S,
            )
        return self.fleet.send(self._slot(wanted, now), wanted.work, now)

    def finished(self, choice: RoutedTo, now: float) -> None:
        """Note that a request has ended. Ignored if its replica has left meanwhile."""
        self.fleet.finished(choice, now)

    @abstractmethod
    def _slot(self, wanted: Wanted, now: float) -> int:
        """The slot of the replica to choose. Called only if there is a replica."""
