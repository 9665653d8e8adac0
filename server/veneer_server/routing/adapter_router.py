"""Sends requests to replicas that have their adapter, as long as that overloads no replica.

Each adapter orders the replicas by rendezvous hashing of its weights digest. The first two are
its homes: it is loaded at the less loaded one, and its requests go there until that replica
has about `_LOAD_WORTH` requests more than the other. Three rules change that:

- **Share.** An adapter with more than a replica's fair share of the requests gets as many homes
  as needed for each to get half a share. Each session has its own home among them; a request
  without a session goes to the least loaded home, where a copy in memory counts as above.
- **Bound.** No replica gets a request while it has more than 1.15 times the mean (consistent
  hashing with bounded loads, Mirrokni, Thorup and Zadimoghaddam 2016), both of current requests
  and of work sent recently. The next replica in the adapter's order gets it instead. So over
  longer periods each replica stays within 1.25 times the mean.
- **A copy elsewhere.** If the homes are near their bound, or beyond it, a less loaded replica
  that already has the adapter is preferred: this makes room without another load. So the
  adapters that move are those that cost nothing to move: popular ones with several copies.

With few requests the mean says little: a replica with up to `_FREE` requests, or whose recent
work exceeds the mean by no more than a few requests' worth, is not overloaded whatever the
mean is.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

import numpy as np

from veneer_server.routing.decay import Popularity
from veneer_server.routing.holders import Holders
from veneer_server.routing.records import ReplicaReport, RoutedTo, Wanted
from veneer_server.routing.rendezvous import Slots, hash_of, ordered, scores
from veneer_server.routing.router import WINDOW_S, Router

BOUND: Final = 1.25
"""Maximum requests of a replica in any longer period, as a multiple of the mean."""
_AIM: Final = 1.15
"""The bound applied over the half minute that counts as recent. Less than `BOUND`, since a
replica that had little to do may catch up within the period that is measured."""
_NEAR: Final = 1.1
"""Multiple of the mean from which a copy elsewhere is preferred."""
_FREE: Final = 4.0
"""Number of requests at a replica that is never too many."""
_RECENT_FREE: Final = 8.0
"""Recent work beyond the mean that is never too much, in typical requests."""
_HOMES: Final = 2
"""Minimum homes of an adapter: it is loaded at the less loaded one, and stays there."""
_SHARES: Final = 2.0
"""Number of homes for each fair share of the requests that an adapter gets."""
_LOAD_WORTH: Final = 4.0
"""A load delays a request about as much as this many other requests on the replica."""
_MOST_RECENT: Final = 2.0
"""Maximum that recent work counts, in requests; it counts as its multiple of the mean."""
_FEW: Final = 8
"""Number of replicas of an adapter's order that are cached; others are computed on demand."""
_MOST_ORDERS: Final = 1 << 17


