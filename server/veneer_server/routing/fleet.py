"""The replicas that a router chooses from, and how much each has to do."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from veneer_server.routing.decay import Decay
from veneer_server.routing.records import ReplicaReport, RoutedTo
from veneer_server.routing.rendezvous import seeds_of

_HISTORY: Final = 4096
"""Changes of a replica's count of requests that are kept until its next report."""
_SMOOTHING: Final = 0.02
"""Weight of the newest request in the mean work of a request."""


@dataclass(slots=True)
class _Known:
    """A replica.

    Attributes:
        joined: number of its arrival.
        own: requests that this router sent there and that have not finished.
        others: requests there that other routers sent, as of the last report.
        changes: when ``own`` changed, and to what; back to the state of the last report.
        draining: it gets no new request.
        recent: decayed work sent there, see `Decay`.
    """

    joined: int
    own: int = 0
    others: int = 0
    changes: deque[tuple[float, int]] = field(
        default_factory=lambda: deque([(-math.inf, 0)], maxlen=_HISTORY)
    )
    draining: bool = False
    recent: float = 0.0


class Fleet:
    """Belongs to one thread. A *slot* is the index of a replica in `names`.

    Args:
        window_s: of `recent`.

    Attributes:
        names: replicas that take new requests, sorted, so that all routers agree.
        seeds: of their names, for rendezvous hashing.
        load: requests at each of them.
        recent: work sent to each of them recently, in a unit that only ratios may use.
        version: increases whenever `names` changes.
    """

    def __init__(self, window_s: float) -> None:
        self._known: dict[str, _Known] = {}
        self._decay = Decay(window_s)
        self._joined = 0
        self.version = 0
        self.names: list[str] = []
        self._slots: dict[str, int] = {}
        self.seeds = seeds_of(())
        self.load = np.zeros(0)
        self.recent = np.zeros(0)
        self._typical = 0.0
        self._sums = 0.0, 0.0

    def __len__(self) -> int:
        return len(self.names)

    def slot(self, replica: str) -> int | None:
        """None if it takes no new requests."""
        return self._slots.get(replica)

    def knows(self, replica: str) -> bool:
        """Whether it is there, perhaps draining."""
        return replica in self._known

    # ------------------------------------------------------------------ who is there

    def join(self, replica: str) -> None:
        """A replica takes requests, from now or again. Idempotent."""
        known = self._known.get(replica)
        if known is None:
            self._joined += 1
            # As much as the others: it is to take a share of the requests to come, not all of
            # them until it has had as many.
            typical = float(self.recent.mean()) if self.names else 0.0
            self._known[replica] = _Known(self._joined, recent=typical)
        elif known.draining:
            known.draining = False
        else:
            return
        self._arrange()

    def drain(self, replica: str) -> None:
        """It gets no new request; those there go on. Idempotent."""
        known = self._known.get(replica)
        if known is not None and not known.draining:
            known.draining = True
            self._arrange()

    def leave(self, replica: str) -> None:
        """It is gone, and its requests with it. Idempotent."""
        if replica in self._known:
            del self._known[replica]
            self._arrange()

    def _arrange(self) -> None:
        """Rebuild what is by slot: microseconds for each replica, at a change only."""
        for name, slot in self._slots.items():
            if name in self._known:
                self._known[name].recent = float(self.recent[slot])
        self.names = sorted(name for name, known in self._known.items() if not known.draining)
        self._slots = {name: slot for slot, name in enumerate(self.names)}
        here = [self._known[name] for name in self.names]
        self.seeds = seeds_of(self.names)
        self.load = np.array([known.own + known.others for known in here], dtype=float)
        self.recent = np.array([known.recent for known in here], dtype=float)
        self._sums = float(self.load.sum()), float(self.recent.sum())
        self.version += 1

    # ------------------------------------------------------------------ what they do

    @property
    def mean_load(self) -> float:
        """Requests at a replica; there must be one."""
        return self._sums[0] / len(self.names)

    @property
    def mean_recent(self) -> float:
        """Of `recent`."""
        return self._sums[1] / len(self.names)

    def typical(self, now: float) -> float:
        """What a request adds to `recent` now; 0 before the first."""
        return self._typical * self._decay.weight(now)

    def send(self, slot: int, work: float, now: float) -> RoutedTo:
        """A request goes there."""
        if (over := self._decay.restart(now)) is not None:
            self.recent /= over
            for other in self._known.values():
                other.recent /= over
            self._sums = self._sums[0], float(self.recent.sum())
        weighted = work * self._decay.weight(now)
        name = self.names[slot]
        known = self._known[name]
        self._changed(known, known.own + 1, now)
        self.load[slot] += 1
        self.recent[slot] += weighted
        self._sums = self._sums[0] + 1, self._sums[1] + weighted
        self._typical += _SMOOTHING * (work - self._typical) if self._typical else work
        return RoutedTo(name, known.joined)

    def finished(self, choice: RoutedTo, now: float) -> None:
        """A request has ended, however it did."""
        known = self._known.get(choice.replica)
        if known is None or known.joined != choice.joined or not known.own:
            return
        self._changed(known, known.own - 1, now)
        self._add_load(choice.replica, -1)

    def report(self, replica: str, report: ReplicaReport, now: float) -> None:
        """Take over what other routers sent there."""
        known = self._known.get(replica)
        if known is None:
            return
        taken = now - report.age_s
        while len(known.changes) > 1 and known.changes[1][0] <= taken:
            known.changes.popleft()
        others = max(0, report.requests - known.changes[0][1])
        self._add_load(replica, others - known.others)
        known.others = others

    @staticmethod
    def _changed(known: _Known, own: int, now: float) -> None:
        known.own = own
        known.changes.append((now, own))

    def _add_load(self, replica: str, change: int) -> None:
        slot = self._slots.get(replica)
        if slot is not None and change:
            self.load[slot] += change
            self._sums = self._sums[0] + change, self._sums[1]
