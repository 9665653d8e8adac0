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

What waits is brought in order of arrival, see `planner`; what goes for it, see `eviction`.
A budget that is lowered while its room is taken is reached when holds end: what is not in
use goes at once, and of what is as much as is too much takes no further sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from veneer_registry.errors import AdapterBudgetExceeded, AdapterInUse, AdapterPinned

from veneer_server.engine.integrity import in_slices
from veneer_server.engine.residency.eviction import EvictionOrder
from veneer_server.engine.residency.ledger import FLAG, Ledger
from veneer_server.engine.residency.load_planner import LoadPlanner, Wants, shrink
from veneer_server.engine.residency.tiers import (
    TIERS,
    Action,
    Drop,
    LedgerEntry,
    MemoryTier,
    Plan,
    Presence,
)
from veneer_server.wire.messages import AdapterSource, EvictionCause, EvictMode, TierName

__all__ = ["Residency"]

_MOST_OPERATORS: Final = 64
"""Activations that are planned at once; more wait their turn, so that a step does too."""


class Residency:
    """The state machine.

    Args:
        host_budget, device_budget: bytes.
        itemsize: bytes of one resident number.
        shared: the DEVICE copy is the HOST copy (on a CPU); see the module.
        most_loads: loads from disk under way at once, at most.
        order: who is evicted first, for one tier.

    Attributes:
        ledger: every copy, lease, hold and pin; changed here only.
        operator_wants: weights digests that operators activated and that are not there yet,
            oldest first.
    """

    def __init__(
        self,
        host_budget: int,
        device_budget: int,
        itemsize: int,
        *,
        shared: bool = False,
        most_loads: int = 4,
        order: Callable[[MemoryTier], EvictionOrder] = EvictionOrder,
    ) -> None:
        budgets: dict[MemoryTier, int] = {"host": host_budget, "device": device_budget}
        self.ledger = Ledger(budgets, shared=shared, order=order)
        self._itemsize = itemsize
        self._shared = shared
        self._most_loads = most_loads
        self.operator_wants: dict[str, None] = {}
        self._shrinking = False

    # ------------------------------------------------------------- inspection

    def budget(self, tier: MemoryTier) -> int:
        """Bytes, as set: what is planned for, whatever is held now."""
        return self.ledger.budgets[tier]

    def bytes_in(self, tier: MemoryTier) -> int:
        """Bytes in use or reserved in a tier."""
        return self.ledger.bytes_in(tier)

    def count_in(self, tier: MemoryTier) -> int:
        """Adapters that are complete in a tier."""
        return self.ledger.count_in(tier)

    def tier(self, digest: str) -> TierName:
        """Nearest tier that holds the adapter; ``disk`` if no memory tier does."""
        entry = self.ledger.entries.get(digest)
        if entry is None:
            return "disk"
        if entry.device is Presence.THERE:
            return "device"
        return "host" if entry.host is Presence.THERE else "disk"

    def ready(self, digest: str) -> bool:
        """A sequence may take hold of it now."""
        entry = self.ledger.entries.get(digest)
        if entry is None or entry.leaving or entry.draining:
            return False
        return entry.device is Presence.THERE

    def pinned(self, digest: str, tier: MemoryTier | None = None) -> bool:
        """To that tier, or to any."""
        entry = self.ledger.entries.get(digest)
        return entry is not None and entry.pinned in ([tier] if tier else TIERS)

    def bytes_of(self, digest: str) -> int:
        entry = self.ledger.entries.get(digest)
        return entry.bytes if entry else 0

    # ----------------------------------------------------------- lease and hold

    def lease(self, source: AdapterSource) -> TierName:
        """Count a new sequence; returns the tier the adapter was found in, which is none
        where its copies are about to go.

        Raises:
            AdapterBudgetExceeded: it can never fit.
        """
        entry = self.ledger.find_or_make(source, self._itemsize)
        self.ledger.entries[entry.digest] = entry
        found: TierName = "disk" if entry.draining else self.tier(entry.digest)
        entry.forgotten = False
        self.ledger.request(entry)
        return found

    def release(self, digest: str) -> list[Action]:
        """The sequence has ended; may free an adapter that was evicted meanwhile."""
        entry = self.ledger.entries[digest]
        assert entry.leases > 0, "lease released twice"
        entry.leases -= 1
        self.ledger.touch(entry)
        if not entry.leases:
            self.ledger.rest(entry)
        actions = self.settle(digest)
        self.ledger.forget_if_idle(entry)
        return actions

    def try_hold(self, digest: str) -> bool:
        """Grip the DEVICE copy for a sequence that is about to be scheduled."""
        if not self.ready(digest):
            return False
        self.ledger.hold(self.ledger.entries[digest])
        return True

    def unhold(self, digest: str) -> None:
        self.ledger.unhold(self.ledger.entries[digest])

    # ------------------------------------------------------------------ planning

    def plan(
        self, wants: Sequence[str], overdue: str | None = None, near: int | None = None
    ) -> Plan:
        """What to start now so that the wanted adapters become resident.

        Args:
            wants: digests of waiting sequences, oldest first, without repeats.
            overdue: the want that was `Plan.blocked` for too long, if any.
            near: how many of the wants may be in use at the same time; all if None.
        """
        idle = not wants and not self.operator_wants and not self._shrinking
        if idle and not self.ledger.draining:
            return Plan()
        entries = self.ledger.entries
        waiting = tuple(entries[digest] for digest in wants)
        # What ran on it may have been preempted since.
        drops = [drop for digest in list(self.ledger.draining) for drop in self.settle(digest)]
        drops += self._shrink(waiting)
        operators = islice(self.operator_wants, _MOST_OPERATORS)
        planner = LoadPlanner(
            self.ledger,
            Wants(
                operators=tuple(entries[digest] for digest in operators),
                waiting=waiting,
                near=len(waiting) if near is None else near,
                overdue=overdue,
                loads=self._most_loads,
            ),
        )
        plan = planner.plan()
        if not drops:
            return plan
        return Plan((*drops, *plan.actions), plan.blocked, plan.impossible)

    def loaded(self, digest: str, seconds: float = 0.0) -> None:
        """The HOST copy is complete; reading it took ``seconds``, if measured."""
        entry = self.ledger.entries[digest]
        self.ledger.cost.observe("host", entry.bytes, seconds)
        self.ledger.place(entry, "host", Presence.THERE)
        if entry.wanted == "host":
            self._unwant(digest)
        self.ledger.touch(entry)

    def moved(self, digest: str, seconds: float = 0.0) -> None:
        """The DEVICE copy is complete; copying it took ``seconds``, if measured."""
        entry = self.ledger.entries[digest]
        self.ledger.cost.observe("device", entry.bytes, seconds)
        self.ledger.place(entry, "device", Presence.THERE)
        self._unwant(digest)
        self.ledger.touch(entry)

    def failed(self, digest: str) -> None:
        """A load or move failed, or can never begin: a pin that it was for is void."""
        entry = self.ledger.entries.get(digest)
        if entry is None:
            return  # it was forgotten with its last sequence, which failed first
        for tier in TIERS:
            if entry.at(tier) is Presence.COMING:
                self.ledger.place(entry, tier, Presence.ABSENT)
        if entry.pinned is not None and entry.at(entry.pinned) is not Presence.THERE:
            self.ledger.pin(entry, None)
        self._unwant(digest)
        self.ledger.forget_if_idle(entry)

    # ------------------------------------------------------------ operator calls

    def activate(self, source: AdapterSource, tier: MemoryTier, pin: bool) -> bool:
        """Ask for a tier; True if the adapter is there already. Ends a drain: the later word
        counts.

        Raises:
            AdapterBudgetExceeded: it can never fit, or pins leave no room for it.
                Nothing has changed.
        """
        entry = self.ledger.find_or_make(source, self._itemsize)
        if pin:
            self._check_pin_fits(entry, tier)
            self.ledger.pin(entry, tier)
        self.ledger.entries[entry.digest] = entry
        self.ledger.drain(entry, draining=False)
        entry.forgotten = False
        there = entry.at(tier) is Presence.THERE
        if not pin:  # a copy in DEVICE is nearer than HOST, but a pin to HOST lets it go
            there = there or entry.device is Presence.THERE
        if not there:
            if entry.wanted != "device":  # what an earlier call asked for still counts
                entry.wanted = tier
            self.operator_wants[entry.digest] = None
        self.ledger.expect(entry, tier)
        return there

    def evict(
        self, digest: str, mode: EvictMode, unpin: bool
    ) -> tuple[bool, int, list[Action]]:
        """Free an adapter: (freed now, bytes, actions). See `messages.Evict`.

        With ``abort`` the caller ends the adapter's sequences first. What is not freed now
        is freed by the call that ends what uses it: `release`, `settle` or `plan`.

        Raises:
            AdapterPinned: it is pinned and ``unpin`` was not given.
            AdapterInUse: ``fail_if_busy`` and a sequence uses it; the pin stays.
        """
        entry = self.ledger.entries.get(digest)
        if entry is None:
            return True, 0, []
        if entry.pinned is not None and not unpin:
            raise AdapterPinned(f"adapter {entry.source.name} is pinned; evict it with `unpin`")
        if entry.leases and mode == "fail_if_busy":
            raise AdapterInUse(
                f"adapter {entry.source.name} is used by {entry.leases} request(s); wait, "
                "or evict with `mode` drain or abort",
                metadata={"leases": str(entry.leases)},
            )
        self.ledger.pin(entry, None)
        self._unwant(digest)
        if mode == "forget":
            entry.forgotten = True
        else:
            self.ledger.drain(entry, draining=True)
        if self._in_use(entry):
            return False, 0, []
        actions = self._drop_both(entry, "abort" if mode == "abort" else "admin")
        copies = min(1, len(actions)) if self._shared else len(actions)
        return True, copies * entry.bytes, actions

    def unpin(self, digest: str) -> None:
        """Remove the operator's flag, if set; the adapter stays until room is needed."""
        entry = self.ledger.entries.get(digest)
        if entry is not None:
            self.ledger.pin(entry, None)
            self.ledger.forget_if_idle(entry)

    def settle(self, digest: str) -> list[Action]:
        """Finish an eviction if what it waited for uses or moves the adapter no more."""
        entry = self.ledger.entries.get(digest)
        if entry is None or not (entry.draining or entry.forgotten) or self._in_use(entry):
            return []
        return self._drop_both(entry, "admin")

    def _in_use(self, entry: LedgerEntry) -> bool:
        """By what an eviction waits for."""
        if Presence.COMING in (entry.host, entry.device):
            return True
        return entry.holds > 0 or (entry.leases > 0 and not entry.draining)

    # -------------------------------------------------------------------- budgets

    def set_budgets(self, *, host: int | None, device: int | None) -> None:
        """Change budgets, in bytes; None leaves one as it is. The next `plan` drops what is
        past them and not in use, and later ones the rest, when it is not any more.

        Raises:
            AdapterBudgetExceeded: pinned adapters alone take more. Nothing has changed.
        """
        ledger, before = self.ledger, dict(self.ledger.budgets)
        ledger.budgets["host"] = before["host"] if host is None else host
        ledger.budgets["device"] = before["device"] if device is None else device
        for tier in TIERS:
            pinned = ledger.pinned_bytes(tier)
            if pinned > ledger.budget(tier):
                refused = ledger.budget(tier)
                ledger.budgets.update(before)
                raise AdapterBudgetExceeded(
                    f"a {tier} budget of {refused} bytes is less than pinned adapters take "
                    f"there ({pinned}): unpin some, or choose a larger one",
                    metadata={"budget": str(refused), "pinned": str(pinned), "tier": tier},
                )
        ledger.lower_ceilings()
        self._shrinking = True

    def _shrink(self, waiting: tuple[LedgerEntry, ...]) -> list[Drop]:
        if not self._shrinking:
            return []
        drops = shrink(self.ledger, waiting)
        self._shrinking = any(self.ledger.excess(tier) for tier in TIERS)
        return drops

    # ------------------------------------------------------------------ internals

    def _unwant(self, digest: str) -> None:
        self.ledger.entries[digest].wanted = None
        self.operator_wants.pop(digest, None)

    def _drop_both(self, entry: LedgerEntry, cause: EvictionCause) -> list[Action]:
        self.ledger.drain(entry, draining=False)
        drops: list[Action] = []
        for tier in TIERS:
            if entry.at(tier) is Presence.THERE:
                drops += self.ledger.drop(entry, tier, cause)
        self.ledger.forget_if_idle(entry)
        return drops

    def _check_pin_fits(self, entry: LedgerEntry, tier: MemoryTier) -> None:
        for kept in TIERS if self._shared and tier == "device" else (tier,):
            others = self.ledger.pinned_bytes(kept, beside=entry)
            budget = self.ledger.budget(kept)
            if others + entry.bytes > budget:
                raise AdapterBudgetExceeded(
                    f"pinning {entry.source.name} ({entry.bytes} bytes) would take the pinned "
                    f"adapters past the {kept} budget of {budget}; unpin another one, or "
                    f"raise the budget (`UpdateBudgets`, or veneer-server --{FLAG[kept]})",
                    metadata={"bytes": str(entry.bytes), "pinned": str(others), "tier": kept},
                )

    def check_unused(self) -> None:
        """While no sequence is there, nothing is leased or held. Costs nothing."""
        self.ledger.check_unused()

    def integrity(self, held: Iterable[str], leased: Iterable[str]) -> Iterator[None]:
        """Holds and leases equal the sequences that claim them; budgets are kept, and what
        is past one that was lowered only becomes less. In slices, see `integrity`."""
        yield from self.ledger.integrity(held, leased)
        entries = self.ledger.entries
        for part in in_slices(self.operator_wants):
            for digest in part:
                assert entries[digest].wanted is not None, f"{digest[:12]} is not wanted"
            yield
