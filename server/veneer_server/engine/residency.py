"""Which adapters are in which tier: decisions only, no torch, no I/O.

The step loop tells this class what happened and carries out the `Action`s it
returns. Three kinds of grip on an adapter are kept apart:

* a *lease* counts sequences submitted and not finished: its identity is in use;
* a *hold* counts scheduled sequences: its DEVICE copy is in use right now and is
  never evicted;
* a *pin* is an operator's flag for one tier: the copy there is never evicted for
  capacity. A pin to HOST says nothing of DEVICE, nor one to DEVICE of HOST.

So room is made in DEVICE by dropping copies that are neither held nor pinned there,
and in HOST by dropping copies that are not pinned there and that no move reads.

Where the tiers share memory (a CPU), a DEVICE copy is its HOST copy, and dropping
either alone frees nothing. There DEVICE stays a part of HOST: whatever keeps the DEVICE
copy keeps that in HOST, and room in HOST is made by dropping both. HOST then counts
each byte that is really held, once, and may take the larger of the two budgets, which
is what the memory plan counts.

Wants are served in the order given (the arrival order of waiting sequences):
what an earlier want needs is never evicted for a later one, so two adapters
cannot push each other out for ever. Behind a want that finds no room nothing is
evicted, but what is free may be taken; once it has waited too long (`Admission` says
when), only where it is not what that one lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from veneer_registry.errors import AdapterBudgetExceeded, AdapterInUse, AdapterPinned

from veneer_server.engine.messages import AdapterSource, TierName
from veneer_server.engine.tiers import (
    TIERS,
    Action,
    Cause,
    Drop,
    Entry,
    Load,
    MemoryTier,
    MoveToDevice,
    Plan,
    Presence,
)

__all__ = ["Residency"]


@dataclass(slots=True)
class Residency:
    """The state machine.

    Attributes:
        itemsize: bytes of one resident number.
        shared: the DEVICE copy is the HOST copy (on a CPU); see the module.
    """

    host_budget: int
    device_budget: int
    itemsize: int
    shared: bool = False
    _entries: dict[str, Entry] = field(default_factory=dict)
    _operator_wants: dict[str, None] = field(default_factory=dict)
    _clock: int = 0

    # ------------------------------------------------------------- inspection

    def bytes_in(self, tier: MemoryTier) -> int:
        """Bytes in use or reserved in a tier."""
        return sum(e.bytes for e in self._entries.values() if e.at(tier) is not Presence.ABSENT)

    def count_in(self, tier: MemoryTier) -> int:
        """Adapters that are complete in a tier."""
        return sum(e.at(tier) is Presence.THERE for e in self._entries.values())

    def tier(self, digest: str) -> TierName:
        """Nearest tier that holds the adapter; ``disk`` if no memory tier does."""
        entry = self._entries.get(digest)
        if entry is None:
            return "disk"
        if entry.device is Presence.THERE:
            return "device"
        return "host" if entry.host is Presence.THERE else "disk"

    def pinned(self, digest: str, tier: MemoryTier | None = None) -> bool:
        """To that tier, or to any."""
        entry = self._entries.get(digest)
        return entry is not None and entry.pinned in ([tier] if tier else TIERS)

    def bytes_of(self, digest: str) -> int:
        entry = self._entries.get(digest)
        return entry.bytes if entry else 0

    # ----------------------------------------------------------- lease and hold

    def lease(self, source: AdapterSource) -> TierName:
        """Count a new sequence; returns the tier the adapter was found in.

        Raises:
            AdapterBudgetExceeded: it can never fit.
        """
        entry = self._find_or_make(source)
        self._entries[source.weights_digest] = entry
        found = self.tier(source.weights_digest)
        entry.leases += 1
        entry.draining = False
        self._touch(entry)
        return found

    def release(self, digest: str) -> list[Action]:
        """The sequence has ended; may free an adapter that was draining."""
        entry = self._entries[digest]
        assert entry.leases > 0, "lease released twice"
        entry.leases -= 1
        self._touch(entry)
        if entry.draining:
            return self.settle(digest)
        self._forget_if_idle(digest)
        return []

    def try_hold(self, digest: str) -> bool:
        """Grip the DEVICE copy for a sequence that is about to be scheduled."""
        entry = self._entries[digest]
        if entry.device is not Presence.THERE:
            return False
        entry.holds += 1
        self._touch(entry)
        return True

    def unhold(self, digest: str) -> None:
        entry = self._entries[digest]
        assert entry.holds > 0, "hold released twice"
        entry.holds -= 1

    # ------------------------------------------------------------------ planning

    def plan(self, wants: Sequence[str], overdue: str | None = None) -> Plan:
        """What to start now so that the wanted adapters become resident.

        Args:
            wants: digests of waiting sequences, oldest first, without repeats.
            overdue: the want that was `Plan.blocked` for too long, if any.
        """
        if not wants and not self._operator_wants:
            return Plan()
        actions: list[Action] = []
        protected: set[str] = set()
        impossible: list[str] = []
        blocked: str | None = None
        left: dict[MemoryTier, int] = {}
        for digest in dict.fromkeys([*self._operator_wants, *wants]):
            entry = self._entries[digest]
            target = self._next_tier(entry)
            if target is None:
                protected.add(digest)
            elif blocked is not None:
                if entry.bytes <= left[target]:
                    left[target] -= entry.bytes
                    actions.append(self._bring(entry, target))
            elif (room := self._make_room(target, entry, protected)) is not None:
                actions += [*room, self._bring(entry, target)]
                protected.add(digest)
            elif self._pins_forbid(target, entry):
                impossible.append(digest)
            else:
                blocked = digest
                left = self._left_for_younger(target, digest == overdue)
        return Plan(tuple(actions), blocked, tuple(impossible))

    def _left_for_younger(self, lacking: MemoryTier, overdue: bool) -> dict[MemoryTier, int]:
        """Free bytes that wants behind a blocked one may take. An adapter that comes to
        DEVICE keeps room taken in both tiers for as long as its sequences run, one that
        stays in HOST takes none from DEVICE."""
        left = {tier: self._budget(tier) - self.bytes_in(tier) for tier in TIERS}
        if overdue:
            left["device"] = 0
            if lacking == "host":
                left["host"] = 0
        return left

    def _bring(self, entry: Entry, target: MemoryTier) -> Action:
        if target == "host":
            entry.host = Presence.COMING
            return Load(entry.source)
        entry.device = Presence.COMING
        return MoveToDevice(entry.source.weights_digest)

    def _next_tier(self, entry: Entry) -> MemoryTier | None:
        """The tier to bring a wanted adapter to now, or None if it is there or moving."""
        if Presence.COMING in (entry.host, entry.device):
            return None
        if entry.host is Presence.ABSENT:
            # A pin to HOST wants its copy also where there is one in DEVICE, which may go.
            wanted = entry.device is Presence.ABSENT or entry.wanted == "host"
            return "host" if wanted else None
        if entry.device is Presence.THERE:
            return None
        only_host = entry.wanted == "host" and not entry.leases
        return None if only_host else "device"

    def loaded(self, digest: str) -> None:
        """The HOST copy is complete."""
        entry = self._entries[digest]
        entry.host = Presence.THERE
        if entry.wanted == "host":
            self._unwant(digest)
        self._touch(entry)

    def moved(self, digest: str) -> None:
        """The DEVICE copy is complete."""
        entry = self._entries[digest]
        entry.device = Presence.THERE
        self._unwant(digest)
        self._touch(entry)

    def failed(self, digest: str) -> None:
        """A load or move failed, or can never begin: a pin that it was for is void."""
        entry = self._entries.get(digest)
        if entry is None:
            return  # it was forgotten with its last sequence, which failed first
        if entry.host is Presence.COMING:
            entry.host = Presence.ABSENT
        if entry.device is Presence.COMING:
            entry.device = Presence.ABSENT
        if entry.pinned is not None and entry.at(entry.pinned) is not Presence.THERE:
            entry.pinned = None
        self._unwant(digest)
        self._forget_if_idle(digest)

    # ------------------------------------------------------------ operator calls

    def activate(self, source: AdapterSource, tier: MemoryTier, pin: bool) -> bool:
        """Ask for a tier; True if the adapter is there already.

        Raises:
            AdapterBudgetExceeded: it can never fit, or pins leave no room for it.
                Nothing has changed.
        """
        entry = self._find_or_make(source)
        if pin:
            self._check_pin_fits(entry, tier)
            entry.pinned = tier
        self._entries[source.weights_digest] = entry
        entry.draining = False
        there = entry.at(tier) is Presence.THERE
        if not pin:  # a copy in DEVICE is nearer than HOST, but a pin to HOST lets it go
            there = there or entry.device is Presence.THERE
        if not there:
            if entry.wanted != "device":  # what an earlier call asked for still counts
                entry.wanted = tier
            self._operator_wants[source.weights_digest] = None
        self._touch(entry)
        return there

    def evict(
        self, digest: str, mode: Literal["drain", "fail_if_busy", "abort"], unpin: bool
    ) -> tuple[bool, int, list[Action]]:
        """Free an adapter: (freed now, bytes, actions).

        With ``abort`` the caller ends the adapter's sequences first.

        Raises:
            AdapterPinned: it is pinned and ``unpin`` was not given.
            AdapterInUse: ``fail_if_busy`` and a sequence uses it; the pin stays.
        """
        entry = self._entries.get(digest)
        if entry is None:
            return True, 0, []
        if entry.pinned is not None and not unpin:
            raise AdapterPinned(
                f"adapter {entry.source.name} is pinned; evict it with unpin set"
            )
        if entry.leases and mode == "fail_if_busy":
            raise AdapterInUse(
                f"adapter {entry.source.name} is used by {entry.leases} request(s); wait, "
                "or evict with mode DRAIN or ABORT",
                metadata={"leases": str(entry.leases)},
            )
        entry.pinned = None
        self._unwant(digest)
        if entry.leases or Presence.COMING in (entry.host, entry.device):
            entry.draining = True
            return False, 0, []
        actions = self._drop_both(digest, "abort" if mode == "abort" else "admin")
        copies = min(1, len(actions)) if self.shared else len(actions)
        return True, copies * entry.bytes, actions

    def unpin(self, digest: str) -> None:
        """Remove the operator's flag, if set; the adapter stays until room is needed."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.pinned = None
            self._forget_if_idle(digest)

    def settle(self, digest: str) -> list[Action]:
        """Finish a draining eviction if nothing uses or moves the adapter any more."""
        entry = self._entries.get(digest)
        if entry is None or not entry.draining or entry.leases:
            return []
        if Presence.COMING in (entry.host, entry.device):
            return []
        return self._drop_both(digest, "admin")

    # ------------------------------------------------------------------ internals

    def _find_or_make(self, source: AdapterSource) -> Entry:
        """Its entry, or one that the caller may put among the others."""
        entry = self._entries.get(source.weights_digest)
        if entry is not None:
            return entry
        size = source.parameters * self.itemsize
        for tier in TIERS:
            budget = self._budget(tier)
            if size > budget:
                raise AdapterBudgetExceeded(
                    f"adapter {source.name} takes {size} bytes but the {tier} budget is "
                    f"{budget}; start the server with a larger --{_FLAG[tier]}",
                    metadata={"bytes": str(size), "budget": str(budget), "tier": tier},
                )
        return Entry(source, size)

    def _unwant(self, digest: str) -> None:
        self._entries[digest].wanted = None
        self._operator_wants.pop(digest, None)

    def _touch(self, entry: Entry) -> None:
        self._clock += 1
        entry.used = self._clock

    def _make_room(
        self, tier: MemoryTier, entry: Entry, protected: set[str]
    ) -> list[Drop] | None:
        """Drops that free enough of a tier, already applied; None if impossible now."""
        missing = self.bytes_in(tier) + entry.bytes - self._budget(tier)
        if missing <= 0:
            return []
        drops: list[Drop] = []
        by_use = sorted(self._entries.items(), key=lambda it: (it[1].leases > 0, it[1].used))
        for digest, victim in by_use:
            if missing <= 0:
                break
            if victim is entry or digest in protected or not self._evictable(victim, tier):
                continue
            if self.shared and tier == "host" and victim.device is Presence.THERE:
                drops.append(Drop(digest, "device", "capacity"))
            drops.append(Drop(digest, tier, "capacity"))
            missing -= victim.bytes
        if missing > 0:
            return None
        self._apply(drops)
        return drops

    def _evictable(self, entry: Entry, tier: MemoryTier) -> bool:
        """See the module. That someone wants it is no matter here: what an earlier want
        needs is protected, and a later one must not stand in its way."""
        if entry.at(tier) is not Presence.THERE or self._pin_keeps(entry, tier):
            return False
        if tier == "host" and entry.device is Presence.COMING:
            return False
        return entry.holds == 0 or (tier == "host" and not self.shared)

    def _pin_keeps(self, entry: Entry, tier: MemoryTier) -> bool:
        """A pin forbids to evict the copy in this tier."""
        if entry.pinned is None:
            return False
        return entry.pinned == tier or (self.shared and tier == "host")

    def _pins_forbid(self, tier: MemoryTier, entry: Entry) -> bool:
        pinned = sum(
            e.bytes
            for e in self._entries.values()
            if e is not entry and self._pin_keeps(e, tier) and e.at(tier) is not Presence.ABSENT
        )
        return pinned + entry.bytes > self._budget(tier)

    def _budget(self, tier: MemoryTier) -> int:
        if tier == "device":
            return self.device_budget
        return max(self.host_budget, self.device_budget) if self.shared else self.host_budget

    def _drop_both(self, digest: str, cause: Cause) -> list[Action]:
        entry = self._entries[digest]
        entry.draining = False
        drops = [Drop(digest, t, cause) for t in TIERS if entry.at(t) is Presence.THERE]
        self._apply(drops)
        self._forget_if_idle(digest)
        return list(drops)

    def _apply(self, drops: Iterable[Drop]) -> None:
        for drop in drops:
            entry = self._entries[drop.weights_digest]
            if drop.tier == "device":
                assert entry.holds == 0, "a held adapter was evicted"
                entry.device = Presence.ABSENT
            else:
                entry.host = Presence.ABSENT
            self._forget_if_idle(drop.weights_digest)

    def _forget_if_idle(self, digest: str) -> None:
        entry = self._entries.get(digest)
        if entry is None:
            return
        idle = entry.host is Presence.ABSENT and entry.device is Presence.ABSENT
        if idle and not entry.leases and entry.wanted is None:
            del self._entries[digest]

    def _check_pin_fits(self, entry: Entry, tier: MemoryTier) -> None:
        for kept in TIERS if self.shared and tier == "device" else (tier,):
            others = sum(
                e.bytes
                for e in self._entries.values()
                if e is not entry and self._pin_keeps(e, kept)
            )
            if others + entry.bytes > self._budget(kept):
                raise AdapterBudgetExceeded(
                    f"pinning {entry.source.name} ({entry.bytes} bytes) would take the pinned "
                    f"adapters past the {kept} budget of {self._budget(kept)}; unpin another "
                    f"one or start the server with a larger --{_FLAG[kept]}",
                    metadata={"bytes": str(entry.bytes), "pinned": str(others), "tier": kept},
                )

    def check_integrity(self, held: Iterable[str], leased: Iterable[str]) -> None:
        """Holds and leases equal the sequences that claim them; budgets are kept."""
        holds, leases = _count(held), _count(leased)
        for digest, entry in self._entries.items():
            assert entry.holds == holds.pop(digest, 0), f"holds of {digest[:12]} differ"
            assert entry.leases == leases.pop(digest, 0), f"leases of {digest[:12]} differ"
            if self.shared and entry.device is not Presence.ABSENT:
                assert entry.host is Presence.THERE, f"{digest[:12]} is in DEVICE only"
        assert not holds, "a hold on an unknown adapter"
        assert not leases, "a lease on an unknown adapter"
        for tier in TIERS:
            assert self.bytes_in(tier) <= self._budget(tier), f"past the {tier} budget"


_FLAG = {"device": "device-adapter-bytes", "host": "host-cache-bytes"}


def _count(digests: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for digest in digests:
        counts[digest] = counts.get(digest, 0) + 1
    return counts