class AdapterRouter(Router):
    """Routes requests by adapter; see the module's docstring.

    Args:
        bound: maximum load of a replica, as a multiple of the mean.
        free: see `_FREE`.
    """

    def __init__(self, *, bound: float = _AIM, free: float = _FREE) -> None:
        super().__init__()
        self._bound = bound
        self._near = min(bound, _NEAR)
        self._free = free
        self._popularity = Popularity(WINDOW_S)
        self._holders = Holders()
        self._orders: OrderedDict[str, Slots] = OrderedDict()
        self._version = self.fleet.version

    def leave(self, replica: str) -> None:
        super().leave(replica)
        self._holders.leave(replica)

    def report(self, replica: str, report: ReplicaReport, now: float) -> None:
        super().report(replica, report, now)
        if self.fleet.knows(replica):
            self._holders.report(replica, report, now)

    def choose(self, wanted: Wanted, now: float) -> RoutedTo:
        choice = super().choose(wanted, now)
        if wanted.digest:
            self._holders.expect(choice.replica, wanted.digest, now)
        return choice

    def homes(self, digest: str, count: int = 1) -> list[str]:
        """The first replicas of an adapter's order."""
        return [self.fleet.names[slot] for slot in self._order(digest, count)[:count]]

    # ------------------------------------------------------------------ the decision

    def _slot(self, wanted: Wanted, now: float) -> int:
        fleet = self.fleet
        key = wanted.digest or wanted.session
        if not key:
            return self._least(np.arange(len(fleet)), now)
        count = _HOMES
        if wanted.digest:
            share = self._popularity.add(key, now)
            count = max(count, math.ceil(_SHARES * share * len(fleet)))
        count = min(count, len(fleet))
        slot = self._home(wanted, key, count, now)
        near = self._fits(slot, self._near, now)
        if near:
            return slot
        elsewhere = self._copy_elsewhere(wanted.digest, slot, now)
        if elsewhere is not None:
            return elsewhere
        return slot if self._fits(slot, self._bound, now) else self._next(key, now)

    def _home(self, wanted: Wanted, key: str, count: int, now: float) -> int:
        """Choose the home for this request; a session of the base has one home."""
        homes = self._order(key, count)[:count]
        if not wanted.digest:
            return int(homes[0])
        if wanted.session:
            own = scores(hash_of(wanted.session), self.fleet.seeds[homes])
            slot = int(homes[own.argmax()])
            if self._fits(slot, self._near, now):
                return slot
        return self._least(homes, now, wanted.digest)

    def _least(self, slots: Slots, now: float, digest: str = "") -> int:
        """The least loaded slot, where a copy of the adapter counts as less load."""
        fleet = self.fleet
        recent = fleet.recent[slots] / max(fleet.mean_recent, 1e-300)
        cost = fleet.load[slots] + np.minimum(_MOST_RECENT, recent)
        if digest and (copies := self._copies(digest)):
            has = np.zeros(len(fleet), dtype=bool)
            has[copies] = True
            cost = cost - _LOAD_WORTH * has[slots]
        return int(slots[cost.argmin()])

    def _copies(self, digest: str) -> list[int]:
        found = map(self.fleet.slot, self._holders.of(digest))
        return [slot for slot in found if slot is not None]

    def _copy_elsewhere(self, digest: str, home: int, now: float) -> int | None:
        """The least loaded other replica with the adapter, if it is well below the bound."""
        load, recent = self.fleet.load, self.fleet.recent
        found = [slot for slot in self._copies(digest) if slot != home]
        if not found:
            return None
        slot = min(found, key=lambda each: (float(load[each]), float(recent[each]), each))
        return slot if self._fits(slot, self._near, now) else None

    def _next(self, key: str, now: float) -> int:
        """The first replica in the key's order that is below the bound."""
        fleet = self.fleet
        for slot in self._order(key, _FEW).tolist():
            if self._fits(slot, self._bound, now):
                return int(slot)
        order = self._order(key, len(fleet))
        most, most_recent = self._limits(self._bound, now)
        below = fleet.load[order] <= most  # true for the least loaded one
        both = below & (fleet.recent[order] <= most_recent)
        if both.any():
            return int(order[both.argmax()])
        rest = order[below]
        return int(rest[fleet.recent[rest].argmin()])

    def _fits(self, slot: int, bound: float, now: float) -> bool:
        """Whether a replica's load is at most ``bound`` times the mean."""
        most, most_recent = self._limits(bound, now)
        return bool(self.fleet.load[slot] <= most and self.fleet.recent[slot] <= most_recent)

    def _limits(self, bound: float, now: float) -> tuple[float, float]:
        fleet = self.fleet
        mean = fleet.mean_recent
        free = _RECENT_FREE * fleet.typical(now) * (bound - 1.0) / (BOUND - 1.0)
        return max(self._free, bound * fleet.mean_load), max(bound * mean, mean + free)

    def _order(self, key: str, first: int) -> Slots:
        """At least the first ``first`` replicas of a key's order, or all."""
        if self._version != self.fleet.version:
            self._orders.clear()
            self._version = self.fleet.version
        order = self._orders.get(key)
        enough = min(first, len(self.fleet))
        if order is not None and len(order) >= enough:
            self._orders.move_to_end(key)
            return order
        order = ordered(hash_of(key), self.fleet.seeds, max(_FEW, first))
        if first < len(self.fleet):
            self._orders[key] = order
            if len(self._orders) > _MOST_ORDERS:
                self._orders.popitem(last=False)
        return order
