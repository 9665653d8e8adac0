"""What all routers have in common: who is there, what they report, what is under way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from veneer_registry.errors import Unavailable

from veneer_server.routing.fleet import Fleet
from veneer_server.routing.records import ReplicaReport, RoutedTo, Wanted

WINDOW_S: Final = 30.0
"""What is called recent: a request of so many seconds ago counts 1 / e."""

_RETRY_S: Final = 1.0


class Router(ABC):
    """Belongs to one thread; call `finished` once for each choice, however the request ends.

    Times are seconds of any clock that does not go back.
    """

    def __init__(self) -> None:
        self.fleet = Fleet(WINDOW_S)

    def join(self, replica: str) -> None:
        """A replica takes requests, from now or again. Idempotent."""
        self.fleet.join(replica)

    def drain(self, replica: str) -> None:
        """It gets no new request; those there go on. Idempotent."""
        self.fleet.drain(replica)

    def leave(self, replica: str) -> None:
        """It is gone, and its requests with it. Idempotent."""
        self.fleet.leave(replica)

    def report(self, replica: str, report: ReplicaReport, now: float) -> None:
        """What a replica says of itself. Ignored if it has left."""
        self.fleet.report(replica, report, now)

    def choose(self, wanted: Wanted, now: float) -> RoutedTo:
        """The replica for a request.

        Raises:
            Unavailable: there is none that takes requests.
        """
        if not self.fleet.names:
            raise Unavailable(
                "no replica takes requests now: retry, or start one",
                metadata={"cause": "no_replica"},
                retry_after_s=_RETRY_S,
            )
        return self.fleet.send(self._slot(wanted, now), wanted.work, now)

    def finished(self, choice: RoutedTo, now: float) -> None:
        """A request has ended. Ignored if its replica has left meanwhile."""
        self.fleet.finished(choice, now)

    @abstractmethod
    def _slot(self, wanted: Wanted, now: float) -> int:
        """Of the replica to choose; there is one."""
