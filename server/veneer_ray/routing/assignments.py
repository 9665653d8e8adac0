"""`AdapterRouter`, driven by Serve's events. Does not import Ray.

Serve asks for a replica, perhaps again if that one refuses; then reports which replica has
taken the request, and later that it has ended. A caller may leave at any of these points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from veneer_server.routing.adapter_router import AdapterRouter
from veneer_server.routing.records import ReplicaReport, RoutedTo, Wanted


@dataclass(slots=True)
class _Waiting:
    choice: RoutedTo
    left: Callable[[], bool]


class Assignments:
    """Tracks which replica each request was assigned to. Belongs to one event loop. Replicas
    are identified by the text of their id.

    Args:
        wall: seconds since 1970, the clock of the replicas' reports.
        clock: monotonic seconds.
    """

    def __init__(self, wall: Callable[[], float], clock: Callable[[], float]) -> None:
        self._router = AdapterRouter()
        self._wall = wall
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}
        self._sent: dict[str, RoutedTo] = {}
        self._reports: dict[str, float] = {}

    @property
    def under_way(self) -> int:
        """Number of assigned requests, including those not yet taken."""
        return len(self._waiting) + len(self._sent)

    def update(self, replicas: Mapping[str, Mapping[str, Any]]) -> None:
        """Set the replicas that take requests, each with its last report."""
        for gone in self._reports.keys() - replicas.keys():
            # It drains or has died: Serve does not say which. Either way it gets no more.
            self._router.leave(gone)
            del self._reports[gone]
        for replica, stats in replicas.items():
            if replica not in self._reports:
                self._router.join(replica)
                self._reports[replica] = 0.0
            at = float(stats.get("at", 0.0))
            if at > self._reports[replica]:
                self._reports[replica] = at
                self._router.report(replica, report_of(stats, self._wall()), self._clock())

    def gone(self, replica: str) -> None:
        """Remove a replica that has died."""
        self._reports.pop(replica, None)
        self._router.leave(replica)

    def choose(self, request: str, wanted: Wanted, left: Callable[[], bool]) -> str:
        """Choose a replica for a request, which counts as assigned to it from now on. There
        must be at least one replica.

        Args:
            left: whether the caller has gone; called while the request waits.
        """
        self._sweep()
        self._forget(request)
        choice = self._router.choose(wanted, self._clock())
        self._waiting[request] = _Waiting(choice, left)
        return choice.replica

    def sent(self, request: str, replica: str) -> None:
        """Note that a replica has taken a request."""
        waiting = self._waiting.pop(request, None)
        if waiting is None:
            return
        if waiting.choice.replica == replica:
            self._sent[request] = waiting.choice
        else:  # its report will count the request
            self._router.finished(waiting.choice, self._clock())

    def ended(self, request: str, replica: str) -> None:
        """Note that a request, or one attempt to send it, has ended at a replica."""
        choice = self._sent.get(request)
        if choice is not None and choice.replica == replica:
            self._finish(self._sent.pop(request))
            return
        waiting = self._waiting.get(request)
        if waiting is not None and waiting.choice.replica == replica and waiting.left():
            self._forget(request)

    def _sweep(self) -> None:
        for request in [each for each, it in self._waiting.items() if it.left()]:
            self._forget(request)

    def _forget(self, request: str) -> None:
        waiting = self._waiting.pop(request, None)
        if waiting is not None:
            self._finish(waiting.choice)
        if (sent := self._sent.pop(request, None)) is not None:  # it is sent again
            self._finish(sent)

    def _finish(self, choice: RoutedTo) -> None:
        self._router.finished(choice, self._clock())


def report_of(stats: Mapping[str, Any], now: float) -> ReplicaReport:
    """Convert a replica's ``record_routing_stats``. Its clock may differ from ours: a report
    from the future counts as made now."""
    return ReplicaReport(
        resident=frozenset(stats.get("resident", ())),
        requests=int(stats.get("requests", 0)),
        age_s=max(0.0, now - float(stats.get("at", now))),
    )
