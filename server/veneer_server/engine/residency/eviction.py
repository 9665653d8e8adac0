"""Eviction order of one memory tier: the copy that costs least to lose goes first.

This module only decides; it moves and frees nothing. The policy is GreedyDual-Size-Frequency
(Cherkasova 1998, after Cao and Irani 1997): a copy's rank is

    age of the tier at its last use + uses x seconds to reload it / bytes

and the lowest rank is evicted first. The tier's age is the rank of the last copy evicted,
so copies used now overtake those used long ago, however often they were used then.

A new copy is on trial, with no uses, as in LIRS (Jiang and Zhang 2002): it is evicted
before all others, the newest first, until two requests for it have arrived since the last use
of some other copy in the tier. So adapters that are used once, in a scan or a loop longer
than the tier, take turns in the room of one adapter and leave the rest in place, where LRU
would evict each just before it is needed.

This module does not know the requests that wait for a copy: `load_planner` keeps the copies
that they want.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from veneer_server.engine.integrity import in_slices
from veneer_server.engine.residency.tiers import LedgerEntry, Presence
from veneer_server.wire.messages import MemoryTier

Key = tuple[float, float, int]

_MOST_USES: Final = 8
"""Cap on counted uses, so that a once popular copy does not stay for long afterwards."""
_SMOOTHING: Final = 0.2
"""Weight of the newest measurement."""
_GUESS: Final[dict[MemoryTier, float]] = {"host": 2.5e-9, "device": 1e-10}
"""Seconds per byte before the first measurement: 400 MB/s from disk, 10 GB/s to DEVICE."""
_SLACK: Final = 64
"""Items that the heap may hold beyond twice the number of valid ones."""


class ReloadCost:
    """Measured seconds per byte to copy an adapter into a tier from the one below.

    Averages are kept by size class (powers of two), since a small adapter takes longer per
    byte: opening files and reading headers takes the same time for any size.
    """

    def __init__(self) -> None:
        self._by_class: dict[tuple[MemoryTier, int], float] = {}
        self._overall = dict(_GUESS)

    def observe(self, tier: MemoryTier, count: int, seconds: float) -> None:
        """Record that a transfer of ``count`` bytes to a tier has taken ``seconds``."""
        if count <= 0 or seconds <= 0:
            return
        each, key = seconds / count, (tier, count.bit_length())
        before = self._by_class.get(key, each)
        self._by_class[key] = before + _SMOOTHING * (each - before)
        self._overall[tier] += _SMOOTHING * (each - self._overall[tier])

    def per_byte(self, tier: MemoryTier, count: int) -> float:
        """Seconds per byte for a transfer of ``count`` bytes to a tier."""
        return self._by_class.get((tier, count.bit_length()), self._overall[tier])

    def of_losing(self, entry: LedgerEntry, tier: MemoryTier, *, shared: bool) -> float:
        """Seconds per byte to restore what is lost if the copy in ``tier`` is evicted."""
        cost = self.per_byte(tier, entry.sizes[tier])
        if tier == "device" and entry.host is not Presence.THERE:
            return cost + self.per_byte("host", entry.sizes["host"])
        if tier == "host" and shared and entry.device is Presence.THERE:
            return cost + self.per_byte("device", entry.sizes["device"])
        return cost


class EvictionOrder:
    """The copies of one tier: when they were used, and which may be evicted.

    Attributes:
        age: the tier's age, see the module docstring.
        idle_bytes: total bytes of the copies on offer, neither withdrawn nor taken since.
    """

    def __init__(self, tier: MemoryTier) -> None:
        self.tier: MemoryTier = tier
        self.age = 0.0
        self.idle_bytes = 0
        self._last_uses: OrderedDict[str, int] = OrderedDict()
        """Time of the last use of each copy in this tier, least recently used first."""
        self._offered: dict[str, tuple[Key, LedgerEntry]] = {}
        self._heap: list[tuple[Key, str]] = []
        """May also hold outdated keys; `_offered` has the valid ones."""

    # -------------------------------------------------------------- what happens

    def used(self, entry: LedgerEntry, now: int, before: int | None, *, again: bool) -> None:
        """Count a request for an adapter, whether or not it has a copy here.

        Args:
            now: logical time.
            before: logical time of the previous request for it, if remembered.
            again: whether earlier requests for it have not ended yet.
        """
        standing = entry.standing[self.tier]
        here = entry.digest in self._last_uses
        if again and entry.at(self.tier) is not Presence.THERE:
            return  # the requests share one load, so they count as one use
        others = (use for digest, use in self._last_uses.items() if digest != entry.digest)
        oldest = next(others, None)
        near = before is not None and (oldest is None or before > oldest)
        if standing.uses or near:
            standing.uses = min(_MOST_USES, standing.uses + 1) if here else 1
        if here:
            self._last_uses[entry.digest] = now
            self._last_uses.move_to_end(entry.digest)

    def expect(self, entry: LedgerEntry) -> None:
        """Record that an operator wants the adapter here: it needs no trial."""
        standing = entry.standing[self.tier]
        standing.uses = max(1, standing.uses)

    def came(self, entry: LedgerEntry, now: int) -> None:
        """Record that a copy is here, or that its room is reserved."""
        self._last_uses[entry.digest] = now
        self._last_uses.move_to_end(entry.digest)
        entry.standing[self.tier].age = self.age

    def went(self, entry: LedgerEntry) -> None:
        """Record that the copy is no longer here."""
        self.withdraw(entry)
        del self._last_uses[entry.digest]
        entry.standing[self.tier].uses = 0

    def rested(self, entry: LedgerEntry) -> None:
        """Record that the adapter's last request has ended."""
        entry.standing[self.tier].age = self.age

    # --------------------------------------------------------------- what may go

    def offer(self, entry: LedgerEntry, cost: float) -> None:
        """Offer a copy for eviction. Idempotent.

        Args:
            cost: seconds per byte to reload it.
        """
        self._put(entry, self.key(entry, cost))

    def withdraw(self, entry: LedgerEntry) -> None:
        """Withdraw the offer: the copy must not be evicted now. Idempotent."""
        if self._offered.pop(entry.digest, None) is not None:
            self.idle_bytes -= entry.sizes[self.tier]

    def take(self) -> tuple[Key, LedgerEntry] | None:
        """Remove and return the offered copy that costs least to lose, or None."""
        while self._heap:
            key, digest = heapq.heappop(self._heap)
            offered = self._offered.get(digest)
            if offered is not None and offered[0] == key:
                del self._offered[digest]
                self.idle_bytes -= offered[1].sizes[self.tier]
                return offered
        return None

    def put_back(self, taken: tuple[Key, LedgerEntry]) -> None:
        """Offer a taken copy again, because it was not evicted after all."""
        key, entry = taken
        self._put(entry, key)

    def evicted(self, taken: tuple[Key, LedgerEntry]) -> None:
        """Record that a taken copy is evicted to make room for another, which ages the tier."""
        self.age = max(self.age, taken[0][0])

    @property
    def notes(self) -> int:
        """Number of heap items, including outdated ones."""
        return len(self._heap)

    def key(self, entry: LedgerEntry, cost: float) -> Key:
        """Sort key of a copy: the one with the lowest key is evicted first."""
        standing = entry.standing[self.tier]
        if not standing.uses:
            return standing.age, cost, -entry.used
        return standing.age + standing.uses * cost, 0.0, entry.used

    def _put(self, entry: LedgerEntry, key: Key) -> None:
        offered = self._offered.get(entry.digest)
        if offered is not None and offered[0] == key:
            return
        if offered is None:
            self.idle_bytes += entry.sizes[self.tier]
        self._offered[entry.digest] = key, entry
        heapq.heappush(self._heap, (key, entry.digest))
        if len(self._heap) > 2 * len(self._offered) + _SLACK:
            self._heap = [(key, digest) for digest, (key, _) in self._offered.items()]
            heapq.heapify(self._heap)

    def check_entry(self, entry: LedgerEntry, *, idle: bool) -> None:
        """Assert that exactly the lists of this tier that should hold the entry do."""
        here = entry.at(self.tier) is not Presence.ABSENT
        digest = entry.digest
        assert (digest in self._last_uses) == here, f"uses of copies in {self.tier} differ"
        assert (digest in self._offered) == idle, f"what may leave {self.tier} differs"

    def integrity(self, here: int, idle: int, idle_bytes: int) -> Iterator[None]:
        """Check that the totals match, so that nothing else is listed. Call after `check_entry`
        of every entry. Runs in slices, see the module `integrity`."""
        assert len(self._last_uses) == here, f"uses of copies in {self.tier} differ"
        assert len(self._offered) == idle, f"what may leave {self.tier} differs"
        assert self.idle_bytes == idle_bytes, f"bytes that may leave {self.tier} differ"
        valid = set()
        for part in in_slices(self._heap):
            for key, digest in part:
                if self._offered.get(digest, (0,))[0] == key:
                    valid.add(digest)
            yield
        assert len(valid) == idle, f"what may leave {self.tier} cannot be found"
