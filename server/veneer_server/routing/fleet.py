"""The replicas that a router chooses from, and their loads."""

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
"""Maximum changes of a replica's request count that are kept until its next report."""
_SMOOTHING: Final = 0.02
"""Weight of the newest request in the mean work of a request."""


@dataclass(slots=True)
class _Known:
    """A replica.

    Attributes:
        joined: sequence number of its arrival.
        own: unfinished requests that this router sent there.
        others: requests there from other routers, as of the last report.
        changes: (time, new value) of each change of ``own``, back to the last report.
        draining: whether it gets no new requests.
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
    """The known replicas. Belongs to one thread. A *slot* is the index of a replica in `names`.

    Args:
        window_s: time constant of `recent`.

    Attributes:
        names: replicas that take new requests, sorted, so that all routers agree.
        seeds: hashes of their names, for rendezvous hashing.
        load: number of requests at each of them.
        recent: work sent to each of them recently; only ratios have a meaning.
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
        """A replica's slot; None if it takes no new requests."""
        return self._slots.get(replica)

    def knows(self, replica: str) -> bool:
        """Whether a replica has joined and not left; it may be draining."""
        return replica in self._known

    # ------------------------------------------------------------------ membership

    def join(self, replica: str) -> None:
        """Add a replica, or end its draining: it takes requests from now on. Idempotent."""
        known = self._known.get(replica)
        if known is None:
            self._joined += 1
            # Start at the others' mean: the new replica should take its share of the coming
            # requests, not all of them until it has caught up.
            typical = float(self.recent.mean()) if self.names else 0.0
            self._known[replica] = _Known(self._joined, recent=typical)
        elif known.draining:
            known.draining = False
        else:
            return
        self._arrange()

    def drain(self, replica: str) -> None:
        """Send a replica no new requests; its requests continue. Idempotent."""
        known = self._known.get(replica)
        if known is not None and not known.draining:
            known.draining = True
            self._arrange()

    def leave(self, replica: str) -> None:
        """Remove a replica that is gone, with its requests. Idempotent."""
        if replica in self._known:
            del self._known[replica]
            self._arrange()

    def _arrange(self) -> None:
        """Rebuild the arrays that are indexed by slot: only at a change of membership, in
        microseconds for each replica."""
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

    # ------------------------------------------------------------------ loads

    @property
    def mean_load(self) -> float:
        """Mean number of requests at a replica; there must be a replica."""
        return self._sums[0] / len(self.names)

    @property
    def mean_recent(self) -> float:
        """Mean of `recent`."""
        return self._sums[1] / len(self.names)

    def typical(self, now: float) -> float:
        """Amount that a typical request adds to `recent` now; 0 before the first request."""
        return self._typical * self._decay.weight(now)

    def send(self, slot: int, work: float, now: float) -> RoutedTo:
        """Count a request that is sent to a slot."""
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
        """Note that a request has ended, in whatever way."""
        known = self._known.get(choice.replica)
        if known is None or known.joined != choice.joined or not known.own:
            return
        self._changed(known, known.own - 1, now)
        self._add_load(choice.replica, -1)

    def report(self, replica: str, report: ReplicaReport, now: float) -> None:
        """Update a replica's count of requests from other routers."""
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
