"""Residency: decides which adapters are in which tier. No torch, no I/O.

The step loop tells `Residency` what happened and carries out the `Action`s it
returns. There are three kinds of claim on an adapter:

* a *lease* counts sequences submitted and not finished: the adapter's identity is in use;
* a *hold* counts scheduled sequences: the DEVICE copy is in use right now and is
  never evicted;
* a *pin* is an operator's flag for one tier: the copy there is never evicted for
  capacity. A pin to HOST does not protect the DEVICE copy, nor the other way round.

So DEVICE makes room by dropping copies that are neither held nor pinned there, and HOST by
dropping copies that are neither pinned there nor being moved to DEVICE.

If the tiers share memory (on a CPU), an adapter's DEVICE copy is the same memory as its HOST
copy, and dropping only one frees nothing. DEVICE is then a subset of HOST: whatever keeps the
DEVICE copy also keeps the HOST copy, and HOST makes room by dropping both. HOST then counts
each byte held exactly once, and may use the larger of the two budgets, as the memory plan
assumes.

`load_planner` loads adapters in order of arrival; `eviction` chooses the copies to drop for
them. If a budget is lowered below the bytes held, it is met when holds end: unused copies are
dropped at once, and enough adapters in use to meet the budget take no further sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from itertools import islice
from typing import Final

from veneer_registry.errors import AdapterBudgetExceeded, AdapterInUse, AdapterPinned

from veneer_server.engine.integrity import in_slices
from veneer_server.engine.residency.eviction import EvictionOrder
from veneer_server.engine.residency.ledger import Ledger
from veneer_server.engine.residency.load_planner import LoadPlanner, Wants, shrink
from veneer_server.engine.residency.tiers import (
    TIERS,
    Action,
    Drop,
    LedgerEntry,
    Presence,
    ResidencyPlan,
)
from veneer_server.wire.messages import (
    AdapterSource,
    EvictionCause,
    EvictMode,
    MemoryTier,
    TierName,
)

_MOST_OPERATORS: Final = 64
"""Most activations planned at once. The rest wait, so that planning does not delay a step."""


class Residency:
    """The state machine of all adapters' residency.

    Args:
        host_budget, device_budget: bytes.
        itemsize: bytes of one number of a resident adapter.
        shared: whether a DEVICE copy is the same memory as the HOST copy (on a CPU); see the
            module docstring.
        parts: number of cards that a DEVICE copy is divided among; the DEVICE budget is per
            card.
        most_loads: most loads from disk in progress at once.
        order: makes the eviction order of a tier.

    Attributes:
        ledger: record of every copy, lease, hold and pin; only changed here.
        operator_wants: weights digests of pending activations, oldest first.
    """

    def __init__(
        self,
        host_budget: int,
        device_budget: int,
        itemsize: int,
        *,
        shared: bool = False,
        parts: int = 1,
        most_loads: int = 4,
        order: Callable[[MemoryTier], EvictionOrder] = EvictionOrder,
    ) -> None:
        budgets: dict[MemoryTier, int] = {"host": host_budget, "device": device_budget}
        self.ledger = Ledger(budgets, shared=shared, parts=parts, order=order)
        self._itemsize = itemsize
        self._shared = shared
        self._most_loads = most_loads
        self.operator_wants: dict[str, None] = {}
        self._shrinking = False

    # ------------------------------------------------------------- inspection

    def budget(self, tier: MemoryTier) -> int:
        """The budget in bytes, as set. After it was lowered, more may still be held."""
        return self.ledger.budgets[tier]

    def bytes_in(self, tier: MemoryTier) -> int:
        """Bytes in use or reserved in a tier."""
        return self.ledger.bytes_in(tier)

    def count_in(self, tier: MemoryTier) -> int:
        """Number of complete copies in a tier."""
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
        """Whether a sequence may hold the adapter now."""
        entry = self.ledger.entries.get(digest)
        if entry is None or entry.leaving or entry.draining:
            return False
        return entry.device is Presence.THERE

    def ready_among(self, digests: Set[str | None]) -> Set[str]:
        """Return the digests that are `ready`. Takes time in proportion to the smaller of their
        number and the number of DEVICE copies."""
        return {d for d in self.ledger.there["device"] & digests if self.ready(d)}

    def pinned(self, digest: str, tier: MemoryTier | None = None) -> bool:
        """Whether the adapter is pinned to ``tier``, or to any if None."""
        entry = self.ledger.entries.get(digest)
        return entry is not None and entry.pinned in ([tier] if tier else TIERS)

    def bytes_of(self, digest: str) -> int:
        """Bytes of the whole adapter; 0 if it is unknown."""
        entry = self.ledger.entries.get(digest)
        return entry.sizes["host"] if entry else 0

    # ----------------------------------------------------------- lease and hold

    def lease(self, source: AdapterSource) -> TierName:
        """Count a new sequence; return the tier where the adapter was found, ``disk`` if its
        copies are about to be freed.

        Raises:
            AdapterBudgetExceeded: the adapter is larger than a budget.
        """
        entry = self.ledger.find_or_make(source, self._itemsize)
        self.ledger.entries[entry.digest] = entry
        found: TierName = "disk" if entry.draining else self.tier(entry.digest)
        entry.forgotten = False
        self.ledger.request(entry)
        return found

    def release(self, digest: str) -> list[Action]:
        """Record that a sequence has ended. May free an adapter whose eviction was waiting for
        that."""
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
        """Hold the DEVICE copy for a sequence about to be scheduled; False if not `ready`."""
        if not self.ready(digest):
            return False
        self.ledger.hold(self.ledger.entries[digest])
        return True

    def unhold(self, digest: str) -> None:
        self.ledger.unhold(self.ledger.entries[digest])

    # ------------------------------------------------------------------ planning

    def plan(
        self, wants: Sequence[str], overdue: str | None = None, near: int | None = None
    ) -> ResidencyPlan:
        """Plan the actions to start now so that the wanted adapters become resident.

        Args:
            wants: digests of waiting sequences, oldest first, without duplicates.
            overdue: the want that was `ResidencyPlan.blocked` for too long, if any.
            near: how many of the wants may be in use at the same time; all if None.
        """
        idle = not wants and not self.operator_wants and not self._shrinking
        if idle and not self.ledger.draining:
            return ResidencyPlan()
        entries = self.ledger.entries
        waiting = tuple(entries[digest] for digest in wants)
        # The sequences that held draining adapters may have been preempted since.
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
        return ResidencyPlan((*drops, *plan.actions), plan.blocked, plan.impossible)

    def loaded(self, digest: str, seconds: float = 0.0, part: int = 0) -> None:
        """Record that the HOST copy is complete.

        Args:
            seconds: time that reading it took; 0 if not measured.
            part: how many of its numbers each card has, if they are divided.
        """
        entry = self.ledger.entries[digest]
        if part and entry.device is Presence.ABSENT:
            entry.sizes = {**entry.sizes, "device": part * self._itemsize}
        self.ledger.cost.observe("host", entry.sizes["host"], seconds)
        self.ledger.place(entry, "host", Presence.THERE)
        if entry.wanted == "host":
            self._unwant(digest)
        self.ledger.touch(entry)

    def moved(self, digest: str, seconds: float = 0.0) -> None:
        """Record that the DEVICE copy is complete. Copying it took ``seconds``; 0 if not
        measured."""
        entry = self.ledger.entries[digest]
        self.ledger.cost.observe("device", entry.sizes["device"], seconds)
        self.ledger.place(entry, "device", Presence.THERE)
        self._unwant(digest)
        self.ledger.touch(entry)

    def find_place(self, digest: str) -> list[Drop] | None:
        """Handle a move that found no place in DEVICE, although there are enough bytes.

        The next `plan` tries again. Return the drop of an idle copy; an empty list if there is
        none but other copies are in use, which may leave; None if neither can help."""
        ledger, entry = self.ledger, self.ledger.entries[digest]
        idle = ledger.orders["device"].take()
        if idle is None and not ledger.leased.keys() & ledger.there["device"]:
            return None
        ledger.place(entry, "device", Presence.ABSENT)
        if idle is None:
            return []
        ledger.orders["device"].evicted(idle)
        return ledger.drop(idle[1], "device", "capacity")

    def failed(self, digest: str) -> None:
        """Record that a load or move failed or can never start. Removes the pin that it was
        for."""
        entry = self.ledger.entries.get(digest)
        if entry is None:
            return  # already forgotten with its last sequence, which failed first
        for tier in TIERS:
            if entry.at(tier) is Presence.COMING:
                self.ledger.place(entry, tier, Presence.ABSENT)
        if entry.pinned is not None and entry.at(entry.pinned) is not Presence.THERE:
            self.ledger.pin(entry, None)
        self._unwant(digest)
        self.ledger.forget_if_idle(entry)

    # ------------------------------------------------------------ operator calls

    def activate(self, source: AdapterSource, tier: MemoryTier, pin: bool) -> bool:
        """Request a tier for an operator; return True if the adapter is already there. Ends a
        drain, since the later call counts.

        Raises:
            AdapterBudgetExceeded: the adapter is larger than a budget, or it is to be pinned
                and does not fit beside other pinned adapters. Nothing has changed.
        """
        entry = self.ledger.find_or_make(source, self._itemsize)
        if pin:
            self.ledger.check_pin_fits(entry, tier)
            self.ledger.pin(entry, tier)
        self.ledger.entries[entry.digest] = entry
        self.ledger.drain(entry, draining=False)
        entry.forgotten = False
        there = entry.at(tier) is Presence.THERE
        if not pin:  # DEVICE is nearer than HOST, but a pin to HOST does not keep a DEVICE copy
            there = there or entry.device is Presence.THERE
        if not there:
            if entry.wanted != "device":  # an earlier call's request for DEVICE still counts
                entry.wanted = tier
            self.operator_wants[entry.digest] = None
        self.ledger.expect(entry, tier)
        return there

    def evict(
        self, digest: str, mode: EvictMode, unpin: bool
    ) -> tuple[bool, int, list[Action]]:
        """Free an adapter; return (whether it is freed now, freed bytes, actions). See
        `messages.Evict`.

        With ``abort`` the caller ends the adapter's sequences first. Copies not freed now are
        freed by the call that ends their last use: `release`, `settle` or `plan`.

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
        held = [tier for tier in TIERS if entry.at(tier) is Presence.THERE]
        actions = self._drop_both(entry, "abort" if mode == "abort" else "admin")
        freed = held[:1] if self._shared else held
        return True, sum(entry.sizes[tier] for tier in freed), actions

    def unpin(self, digest: str) -> None:
        """Remove the operator's pin, if set; the adapter stays until room is needed."""
        entry = self.ledger.entries.get(digest)
        if entry is not None:
            self.ledger.pin(entry, None)
            self.ledger.forget_if_idle(entry)

    def settle(self, digest: str) -> list[Action]:
        """Finish an eviction if the adapter is no longer in use or being moved."""
        entry = self.ledger.entries.get(digest)
        if entry is None or not (entry.draining or entry.forgotten) or self._in_use(entry):
            return []
        return self._drop_both(entry, "admin")

    def _in_use(self, entry: LedgerEntry) -> bool:
        """Whether an eviction must still wait."""
        if Presence.COMING in (entry.host, entry.device):
            return True
        return entry.holds > 0 or (entry.leases > 0 and not entry.draining)

    # -------------------------------------------------------------------- budgets

    def set_budgets(self, *, host: int | None, device: int | None) -> None:
        """Change budgets, in bytes; None leaves one as it is. The next `plan` drops unused
        copies beyond the budgets; later calls of `plan` drop the rest once they are not in use.

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
                    f"a {tier} budget of {refused} bytes is less than the pinned adapters use "
                    f"there ({pinned}): unpin some, or choose a larger budget",
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

    def check_unused(self) -> None:
        """Assert that nothing is leased or held; call when there is no sequence. O(1)."""
        self.ledger.check_unused()

    def integrity(self, held: Iterable[str], leased: Iterable[str]) -> Iterator[None]:
        """Check that holds and leases match the sequences that claim them, and that no tier is
        past its ceiling. Runs in slices, see the module `integrity`."""
        yield from self.ledger.integrity(held, leased)
        entries = self.ledger.entries
        for part in in_slices(self.operator_wants):
            for digest in part:
                assert entries[digest].wanted is not None, f"{digest[:12]} is not wanted"
            yield
