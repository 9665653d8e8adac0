"""The ledger: every adapter's copies, their share of the budgets, and which may be evicted.

`Residency` decides on changes; the rules and sums that every change must keep are here.
Every operation takes time at most logarithmic in the number of adapters, except checks and
`Ledger.pinned_bytes`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from veneer_registry.errors import AdapterBudgetExceeded

from veneer_server.engine.integrity import in_slices
from veneer_server.engine.residency.eviction import EvictionOrder, ReloadCost
from veneer_server.engine.residency.tiers import TIERS, Drop, LedgerEntry, Presence
from veneer_server.wire.messages import AdapterSource, EvictionCause, MemoryTier

FLAG: Final[dict[MemoryTier, str]] = {
    "device": "device-adapter-bytes",
    "host": "host-cache-bytes",
}

_MOST_REMEMBERED: Final = 8192
"""How many adapters' last requests are remembered, whether they are in memory or not."""


class Ledger:
    """Records copies, leases, holds and pins, and keeps their sums. The module `residency`
    explains holds, pins and `shared`.

    Attributes:
        entries: by weights digest; adapters with a copy, a lease or an operator's want.
        budgets: budget of each tier in bytes, as set; see `budget`.
        parts: number of cards that DEVICE copies are divided among.
        ceilings: bytes that each tier may hold now: its budget, or the bytes it still held when
            the budget was lowered.
        there: digests of the complete copies in each tier.
        leased: entries that waiting or running sequences use.
        draining: entries with the flag `LedgerEntry.draining`.
        loads: number of loads to HOST in progress.
        holds: total number of holds over all entries.
    """

    def __init__(
        self,
        budgets: dict[MemoryTier, int],
        *,
        shared: bool,
        parts: int = 1,
        order: Callable[[MemoryTier], EvictionOrder] = EvictionOrder,
    ) -> None:
        self.budgets = budgets
        self.shared = shared
        self.parts = parts
        self.entries: dict[str, LedgerEntry] = {}
        self.leased: dict[str, LedgerEntry] = {}
        self.draining: dict[str, LedgerEntry] = {}
        self.orders = {tier: order(tier) for tier in TIERS}
        self.cost = ReloadCost()
        self.loads = 0
        self.holds = 0
        self.ceilings = {tier: self.budget(tier) for tier in TIERS}
        self._pinned: dict[str, LedgerEntry] = {}
        self._bytes = dict.fromkeys(TIERS, 0)
        self.there: dict[MemoryTier, set[str]] = {tier: set() for tier in TIERS}
        self._last_requests: OrderedDict[str, int] = OrderedDict()
        self._clock = 0

    # --------------------------------------------------------------------- sums

    def bytes_in(self, tier: MemoryTier) -> int:
        """Bytes in use or reserved in a tier."""
        return self._bytes[tier]

    def count_in(self, tier: MemoryTier) -> int:
        """Number of complete copies in a tier."""
        return len(self.there[tier])

    def budget(self, tier: MemoryTier) -> int:
        """Bytes that a tier may use."""
        if tier == "host" and self.shared:
            return max(self.budgets.values())
        return self.budgets[tier]

    def excess(self, tier: MemoryTier) -> int:
        """Bytes that a tier holds beyond its budget."""
        return max(0, self._bytes[tier] - self.budget(tier))

    def pinned_bytes(
        self, tier: MemoryTier, *, beside: LedgerEntry | None = None, there: bool = False
    ) -> int:
        """Bytes of all adapters that pins keep in a tier, without ``beside``; with ``there``,
        only of those that already take room in it."""
        return sum(
            e.sizes[tier]
            for e in self._pinned.values()
            if e is not beside
            and self.pin_keeps(e, tier)
            and not (there and e.at(tier) is Presence.ABSENT)
        )

    # -------------------------------------------------------------------- rules

    def pin_keeps(self, entry: LedgerEntry, tier: MemoryTier) -> bool:
        """Whether a pin protects the copy in this tier from eviction."""
        if entry.pinned is None:
            return False
        return entry.pinned == tier or (self.shared and tier == "host")

    def check_pin_fits(self, entry: LedgerEntry, tier: MemoryTier) -> None:
        """Raise AdapterBudgetExceeded if the pin does not fit beside other pinned adapters."""
        for kept in TIERS if self.shared and tier == "device" else (tier,):
            others = self.pinned_bytes(kept, beside=entry)
            budget = self.budget(kept)
            size = entry.sizes[kept]
            if others + size > budget:
                raise AdapterBudgetExceeded(
                    f"pinning {entry.source.name} ({size} bytes) would exceed the {kept} "
                    f"budget of {budget} with pinned adapters; unpin another one, or raise "
                    f"the budget (`UpdateBudgets`, or veneer-server --{FLAG[kept]})",
                    metadata={"bytes": str(size), "pinned": str(others), "tier": kept},
                )

    def evictable(self, entry: LedgerEntry, tier: MemoryTier) -> bool:
        """Whether the copy is neither in use nor pinned. Waiting sequences do not count as
        use here."""
        if entry.at(tier) is not Presence.THERE or self.pin_keeps(entry, tier):
            return False
        if tier == "host" and entry.device is Presence.COMING:
            return False
        return entry.holds == 0 or (tier == "host" and not self.shared)

    # ------------------------------------------------------------------ changes

    def find_or_make(self, source: AdapterSource, itemsize: int) -> LedgerEntry:
        """Return the adapter's entry, or a new one that the caller may add to `entries`.

        Raises:
            AdapterBudgetExceeded: the adapter is larger than a budget.
        """
        whole = source.parameters * itemsize
        # A lower bound: some matrices are not divided, see `Residency.loaded`.
        sizes: dict[MemoryTier, int] = {"device": -(-whole // self.parts), "host": whole}
        for tier in TIERS:
            budget, size = self.budget(tier), sizes[tier]
            if size > budget:
                raise AdapterBudgetExceeded(
                    f"adapter {source.name} needs {size} bytes, but the {tier} budget is "
                    f"{budget}: raise it (`UpdateBudgets`, or veneer-server --{FLAG[tier]})",
                    metadata={"bytes": str(size), "budget": str(budget), "tier": tier},
                )
        return self.entries.get(source.weights_digest) or LedgerEntry(source, sizes)

    def request(self, entry: LedgerEntry) -> None:
        """Count a sequence that requests an adapter with an entry in `entries`."""
        before, again = self._last_requests.pop(entry.digest, None), entry.leases > 0
        self.touch(entry)
        for order in self.orders.values():
            order.used(entry, self._clock, before, again=again)
        self._last_requests[entry.digest] = self._clock
        if len(self._last_requests) > _MOST_REMEMBERED:
            self._last_requests.popitem(last=False)
        entry.leases += 1
        self.leased[entry.digest] = entry
        self.sort(entry)

    def expect(self, entry: LedgerEntry, tier: MemoryTier) -> None:
        """Record that an operator wants the adapter in a tier: it needs no trial there."""
        self.orders["host"].expect(entry)
        if tier == "device":
            self.orders["device"].expect(entry)
        self.touch(entry)
        self.sort(entry)

    def rest(self, entry: LedgerEntry) -> None:
        """Record that the adapter's last sequence has ended."""
        del self.leased[entry.digest]
        for order in self.orders.values():
            order.rested(entry)
        self.sort(entry)

    def hold(self, entry: LedgerEntry) -> None:
        """Record that a sequence that uses the adapter is scheduled."""
        entry.holds += 1
        self.holds += 1
        self.touch(entry)

    def unhold(self, entry: LedgerEntry) -> None:
        """Record that a sequence that used the adapter is no longer scheduled."""
        assert entry.holds > 0, "hold released twice"
        entry.holds -= 1
        self.holds -= 1

    def touch(self, entry: LedgerEntry) -> None:
        self._clock += 1
        entry.used = self._clock

    def pin(self, entry: LedgerEntry, tier: MemoryTier | None) -> None:
        """Set an operator's pin, or remove it if None."""
        entry.pinned = tier
        if tier is None:
            self._pinned.pop(entry.digest, None)
        else:
            self._pinned[entry.digest] = entry
        self.sort(entry)

    def drain(self, entry: LedgerEntry, *, draining: bool) -> None:
        """Set or remove the entry's flag ``draining``."""
        entry.draining = draining
        if draining:
            self.draining[entry.digest] = entry
        else:
            self.draining.pop(entry.digest, None)

    def place(self, entry: LedgerEntry, tier: MemoryTier, presence: Presence) -> None:
        """Record that a copy is now on its way, complete, or gone."""
        before = entry.at(tier)
        here = presence is not Presence.ABSENT
        self._bytes[tier] += entry.sizes[tier] * (here - (before is not Presence.ABSENT))
        if presence is Presence.THERE:
            self.there[tier].add(entry.digest)
        else:
            self.there[tier].discard(entry.digest)
        if tier == "host":
            self.loads += (presence is Presence.COMING) - (before is Presence.COMING)
            entry.host = presence
        else:
            entry.device = presence
            entry.leaving = entry.leaving and here
        if here and before is Presence.ABSENT:
            self.orders[tier].came(entry, self._clock)
        elif not here and before is not Presence.ABSENT:
            self.orders[tier].went(entry)
        self.sort(entry)

    def drop(self, entry: LedgerEntry, tier: MemoryTier, cause: EvictionCause) -> list[Drop]:
        """Free a copy now; with shared memory, a HOST copy takes the DEVICE copy with it."""
        assert tier == "host" or entry.holds == 0, "a held adapter was evicted"
        both = self.shared and tier == "host" and entry.device is Presence.THERE
        gone: list[MemoryTier] = ["device", "host"] if both else [tier]
        drops = [Drop(entry.digest, each, cause) for each in gone]
        for drop in drops:
            self.place(entry, drop.tier, Presence.ABSENT)
        self.forget_if_idle(entry)
        return drops

    def forget_if_idle(self, entry: LedgerEntry) -> None:
        idle = entry.host is Presence.ABSENT and entry.device is Presence.ABSENT
        if idle and not entry.leases and entry.wanted is None:
            self.entries.pop(entry.digest, None)
            self._pinned.pop(entry.digest, None)
            self.draining.pop(entry.digest, None)

    def sort(self, entry: LedgerEntry) -> None:
        """Offer the entry's idle copies for eviction, and withdraw its other copies."""
        for tier, order in self.orders.items():
            if self._idle(entry, tier):
                order.offer(entry, self.cost.of_losing(entry, tier, shared=self.shared))
            else:
                order.withdraw(entry)

    def lower_ceilings(self) -> None:
        """Let no tier grow past its budget or, if that is more, past the bytes it holds now."""
        for tier in TIERS:
            self.ceilings[tier] = max(self.budget(tier), self._bytes[tier])

    def _idle(self, entry: LedgerEntry, tier: MemoryTier) -> bool:
        return not entry.leases and self.evictable(entry, tier)

    # ------------------------------------------------------------------- checks

    def check_unused(self) -> None:
        """Assert that nothing is leased or held; call when there is no sequence. O(1)."""
        assert not self.leased, "a lease without a sequence"
        assert not self.holds, "a hold without a sequence"

    def integrity(self, held: Iterable[str], leased: Iterable[str]) -> Iterator[None]:
        """Check that holds and leases match the sequences that claim them, and that sums are
        right and within the ceilings. Runs in slices, see the module `integrity`."""
        holds, leases = Counter(held), Counter(leased)
        assert self.holds == holds.total(), "holds differ"
        found = {tier: _Found() for tier in TIERS}
        leasing = pinned = drains = loads = 0
        for part in in_slices(self.entries.values()):
            for entry in part:
                digest = entry.digest
                assert self.entries.get(digest) is entry, f"{digest[:12]} is filed wrongly"
                assert entry.holds == holds.pop(digest, 0), f"holds of {digest[:12]} differ"
                assert entry.leases == leases.pop(digest, 0), f"leases of {digest[:12]} differ"
                if self.shared and entry.device is not Presence.ABSENT:
                    assert entry.host is Presence.THERE, f"{digest[:12]} is in DEVICE only"
                assert (self.leased.get(digest) is entry) == (entry.leases > 0), "leased differ"
                pin = self._pinned.get(digest) is entry
                assert pin == (entry.pinned is not None), "pinned ones differ"
                draining = self.draining.get(digest) is entry
                assert draining == entry.draining, "draining ones differ"
                leasing += entry.leases > 0
                pinned += pin
                drains += draining
                loads += entry.host is Presence.COMING
                for tier in TIERS:
                    complete = entry.at(tier) is Presence.THERE
                    assert (digest in self.there[tier]) == complete, (
                        f"adapters in {tier} differ"
                    )
                    idle = self._idle(entry, tier)
                    found[tier].count(entry, tier, idle=idle)
                    self.orders[tier].check_entry(entry, idle=idle)
            yield
        assert not holds, "a hold on an unknown adapter"
        assert not leases, "a lease on an unknown adapter"
        assert len(self.leased) == leasing, "leased ones differ"
        assert len(self._pinned) == pinned, "pinned ones differ"
        assert len(self.draining) == drains, "draining ones differ"
        assert self.loads == loads, "loads differ"
        for tier, sums in found.items():
            assert self._bytes[tier] == sums.bytes, f"bytes in {tier} differ"
            assert len(self.there[tier]) == sums.there, f"adapters in {tier} differ"
            assert self._bytes[tier] <= self.ceilings[tier], f"past the {tier} budget"
            yield from self.orders[tier].integrity(sums.here, sums.idle, sums.idle_bytes)


@dataclass(slots=True)
class _Found:
    """Sums over the entries of one tier.

    Attributes:
        here, bytes: number and bytes of copies that take room.
        there: number of complete copies.
        idle, idle_bytes: number and bytes of copies that may be evicted.
    """

    here: int = 0
    bytes: int = 0
    there: int = 0
    idle: int = 0
    idle_bytes: int = 0

    def count(self, entry: LedgerEntry, tier: MemoryTier, *, idle: bool) -> None:
        if (presence := entry.at(tier)) is not Presence.ABSENT:
            self.here += 1
            self.bytes += entry.sizes[tier]
            self.there += presence is Presence.THERE
        if idle:
            self.idle += 1
            self.idle_bytes += entry.sizes[tier]
