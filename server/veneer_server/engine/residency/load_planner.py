"""Plans which adapters to load for waiting sequences and operators, and what to evict for them.

A *want* is an adapter that a waiting sequence or an operator needs in memory. Wants are served
in the order given (operators' first, then waiting sequences' in order of arrival). To make
room, copies are dropped in this order, until there is enough:

1. idle copies, in the order of `eviction`;
2. HOST copies of adapters that run from a separate DEVICE copy;
3. copies that later wants need: first those of wants that are not planned yet, since there are
   too many older ones; then those of planned wants from the last one backwards, since the last
   one is needed last.

A copy that an earlier want needs is never dropped for a later one, so two adapters cannot
evict each other forever, and a loaded adapter serves the sequences it was loaded for. After
the first want that finds no room (it is *blocked*), later ones may only use free DEVICE
memory. Once it has been blocked for too long (`Admission` decides), they get no DEVICE
memory at all and, if HOST is what the blocked want lacks, no HOST memory either.

Wants past the first `Wants.near` belong to sequences that cannot start soon. These, and
wants after one that lacks DEVICE memory, are prefetched into HOST: into free room, or
in place of idle copies, up to the fraction `AHEAD` of HOST. Few loads run at once, so that a
worker that becomes free always takes the oldest want.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice
from typing import Final

from veneer_server.engine.residency.eviction import Key
from veneer_server.engine.residency.ledger import Ledger
from veneer_server.engine.residency.tiers import (
    TIERS,
    Action,
    Drop,
    LedgerEntry,
    Load,
    MoveToDevice,
    Presence,
    ResidencyPlan,
)
from veneer_server.wire.messages import MemoryTier

AHEAD: Final = 0.5
"""Largest fraction of HOST that prefetches may fill by evicting idle copies."""


@dataclass(frozen=True, slots=True)
class Wants:
    """Adapters to load, without duplicates.

    Attributes:
        operators: adapters of pending activations, oldest first.
        waiting: adapters of waiting sequences, oldest first.
        near: how many of `waiting` may be in use at the same time.
        overdue: the want that was `ResidencyPlan.blocked` for too long, if any.
        loads: most loads in progress at once.
    """

    operators: tuple[LedgerEntry, ...]
    waiting: tuple[LedgerEntry, ...]
    near: int
    overdue: str | None
    loads: int


class LoadPlanner:
    """Makes one `ResidencyPlan`, and is then discarded."""

    def __init__(self, ledger: Ledger, wants: Wants) -> None:
        self._ledger = ledger
        self._wants = wants
        self._queue = list(dict.fromkeys(chain(wants.operators, wants.waiting)))
        self._near = len({*wants.operators, *wants.waiting[: wants.near]})
        self._largest = tuple((tier, ledger.budget(tier)) for tier in TIERS)
        self._protected: set[LedgerEntry] = set()
        self._in_demand: dict[MemoryTier, list[tuple[int, LedgerEntry]]] = {}
        """Copies that sequences need: (index of their want, entry), best victim last."""
        self._actions: list[Action] = []
        self._blocked: str | None = None
        self._impossible: list[str] = []
        self._left: dict[MemoryTier, int] | None = None
        """Free bytes of each tier that wants may still fill; None while they may also evict."""
        self._may_read_ahead = 0
        """Bytes of HOST that later wants may still fill by evicting idle copies."""
        self._for_operators = 0
        """Number of loads to HOST that operators wait for."""

    def plan(self) -> ResidencyPlan:
        for index, entry in enumerate(self._queue):
            if index == self._near and self._left is None:
                self._fill_up_from(index)
            target = _next_tier(entry)
            if target is None:
                if entry.host is Presence.COMING and index < len(self._wants.operators):
                    self._for_operators += 1
            elif self._too_large(entry):
                self._impossible.append(entry.digest)
            elif self._may_begin(index, target):
                if self._left is None:
                    self._serve(index, entry, target)
                else:
                    self._serve_ahead(entry, target, self._left)
            self._protected.add(entry)
        return ResidencyPlan(tuple(self._actions), self._blocked, tuple(self._impossible))

    def _too_large(self, entry: LedgerEntry) -> bool:
        """Whether the adapter no longer fits: budgets may have been lowered."""
        return any(entry.sizes[tier] > most for tier, most in self._largest)

    # -------------------------------------------------------------------- one want

    def _serve(self, index: int, entry: LedgerEntry, target: MemoryTier) -> None:
        ledger = self._ledger
        missing = ledger.bytes_in(target) + entry.sizes[target] - ledger.budget(target)
        if self._make_room(target, missing, entry, index):
            self._bring(entry, target)
            return
        pinned = ledger.pinned_bytes(target, beside=entry, there=True)
        if pinned + entry.sizes[target] > ledger.budget(target):
            self._impossible.append(entry.digest)
            return
        self._blocked = entry.digest
        left = self._fill_up_from(index + 1)
        if target == "host":
            self._may_read_ahead = 0
        if entry.digest == self._wants.overdue:
            # An adapter in DEVICE occupies room in both tiers for as long as its sequences
            # run; one that stays in HOST takes none from DEVICE.
            left["device"] = 0
            if target == "host":
                left["host"] = 0

    def _serve_ahead(
        self, entry: LedgerEntry, target: MemoryTier, left: dict[MemoryTier, int]
    ) -> None:
        size = entry.sizes[target]
        if size > left[target]:
            if target == "device" or size > self._may_read_ahead:
                return
            before = self._ledger.bytes_in("host")
            if not self._make_room("host", size - left["host"], entry, None):
                return
            left["host"] += before - self._ledger.bytes_in("host")
        if target == "host":
            self._may_read_ahead -= size
        left[target] -= size
        self._bring(entry, target)

    def _fill_up_from(self, index: int) -> dict[MemoryTier, int]:
        """From want ``index`` on, only fill free DEVICE memory and prefetch into HOST."""
        ledger = self._ledger
        self._left = {tier: ledger.budget(tier) - ledger.bytes_in(tier) for tier in TIERS}
        ahead = sum(
            e.sizes["host"]
            for e in islice(self._queue, index, None)
            if e.host is not Presence.ABSENT and e.device is Presence.ABSENT
        )
        if not ledger.excess("host"):
            self._may_read_ahead = int(AHEAD * ledger.budget("host")) - ahead
        return self._left

    def _bring(self, entry: LedgerEntry, target: MemoryTier) -> None:
        self._ledger.place(entry, target, Presence.COMING)
        if target == "host":
            self._actions.append(Load(entry.source))
        else:
            self._actions.append(MoveToDevice(entry.digest))

    def _may_begin(self, index: int, target: MemoryTier) -> bool:
        """Whether another load may start; operators leave half of the loads to requests."""
        if target == "device":
            return True
        if index < len(self._wants.operators):
            most = self._wants.loads
            if self._wants.waiting:
                most = max(1, most // 2)
            if self._for_operators >= most:
                return False
            self._for_operators += 1
        return self._ledger.loads < self._wants.loads

    # ------------------------------------------------------------------------ room

    def _make_room(
        self, tier: MemoryTier, missing: int, entry: LedgerEntry, index: int | None
    ) -> bool:
        """Free ``missing`` bytes of a tier; free nothing and return False if that cannot be.

        Args:
            index: index of the want; None evicts idle copies only.
        """
        if missing <= 0:
            return True
        order = self._ledger.orders[tier]
        if index is None and order.idle_bytes < missing:
            return False
        used: list[tuple[int, LedgerEntry]] = []
        if order.idle_bytes < missing:
            used = self._take_in_demand(tier, missing - order.idle_bytes, index or 0)
            if order.idle_bytes + sum(e.sizes[tier] for _, e in used) < missing:
                self._in_demand[tier] += reversed(used)
                return False
        idle: list[tuple[Key, LedgerEntry]] = []
        spared: list[tuple[Key, LedgerEntry]] = []
        missing -= sum(e.sizes[tier] for _, e in used)
        while missing > 0 and (taken := order.take()) is not None:
            keep = taken[1] is entry or taken[1] in self._protected
            (spared if keep else idle).append(taken)
            missing -= 0 if keep else taken[1].sizes[tier]
        for each in spared if missing <= 0 else [*spared, *idle]:
            order.put_back(each)
        if missing > 0:
            if used:
                self._in_demand[tier] += reversed(used)
            return False
        for each in idle:
            order.evicted(each)
        for victim in [*(e for _, e in idle), *(e for _, e in used)]:
            self._actions += self._ledger.drop(victim, tier, "capacity")
        return True

    def _take_in_demand(
        self, tier: MemoryTier, missing: int, index: int
    ) -> list[tuple[int, LedgerEntry]]:
        """Take copies that sequences need but want ``index`` may evict, best victim first:
        ``missing`` bytes, or all there are."""
        if tier not in self._in_demand:
            self._in_demand[tier] = self._find_in_demand(tier)
        found, taken = self._in_demand[tier], []
        while missing > 0 and found and found[-1][0] > index:
            place, entry = found.pop()
            if self._ledger.evictable(entry, tier):
                taken.append((place, entry))
                missing -= entry.sizes[tier]
        return taken

    def _find_in_demand(self, tier: MemoryTier) -> list[tuple[int, LedgerEntry]]:
        ledger, queue = self._ledger, self._queue
        found = [(i, e) for i, e in enumerate(queue) if e.leases and ledger.evictable(e, tier)]
        planned = {entry.digest for entry in queue}
        leased = ledger.leased.keys()
        # later: wants that are not planned yet, since too many are older.
        # running: adapters that run from their DEVICE copy.
        later: list[tuple[int, LedgerEntry]] = []
        running: list[tuple[int, LedgerEntry]] = []
        for digest in sorted((leased & ledger.there[tier]) - planned):
            entry = ledger.leased[digest]
            if ledger.evictable(entry, tier):
                (running if entry.holds else later).append((len(queue), entry))
        return [*found, *later, *running]


def _next_tier(entry: LedgerEntry) -> MemoryTier | None:
    """Return the tier to load a wanted adapter into now; None if it is there or on its way."""
    if entry.host is Presence.COMING or entry.device is Presence.COMING:
        return None
    if entry.host is Presence.ABSENT:
        # A pin to HOST needs a HOST copy even if DEVICE has one, which may be evicted.
        wanted = entry.device is Presence.ABSENT or entry.wanted == "host"
        return "host" if wanted else None
    if entry.device is Presence.THERE:
        return None
    only_host = entry.wanted == "host" and not entry.leases
    return None if only_host else "device"


def shrink(ledger: Ledger, waiting: tuple[LedgerEntry, ...]) -> list[Drop]:
    """Drop unused copies beyond the budgets, and mark copies in use that must leave later.

    Args:
        waiting: wants of waiting sequences, oldest first; the last one's copy is dropped first.
    """
    drops: list[Drop] = []
    queue = set(waiting)
    running = [e for e in ledger.leased.values() if e not in queue]
    for tier in TIERS:
        order = ledger.orders[tier]
        while ledger.excess(tier) and (idle := order.take()) is not None:
            drops += ledger.drop(idle[1], tier, "budget")
        for entry in [*running, *reversed(waiting)]:
            if ledger.excess(tier) and ledger.evictable(entry, tier):
                drops += ledger.drop(entry, tier, "budget")
    ledger.lower_ceilings()
    _mark_leaving(ledger)
    return drops


def _mark_leaving(ledger: Ledger) -> None:
    """Mark enough running adapters to leave, when their holds end, to meet the budgets: first
    those that are too large, then those worth least."""
    everyone = ledger.entries.values()
    coming = [e.sizes for e in everyone if Presence.COMING in (e.host, e.device)]
    # Adapters on their way do not count: they can be evicted when they arrive.
    excess = {tier: ledger.excess(tier) - sum(s[tier] for s in coming) for tier in TIERS}
    order = ledger.orders["device"]

    def rank(entry: LedgerEntry) -> tuple[bool, bool, Key]:
        fits = all(entry.sizes[tier] <= ledger.budget(tier) for tier in TIERS)
        cost = ledger.cost.of_losing(entry, "device", shared=ledger.shared)
        return fits, not entry.leaving, order.key(entry, cost)

    held = [e for e in everyone if e.holds and not ledger.pin_keeps(e, "device")]
    held.sort(key=rank)
    for entry in everyone:
        entry.leaving = False
    for entry in held:
        tiers: list[MemoryTier] = ["device"]
        if ledger.shared and not ledger.pin_keeps(entry, "host"):
            tiers.append("host")
        entry.leaving = any(excess[tier] > 0 for tier in tiers)
        for tier in tiers:
            excess[tier] -= entry.sizes[tier]
