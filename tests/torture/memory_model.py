"""The expected adapter memory: a model that carries out the decisions of `Residency` and judges
each decision. For row 7.

It knows which requests wait and run, which adapters are pinned, and which copies it had to make
and drop, but nothing about how residency ranks them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import pytest
from veneer_registry.errors import AdapterBudgetExceeded, AdapterInUse, AdapterPinned
from veneer_server.engine import integrity
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.residency.tiers import (
    TIERS,
    Action,
    Drop,
    Load,
    MemoryTier,
    ResidencyPlan,
)
from veneer_server.wire.messages import AdapterSource

ROUNDS: Final = 4
"""Number of plannings after which the oldest waiting request must have its adapter if nothing
is held, plus the same number for each activation before it."""


@dataclass(eq=False)
class Request:
    """A waiting or running request. `end` is called once, at its end."""

    digest: str
    end: Callable[[], None]
    running: bool = False


class Memory:
    """The model; see the module docstring. Sizes are bytes; a number takes one byte."""

    def __init__(self, host: int, device: int, *, shared: bool) -> None:
        self.residency = Residency(host, device, itemsize=1, shared=shared)
        self.shared = shared
        self.budgets: dict[str, int] = {"host": host, "device": device}
        self.sizes: dict[str, int] = {}
        self.there: set[tuple[str, str]] = set()
        self.coming: list[tuple[str, MemoryTier]] = []
        self.requests: list[Request] = []
        self.pins: dict[str, str] = {}
        self.wanted: dict[str, str] = {}
        """Pending activations (digest -> tier), oldest first."""
        self.draining: set[str] = set()
        """Adapters evicted while requests ran on them; no request may start until they are
        gone."""
        self.forgotten: set[str] = set()
        """Adapters evicted because no name has them any more; their copies go with the last
        request."""
        self.most: dict[str, int] = {}
        self.blocked: tuple[str, int] | None = None
        """The adapter that found no space, and for how many consecutive plannings."""
        self.seen: Counter[str] = Counter()

    # ----------------------------------------------------------------- contents

    def budget(self, tier: str) -> int:
        if tier == "host" and self.shared:
            return max(self.budgets.values())
        return self.budgets[tier]

    def used(self, tier: str) -> int:
        copies = {*self.there, *self.coming}
        shared = self.shared and tier == "host"
        return sum(self.sizes[d] for d in {d for d, t in copies if shared or t == tier})

    def held(self, digest: str) -> bool:
        return any(r.running and r.digest == digest for r in self.requests)

    def leases(self, digest: str) -> int:
        return sum(r.digest == digest for r in self.requests)

    def pinned_bytes(self, tier: str, beside: str) -> int:
        return sum(self.sizes[d] for d in self.pins if d != beside and self._kept(d, tier))

    def _kept(self, digest: str, tier: str) -> bool:
        pin = self.pins.get(digest)
        return pin is not None and (pin == tier or (self.shared and tier == "host"))

    def _is_coming(self, digest: str) -> bool:
        return any(d == digest for d, _ in self.coming)

    def waiting(self) -> list[str]:
        """Return the digests of waiting requests, oldest first, without repeats."""
        return list(dict.fromkeys(r.digest for r in self.requests if not r.running))

    # --------------------------------------------------------------------- requests

    def ask(self, source: AdapterSource, end: Callable[[], None]) -> Request | None:
        """Submit a request; return None if its adapter can never fit."""
        digest, size = source.weights_digest, source.parameters
        if any(size > self.budget(tier) for tier in TIERS):
            with pytest.raises(AdapterBudgetExceeded):
                self.residency.lease(source)
            return None
        self.sizes[digest] = size
        found = "disk" if digest in self.draining else self._tier(digest)
        assert self.residency.lease(source) == found
        self.forgotten.discard(digest)
        request = Request(digest, end)
        self.requests.append(request)
        return request

    def start(self, request: Request) -> bool:
        """Schedule a request if its adapter is in DEVICE; return whether it runs."""
        there = (request.digest, "device") in self.there
        got = self.residency.try_hold(request.digest)
        if there and not got:
            past = [tier for tier in TIERS if self.used(tier) > self.budget(tier)]
            wrong = not past and request.digest not in self.draining
            assert not wrong, f"{request.digest[:12]} is kept from requests for no reason"
        assert not got or request.digest not in self.draining, "it starts on what was drained"
        assert there or not got, f"{request.digest[:12]} is not in DEVICE"
        request.running = got
        return got

    def finish(self, request: Request) -> None:
        """End a request, which may be finished, cancelled or failed."""
        self.requests.remove(request)
        if request.running:
            self.residency.unhold(request.digest)
        self.carry_out(self.residency.release(request.digest))
        self._drained(request.digest)
        request.end()

    # ------------------------------------------------------------------------ plans

    def plan(self, near: int | None = None) -> None:
        """Judge and carry out one planning."""
        wants = list(dict.fromkeys([*self.wanted, *self.waiting()]))
        overdue = self.blocked[0] if self.blocked and self.blocked[1] > 2 else None
        overdue = overdue if overdue in wants else None
        plan = self.residency.plan(self.waiting(), overdue, near)
        self._check_order(plan, wants, overdue)
        self.carry_out(plan.actions)
        self._check_lowered()
        if plan.blocked is None:
            self.blocked = None
        else:
            before = self.blocked if self.blocked and self.blocked[0] == plan.blocked else None
            self.blocked = (plan.blocked, before[1] + 1 if before else 1)
            self.seen["blocked"] += 1
        for digest in plan.impossible:
            self._check_impossible(digest)
            self.fail(digest)
            self.seen["impossible"] += 1

    def _check_order(self, plan: ResidencyPlan, wants: list[str], overdue: str | None) -> None:
        """Check that a waiting request loses its copy only to requests before it."""
        for drops, action in _with_drops(plan.actions):
            digest = (
                action.source.weights_digest
                if isinstance(action, Load)
                else (action.weights_digest)
            )
            place = wants.index(digest)
            for drop in drops:
                self.seen["evicted"] += 1
                assert drop.weights_digest != digest, f"{digest[:12]} evicts itself"
                if drop.weights_digest in wants:
                    later = wants.index(drop.weights_digest) > place
                    # An adapter with a DEVICE copy does not need its HOST copy.
                    own = drop.tier == "host" and (drop.weights_digest, "device") in self.there
                    assert later or own, f"{drop.weights_digest[:12]} is evicted for a younger"
            if overdue is not None and plan.blocked == overdue:
                ahead = isinstance(action, Load) and (overdue, "host") in self.there
                harmless = ahead or place <= wants.index(overdue)
                assert harmless, f"{digest[:12]} takes the room of {overdue[:12]}"

    def _check_impossible(self, digest: str) -> None:
        size = self.sizes[digest]
        never = any(
            size > self.budget(t) or self.pinned_bytes(t, digest) + size > self.budget(t)
            for t in TIERS
        )
        assert never, f"{digest[:12]} is given up, but would fit"

    def _check_lowered(self) -> None:
        """Check that copies beyond a lowered budget are in use."""
        for tier in TIERS:
            self.most[tier] = self.used(tier)
            if self.most[tier] <= self.budget(tier):
                continue
            self.seen["past a budget"] += 1
            for digest in [d for d, t in self.there if t == tier]:
                used = (digest, "device") in self.coming or (
                    self.held(digest) and (tier == "device" or self.shared)
                )
                assert used or self._kept(digest, tier), f"{digest[:12]} is past the budget"

    def carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Load(source):
                    self._begin(source.weights_digest, "host")
                case Drop():
                    self._drop(action)
                case _:
                    assert (action.weights_digest, "host") in self.there, "moved from nowhere"
                    self._begin(action.weights_digest, "device")
            for tier in TIERS:
                most = max(self.budget(tier), self.most.get(tier, 0))
                assert self.used(tier) <= most, f"more in {tier} than its budget"

    def _begin(self, digest: str, tier: MemoryTier) -> None:
        assert (digest, tier) not in {*self.there, *self.coming}, "brought twice"
        needed = self.leases(digest) or digest in self.wanted
        assert needed, f"{digest[:12]} is brought for nobody"
        self.coming.append((digest, tier))

    def _drop(self, drop: Drop) -> None:
        digest, tier = drop.weights_digest, drop.tier
        in_use = self.held(digest) and (tier == "device" or self.shared)
        assert not in_use, f"{digest[:12]} was evicted from {tier} while held"
        if drop.cause in ("capacity", "budget"):
            assert not self._kept(digest, tier), f"pinned {digest[:12]} was evicted"
        if tier == "host":
            assert (digest, "device") not in self.coming, "evicted while it was copied"
        self.there.remove((digest, tier))

    def arrive(self, index: int = 0) -> None:
        digest, tier = self.coming.pop(index)
        self.there.add((digest, tier))
        (self.residency.loaded if tier == "host" else self.residency.moved)(digest)
        if tier == "device" or self.wanted.get(digest) == "host":
            self.wanted.pop(digest, None)
        self.carry_out(self.residency.settle(digest))
        self._drained(digest)

    def fail(self, digest: str) -> None:
        """Fail a load: all requests that wait for it end."""
        if (digest, "device") not in self.there:
            self.end_all(digest)
        self.coming = [(d, t) for d, t in self.coming if d != digest]
        self.residency.failed(digest)
        self.wanted.pop(digest, None)
        if digest in self.pins and (digest, self.pins[digest]) not in self.there:
            del self.pins[digest]
        self.carry_out(self.residency.settle(digest))
        self._drained(digest)

    def find_place(self, index: int) -> None:
        """Handle a copy to DEVICE that finds no place: another copy is evicted, or it is tried
        again, or it fails."""
        digest, tier = self.coming[index]
        assert tier == "device"
        drops = self.residency.find_place(digest)
        if drops is None:
            for other in [d for d, t in self.there if t == tier]:
                assert self._kept(other, tier), f"{other[:12]} could leave"
                assert not self.leases(other), f"{other[:12]} may be waited for"
            self.fail(digest)
            return
        self.coming.pop(index)
        self.carry_out([*drops, *self.residency.settle(digest)])
        self._drained(digest)

    def end_all(self, digest: str) -> None:
        for request in [r for r in self.requests if r.digest == digest]:
            self.finish(request)

    # --------------------------------------------------------------------- operators

    def activate(self, source: AdapterSource, tier: MemoryTier, *, pin: bool) -> bool:
        """Activate; return False if it was refused, as it must be if it cannot fit."""
        digest, size = source.weights_digest, source.parameters
        refused = any(size > self.budget(each) for each in TIERS)
        if pin:
            kept = TIERS if self.shared and tier == "device" else (tier,)
            refused |= any(self.pinned_bytes(t, digest) + size > self.budget(t) for t in kept)
        if refused:
            with pytest.raises(AdapterBudgetExceeded):
                self.residency.activate(source, tier, pin)
            return False
        self.sizes[digest] = size
        there = (digest, tier) in self.there
        there |= not pin and (digest, "device") in self.there
        assert self.residency.activate(source, tier, pin) == there
        self.draining.discard(digest)
        self.forgotten.discard(digest)
        if pin:
            self.pins[digest] = tier
        if not there and self.wanted.get(digest) != "device":
            self.wanted[digest] = tier
        return True

    def evict(self, digest: str, mode: str, *, unpin: bool) -> None:
        """Evict as the engine's loop does; check that it is refused if it must be."""
        if mode == "abort":
            self.end_all(digest)
        refused: type[Exception] | None = None
        if digest in self.pins and not unpin:
            refused = AdapterPinned
        elif self.leases(digest) and mode == "fail_if_busy":
            refused = AdapterInUse
        if refused is not None:
            with pytest.raises(refused):
                self.residency.evict(digest, mode, unpin)  # type: ignore[arg-type]
            return
        forget = mode == "forget"
        busy = bool(self.leases(digest)) if forget else self.held(digest)
        busy |= self._is_coming(digest)
        copies = sum(d == digest for d, _ in self.there)
        freed = (min(1, copies) if self.shared else copies) * self.sizes.get(digest, 0)
        now, count, actions = self.residency.evict(digest, mode, unpin)  # type: ignore[arg-type]
        assert (now, count) == ((False, 0) if busy else (True, freed))
        self.pins.pop(digest, None)
        self.wanted.pop(digest, None)
        if busy:
            (self.forgotten if forget else self.draining).add(digest)
        self.carry_out(actions)
        self._drained(digest)
        assert busy or self._tier(digest) == "disk"

    def unpin(self, digest: str) -> None:
        self.residency.unpin(digest)
        self.pins.pop(digest, None)

    def set_budgets(self, host: int | None, device: int | None) -> None:
        before = dict(self.budgets)
        self.budgets["host"] = before["host"] if host is None else host
        self.budgets["device"] = before["device"] if device is None else device
        if any(self.pinned_bytes(tier, "") > self.budget(tier) for tier in TIERS):
            self.budgets = before
            with pytest.raises(AdapterBudgetExceeded):
                self.residency.set_budgets(host=host, device=device)
            return
        self.residency.set_budgets(host=host, device=device)
        self.most = {tier: self.used(tier) for tier in TIERS}

    # ------------------------------------------------------------------------ checks

    def _tier(self, digest: str) -> str:
        return next((tier for tier in TIERS if (digest, tier) in self.there), "disk")

    def _drained(self, digest: str) -> None:
        """Check evictions that waited; call this when something that they wait for has
        ended."""
        if self._is_coming(digest):
            return
        if digest in self.draining and not self.held(digest):
            self.draining.remove(digest)
            self.seen["drained"] += 1
            assert self._tier(digest) == "disk", f"{digest[:12]} should have been drained"
        if digest in self.forgotten and not self.leases(digest):
            self.forgotten.remove(digest)
            assert self._tier(digest) == "disk", f"{digest[:12]} should have been forgotten"

    def check(self) -> None:
        """Check that residency's state matches all calls and actions so far."""
        residency = self.residency
        running = [r.digest for r in self.requests if r.running]
        integrity.run(residency.integrity(running, [r.digest for r in self.requests]))
        for digest in self.sizes:
            assert residency.tier(digest) == self._tier(digest)
            for tier in TIERS:
                pinned = self.pins.get(digest) == tier
                assert residency.pinned(digest, tier) == pinned, f"pin of {digest[:12]} differs"
        for tier in TIERS:
            assert residency.bytes_in(tier) == self.used(tier)
            assert residency.count_in(tier) == sum(t == tier for _, t in self.there)
            assert residency.budget(tier) == self.budgets[tier]

    def settle(self) -> None:
        """Check that without failures and new requests, every request gets its adapter, every
        activation is carried out, and every budget is met."""
        for request in [r for r in self.requests if r.running]:
            self.finish(request)
        while self.requests:
            oldest = self.requests[0]
            for _ in range(ROUNDS * (1 + len(self.wanted))):
                self._round()
                if oldest not in self.requests or self.start(oldest):
                    break
            else:
                raise AssertionError(f"{oldest.digest[:12]} waits for ever")
            if oldest in self.requests:
                self.finish(oldest)
        for _ in range(ROUNDS * (1 + len(self.wanted))):
            self._round()
        assert not self.wanted, "an activation is never carried out"
        for tier in TIERS:
            assert self.used(tier) <= self.budget(tier), f"the {tier} budget is not kept"
        self.check()

    def _round(self) -> None:
        self.plan()
        while self.coming:
            self.arrive()


def _with_drops(actions: Iterable[Action]) -> Iterator[tuple[list[Drop], Action]]:
    """Yield each load and move with the evictions that make room for it."""
    drops: list[Drop] = []
    for action in actions:
        if not isinstance(action, Drop):
            yield drops, action
            drops = []
        elif action.cause == "capacity":
            drops.append(action)
    assert not drops, "evicted for nothing"
