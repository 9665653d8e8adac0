"""Whose loss costs least: the order of eviction in one memory tier. Decisions only.

GreedyDual-Size-Frequency (Cherkasova 1998, after Cao and Irani 1997): a copy's rank is

    age of the tier at its last use + uses x seconds to bring it back / bytes

and the lowest rank goes first. The age is the rank of what went last, so what was used
long ago is overtaken by what is used now, however often it was used then.

A newcomer is on trial, with no uses, as in LIRS (Jiang and Zhang 2002): it goes before
all others, the newest first, until a request for it is the second after the last use of
some other copy in the tier. So adapters that come round once, in a scan or a loop
longer than the tier, pass through the room of one and leave the rest in place, where LRU
would evict each just before it is needed.

A request that waits for a copy is not known here: `planner` keeps what it wants.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from veneer_server.engine.integrity import in_slices
from veneer_server.engine.residency.tiers import LedgerEntry, MemoryTier, Presence

__all__ = ["EvictionOrder", "Key", "ReloadCost"]

Key = tuple[float, float, int]

_MOST_USES: Final = 8
"""More count as so many: what was popular once must not stay for as long again."""
_SMOOTHING: Final = 0.2
"""Weight of the newest measurement."""
_GUESS: Final[dict[MemoryTier, float]] = {"host": 2.5e-9, "device": 1e-10}
"""Seconds a byte before the first measurement: 400 MB/s from disk, 10 GB/s to DEVICE."""
_SLACK: Final = 64
"""Outdated items that the heap may hold beside twice the valid ones."""


class ReloadCost:
    """Seconds a byte to bring a copy to a tier from the one below, as measured.

    Averages are kept by size class (powers of two), since a small adapter takes longer a
    byte: files are opened and headers read whatever their size.
    """

    def __init__(self) -> None:
        self._by_class: dict[tuple[MemoryTier, int], float] = {}
        self._overall = dict(_GUESS)

    def observe(self, tier: MemoryTier, count: int, seconds: float) -> None:
        """A transfer of ``count`` bytes to a tier has taken ``seconds``."""
        if count <= 0 or seconds <= 0:
            return
        each, key = seconds / count, (tier, count.bit_length())
        before = self._by_class.get(key, each)
        self._by_class[key] = before + _SMOOTHING * (each - before)
        self._overall[tier] += _SMOOTHING * (each - self._overall[tier])

    def per_byte(self, tier: MemoryTier, count: int) -> float:
        """Seconds a byte for a transfer of ``count`` bytes to a tier."""
        return self._by_class.get((tier, count.bit_length()), self._overall[tier])

    def of_losing(self, entry: LedgerEntry, tier: MemoryTier, *, shared: bool) -> float:
        """Seconds a byte to have back what goes with the copy in ``tier``."""
        cost = self.per_byte(tier, entry.bytes)
        if tier == "device" and entry.host is not Presence.THERE:
            return cost + self.per_byte("host", entry.bytes)
        if tier == "host" and shared and entry.device is Presence.THERE:
            return cost + self.per_byte("device", entry.bytes)
        return cost


class EvictionOrder:
    """The copies of one tier: when they were used, and which may go.

    Attributes:
        age: see the module.
        idle_bytes: of all copies that were offered and not withdrawn or taken.
    """

    def __init__(self, tier: MemoryTier) -> None:
        self.tier: MemoryTier = tier
        self.age = 0.0
        self.idle_bytes = 0
        self._last_uses: OrderedDict[str, int] = OrderedDict()
        """Of copies here, the least recently used first."""
        self._offered: dict[str, tuple[Key, LedgerEntry]] = {}
        self._heap: list[tuple[Key, str]] = []
        """Also holds keys that have changed since; `_offered` has the valid ones."""

    # -------------------------------------------------------------- what happens

    def used(self, entry: LedgerEntry, now: int, before: int | None, *, again: bool) -> None:
        """A request asks for an adapter, whether it has a copy here or not.

        Args:
            now: logical time.
            before: of the request before, if remembered.
            again: others that asked before are not served yet.
        """
        standing = entry.standing[self.tier]
        here = entry.digest in self._last_uses
        if again and entry.at(self.tier) is not Presence.THERE:
            return  # they share one load: it would have been one use with the copy there
        others = (use for digest, use in self._last_uses.items() if digest != entry.digest)
        oldest = next(others, None)
        near = before is not None and (oldest is None or before > oldest)
        if standing.uses or near:
            standing.uses = min(_MOST_USES, standing.uses + 1) if here else 1
        if here:
            self._last_uses[entry.digest] = now
            self._last_uses.move_to_end(entry.digest)

    def expect(self, entry: LedgerEntry) -> None:
        """An operator wants it here: it need not prove itself."""
        standing = entry.standing[self.tier]
        standing.uses = max(1, standing.uses)

    def came(self, entry: LedgerEntry, now: int) -> None:
        """A copy is here, or has its room."""
        self._last_uses[entry.digest] = now
        self._last_uses.move_to_end(entry.digest)
        entry.standing[self.tier].age = self.age

    def went(self, entry: LedgerEntry) -> None:
        """Its copy is here no more."""
        self.withdraw(entry)
        del self._last_uses[entry.digest]
        entry.standing[self.tier].uses = 0

    def rested(self, entry: LedgerEntry) -> None:
        """Its last request has ended."""
        entry.standing[self.tier].age = self.age

    # --------------------------------------------------------------- what may go

    def offer(self, entry: LedgerEntry, cost: float) -> None:
        """It may go; ``cost``: seconds a byte to have it back. Harmless to repeat."""
        self._put(entry, self.key(entry, cost))

    def withdraw(self, entry: LedgerEntry) -> None:
        """It may not go now. Harmless to repeat."""
        if self._offered.pop(entry.digest, None) is not None:
            self.idle_bytes -= entry.bytes

    def take(self) -> tuple[Key, LedgerEntry] | None:
        """The offered copy whose loss costs least, offered no more; None if there is none."""
        while self._heap:
            key, digest = heapq.heappop(self._heap)
            offered = self._offered.get(digest)
            if offered is not None and offered[0] == key:
                del self._offered[digest]
                self.idle_bytes -= offered[1].bytes
                return offered
        return None

    def put_back(self, taken: tuple[Key, LedgerEntry]) -> None:
        """What was taken stays after all."""
        key, entry = taken
        self._put(entry, key)

    def evicted(self, taken: tuple[Key, LedgerEntry]) -> None:
        """What was taken goes, for another: the tier ages."""
        self.age = max(self.age, taken[0][0])

    @property
    def notes(self) -> int:
        """Items of the heap, outdated ones too."""
        return len(self._heap)

    def key(self, entry: LedgerEntry, cost: float) -> Key:
        """The lowest goes first."""
        standing = entry.standing[self.tier]
        if not standing.uses:
            return standing.age, cost, -entry.used
        return standing.age + standing.uses * cost, 0.0, entry.used

    def _put(self, entry: LedgerEntry, key: Key) -> None:
        offered = self._offered.get(entry.digest)
        if offered is not None and offered[0] == key:
            return
        if offered is None:
            self.idle_bytes += entry.bytes
        self._offered[entry.digest] = key, entry
        heapq.heappush(self._heap, (key, entry.digest))
        if len(self._heap) > 2 * len(self._offered) + _SLACK:
            self._heap = [(key, digest) for digest, (key, _) in self._offered.items()]
            heapq.heapify(self._heap)

    def check_entry(self, entry: LedgerEntry, *, idle: bool) -> None:
        """This tier's lists have the entry where they must and nowhere else."""
        here = entry.at(self.tier) is not Presence.ABSENT
        digest = entry.digest
        assert (digest in self._last_uses) == here, f"uses of copies in {self.tier} differ"
        assert (digest in self._offered) == idle, f"what may leave {self.tier} differs"

    def integrity(self, here: int, idle: int, idle_bytes: int) -> Iterator[None]:
        """After `check_entry` of all: so many copies are here, so many of them may go, and
        nothing else is known. In slices, see `integrity.in_slices`."""
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
