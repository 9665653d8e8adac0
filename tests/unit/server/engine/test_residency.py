"""What may be evicted from which tier, and that budgets always hold.

`Memory` is a FAKE: it does what `Residency` decides and counts the bytes actually used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from veneer_registry.errors import AdapterBudgetExceeded, AdapterInUse, AdapterPinned
from veneer_server.engine import integrity
from veneer_server.engine.residency.ledger import Ledger
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.residency.tiers import (
    Action,
    Drop,
    LedgerEntry,
    Load,
    MemoryTier,
    MoveToDevice,
    ResidencyPlan,
)
from veneer_server.wire.messages import EvictMode

from tests.unit.server.engine.world import SIZE, adapter

SIZES = {name: 40 + 20 * i for i, name in enumerate("abcdef")}


@dataclass
class Memory:
    """Adapters in tiers; a transfer takes its room when it begins and ends in `arrive`."""

    host: int = 10 * SIZE
    device: int = 10 * SIZE
    shared: bool = False
    there: dict[tuple[str, str], None] = field(default_factory=dict)
    coming: dict[tuple[str, str], None] = field(default_factory=dict)
    holds: list[str] = field(default_factory=list)
    leases: list[str] = field(default_factory=list)
    pins: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    """Bytes by tier that may be held although a budget was lowered; less at each planning."""

    def __post_init__(self) -> None:
        self.residency = Residency(self.host, self.device, itemsize=1, shared=self.shared)

    # ------------------------------------------------------------ what happens

    def activate(
        self, name: str, tier: MemoryTier, pin: bool = False, size: int = SIZE
    ) -> bool:
        self.sizes[name] = size
        there = self.residency.activate(adapter(name, size), tier, pin)
        if pin:
            self.pins[name] = tier
        return there

    def lease(self, name: str, size: int = SIZE) -> None:
        self.sizes[name] = size
        self.residency.lease(adapter(name, size))
        self.leases.append(name)

    def release(self, index: int) -> None:
        name = self.leases.pop(index)
        self.carry_out(self.residency.release(name))

    def hold(self, name: str) -> None:
        if self.residency.try_hold(name):
            assert (name, "device") in self.there
            self.holds.append(name)

    def plan(self) -> ResidencyPlan:
        waiting = list(self.leases)
        for name in self.holds:
            waiting.remove(name)
        plan = self.residency.plan(list(dict.fromkeys(waiting)))
        self.carry_out(plan.actions)
        self.check_in_use()
        for name in plan.impossible:
            self.fail(name)
        return plan

    def carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Load(source):
                    self.coming[source.weights_digest, "host"] = None
                case Drop(name, tier, cause):
                    del self.there[name, tier]
                    assert cause != "capacity" or self.pins.get(name) != tier, "a pin broke"
                case _:
                    assert (action.weights_digest, "host") in self.there
                    self.coming[action.weights_digest, "device"] = None
            self.check()

    def arrive(self, index: int = 0) -> None:
        name, tier = list(self.coming)[index]
        del self.coming[name, tier]
        self.there[name, tier] = None
        (self.residency.loaded if tier == "host" else self.residency.moved)(name)
        self.carry_out(self.residency.settle(name))

    def fail(self, name: str) -> None:
        for tier in ("host", "device"):
            self.coming.pop((name, tier), None)
        while name in self.leases and name not in self.holds:
            self.release(self.leases.index(name))
        self.residency.failed(name)
        if (name, self.pins.get(name)) not in self.there:
            self.pins.pop(name, None)

    def evict(self, name: str, mode: EvictMode, unpin: bool) -> None:
        done, freed, actions = self.residency.evict(name, mode, unpin)
        self.pins.pop(name, None)
        before = self.held()
        self.carry_out(actions)
        assert freed == before - self.held()
        assert done or not freed

    def set_budgets(self, host: int | None, device: int | None) -> None:
        self.residency.set_budgets(host=host, device=device)
        self.host = self.host if host is None else host
        self.device = self.device if device is None else device
        self.most = {tier: self.used(tier) for tier in ("host", "device")}

    def settle(self) -> ResidencyPlan:
        """Plan and let all transfers end, until nothing changes."""
        while True:
            plan = self.plan()
            if not self.coming:
                return plan
            while self.coming:
                self.arrive()

    # ------------------------------------------------------------ what must hold

    def held(self) -> int:
        """Bytes really held: with shared memory, a DEVICE copy is the HOST copy."""
        copies = self.there | self.coming
        if self.shared:
            return sum(self.sizes[name] for name in {name for name, _ in copies})
        return sum(self.sizes[name] for name, _ in copies)

    def budget(self, tier: str) -> int:
        if tier == "device":
            return self.device
        return max(self.host, self.device) if self.shared else self.host

    def used(self, tier: str) -> int:
        copies = self.there | self.coming
        return sum(self.sizes[name] for name, where in copies if where == tier)

    def check(self) -> None:
        for tier in ("host", "device"):
            most = max(self.budget(tier), self.most.get(tier, 0))
            assert self.used(tier) <= most, f"more in {tier} than was planned"
        if self.shared:
            most = max(self.host, self.device, self.most.get("host", 0))
            assert self.held() <= most, "more than was planned"
        for name in self.holds:
            assert (name, "device") in self.there, "a held adapter was evicted"
        integrity.run(self.residency.integrity(self.holds, self.leases))

    def check_in_use(self) -> None:
        """After a planning: what is past a budget that was lowered is in use."""
        for tier in ("host", "device"):
            self.most[tier] = self.used(tier)
            if self.most[tier] <= self.budget(tier):
                continue
            for name in (name for name, where in self.there if where == tier):
                in_use = (tier == "device" or self.shared) and name in self.holds
                in_use = in_use or (name, "device") in self.coming
                pin = self.pins.get(name)
                pinned = pin == tier or (self.shared and pin is not None)
                assert in_use or pinned, f"{name} is past the {tier} budget, and not in use"


# ----------------------------------------------------------------------- properties

Steps = list[tuple[str, object]]
Check = Callable[[Steps, tuple[int, int], bool], None]

_NAMES = st.sampled_from(sorted(SIZES))
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("lease"), _NAMES),
        st.tuples(st.just("release"), st.integers(0, 20)),
        st.tuples(st.just("hold"), st.integers(0, 20)),
        st.tuples(st.just("unhold"), st.integers(0, 20)),
        st.tuples(st.just("plan"), st.none()),
        st.tuples(st.just("settle"), st.none()),
        st.tuples(st.just("arrive"), st.integers(0, 20)),
        st.tuples(st.just("fail"), st.integers(0, 20)),
        st.tuples(
            st.just("activate"),
            st.tuples(_NAMES, st.sampled_from(["host", "device"]), st.booleans()),
        ),
        st.tuples(
            st.just("evict"),
            st.tuples(
                _NAMES, st.sampled_from(["drain", "fail_if_busy", "forget"]), st.booleans()
            ),
        ),
        st.tuples(
            st.just("budgets"),
            st.tuples(
                st.sampled_from([None, 90, 150, 400]), st.sampled_from([None, 90, 150, 400])
            ),
        ),
    ),
    min_size=20,
    max_size=60,
)
_BUDGETS = st.sampled_from([(150, 150), (400, 150), (150, 400), (300, 300)])


def live(steps: Steps, budgets: tuple[int, int], shared: bool) -> Memory:
    """Whatever a server may do to its adapters, in any order; checked at every step."""
    memory = Memory(*budgets, shared=shared)
    for kind, what in steps:
        # When refused, the caller is told, and nothing has changed.
        with contextlib.suppress(AdapterBudgetExceeded, AdapterInUse, AdapterPinned):
            _do(memory, kind, what)
        memory.check()
    return memory


def _do(memory: Memory, kind: str, what: object) -> None:
    at = what if isinstance(what, int) else 0
    waiting = list(memory.leases)
    for name in memory.holds:
        waiting.remove(name)
    match kind, what:
        case "lease", str(name):
            memory.lease(name, SIZES[name])
        case "release", _ if waiting:
            memory.release(memory.leases.index(waiting[at % len(waiting)]))
        case "hold", _ if waiting:
            memory.hold(waiting[at % len(waiting)])
        case "unhold", _ if memory.holds:
            name = memory.holds.pop(at % len(memory.holds))
            memory.residency.unhold(name)
            memory.release(memory.leases.index(name))
        case "plan", _:
            memory.plan()
        case "settle", _:
            memory.settle()
        case "arrive", _ if memory.coming:
            memory.arrive(at % len(memory.coming))
        case "fail", _ if memory.coming:
            memory.fail(list(memory.coming)[at % len(memory.coming)][0])
        case "activate", (str(name), ("host" | "device") as tier, bool(pin)):
            memory.activate(name, tier, pin, SIZES[name])
        case "budgets", ((int() | None) as host, (int() | None) as device):
            memory.set_budgets(host, device)
        case "evict", (str(name), ("drain" | "fail_if_busy" | "forget") as mode, bool(unpin)):
            memory.evict(name, mode, unpin)


def check_budgets(steps: Steps, budgets: tuple[int, int], shared: bool) -> None:
    """What is really held never passes the budgets, and pins and holds are kept."""
    live(steps, budgets, shared)


def check_service(steps: Steps, budgets: tuple[int, int], shared: bool) -> None:
    """After anything at all, when all requests have ended: each adapter can be served,
    unless the operator's pins really leave no room for it."""
    memory = live(steps, budgets, shared)
    while memory.holds:
        _do(memory, "unhold", 0)
    while memory.leases:
        memory.release(0)
    memory.settle()
    assert all(memory.used(tier) <= memory.budget(tier) for tier in ("host", "device"))
    host, device = memory.host, memory.device
    budgets = (host, device)
    for name, size in SIZES.items():
        others = {n: tier for n, tier in memory.pins.items() if n != name}
        on_device = sum(SIZES[n] for n, tier in others.items() if tier == "device")
        on_host = sum(SIZES[n] for n, tier in others.items() if shared or tier == "host")
        pins = dict(memory.pins)
        fits = on_device + size <= device and (
            on_host + size <= (max(budgets) if shared else host)
            or (name, "host") in memory.there
        )
        fits = fits or (name, "device") in memory.there
        try:
            memory.lease(name, size)
        except AdapterBudgetExceeded:
            assert size > min(device, max(budgets) if shared else host)
            continue
        memory.settle()
        assert ((name, "device") in memory.there) == fits, name
        assert memory.pins == pins, "serving one has taken another's pin"
        if name in memory.leases:
            memory.release(memory.leases.index(name))


def search(check: Check, **options: Any) -> None:
    """Hypothesis looks for a history that breaks ``check``, and prints the one it finds."""
    look = given(_STEPS, _BUDGETS, st.booleans())(check)
    settings(max_examples=400, deadline=None, **options)(look)()


@pytest.mark.push
@pytest.mark.parametrize("check", [check_budgets, check_service])
def test_whatever_happens(check: Check) -> None:
    search(check)


# ------------------------------------------------------------------- planted bugs


def _host_copies_leave_alone(patch: pytest.MonkeyPatch) -> None:
    """As with memory of its own: what a DEVICE copy shares is dropped from HOST."""
    right = Ledger.drop

    def wrong(self: Ledger, *args: Any) -> list[Drop]:
        shared, self.shared = self.shared, False
        try:
            return right(self, *args)
        finally:
            self.shared = shared

    patch.setattr(Ledger, "drop", wrong)


def _pins_count_for_both_tiers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "pin_keeps", lambda self, entry, tier: entry.pinned is not None)


def _pins_keep_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "pin_keeps", lambda self, entry, tier: False)


def _lower_budgets_drop_nothing(patch: pytest.MonkeyPatch) -> None:
    def wrong(ledger: Ledger, waiting: tuple[LedgerEntry, ...]) -> list[Drop]:
        ledger.lower_ceilings()
        return []

    patch.setattr("veneer_server.engine.residency.residency.shrink", wrong)


def _what_is_dropped_still_counts(patch: pytest.MonkeyPatch) -> None:
    right = Ledger.drop

    def wrong(self: Ledger, *args: Any) -> list[Drop]:
        drops = right(self, *args)
        self._bytes["host"] += len(drops)
        return drops

    patch.setattr(Ledger, "drop", wrong)


@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (_host_copies_leave_alone, check_budgets),
        (_pins_count_for_both_tiers, check_service),
        (_pins_keep_nothing, check_budgets),
        (_lower_budgets_drop_nothing, check_budgets),
        (_what_is_dropped_still_counts, check_budgets),
    ],
)
def test_a_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None],
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        search(check, phases=[Phase.generate], database=None)
    print(f"caught: {caught.value}")


# ----------------------------------------------------------------------- scenarios


def test_a_pin_to_host_is_none_to_device() -> None:
    memory = Memory(device=SIZE)
    for name in "ab":
        memory.activate(name, "host", pin=True)
    memory.settle()
    for name in "abca":
        memory.lease(name)
        assert memory.settle().impossible == ()
        assert memory.residency.tier(name) == "device"
        memory.release(0)
    assert memory.residency.pinned("a")
    assert memory.residency.pinned("b")
    assert {(name, "host") for name in "ab"} <= memory.there.keys()


def test_a_pin_that_holds_outlives_a_request_that_cannot_be_served() -> None:
    memory = Memory(device=SIZE)
    memory.activate("a", "device", pin=True)
    memory.activate("b", "host", pin=True)
    memory.settle()
    memory.lease("b")
    assert memory.plan().impossible == ("b",)
    assert memory.residency.pinned("b")
    assert ("b", "host") in memory.there


def test_pins_to_device_leave_host_free_where_it_has_memory_of_its_own() -> None:
    memory = Memory(host=2 * SIZE, device=4 * SIZE)
    for name in "abc":
        memory.activate(name, "device", pin=True)
        memory.settle()
    memory.lease("d")
    memory.settle()
    assert {(name, "device") for name in "abcd"} <= memory.there.keys()


def test_a_pin_to_host_brings_the_copy_that_device_does_not_keep() -> None:
    memory = Memory(host=SIZE, device=SIZE)
    memory.activate("a", "device")
    memory.settle()
    memory.activate("b", "host")
    memory.settle()
    assert ("a", "host") not in memory.there
    assert not memory.activate("a", "host", pin=True)
    memory.settle()
    assert set(memory.there) == {("a", "device"), ("a", "host")}
    assert memory.activate("a", "host", pin=True)


def test_on_a_cpu_room_in_host_is_made_by_dropping_both_copies() -> None:
    memory = Memory(host=2 * SIZE, device=2 * SIZE, shared=True)
    for name in "ab":
        memory.activate(name, "device")
        memory.settle()
    memory.lease("b")
    memory.hold("b")
    memory.lease("c")
    memory.settle()
    assert {name for name, _ in memory.there} == {"b", "c"}, "a held one is left"
    memory.hold("c")
    memory.lease("d")
    assert memory.settle().blocked == "d"
    assert {name for name, _ in memory.there} == {"b", "c"}


def test_a_refused_pin_and_a_refused_eviction_change_nothing() -> None:
    memory = Memory(device=SIZE)
    memory.activate("a", "device", pin=True)
    memory.settle()
    with pytest.raises(AdapterBudgetExceeded):
        memory.activate("b", "device", pin=True)
    assert memory.residency.bytes_of("b") == 0, "it is remembered for good"
    memory.lease("a")
    with pytest.raises(AdapterInUse):
        memory.evict("a", "fail_if_busy", True)
    assert memory.residency.pinned("a")


def test_a_later_activation_asks_for_no_less_than_an_earlier_one() -> None:
    memory = Memory()
    memory.activate("a", "device")
    memory.plan()
    memory.activate("a", "host")
    memory.settle()
    assert memory.residency.tier("a") == "device"


def test_an_adapter_that_two_cards_divide_takes_its_part_of_one() -> None:
    """Half of it at least, and what it is once it is read: some matrices are not divided."""
    residency = Residency(10 * SIZE, 2 * SIZE, itemsize=1, parts=2)
    part = SIZE * 3 // 4
    for name, size in (("a", SIZE), ("b", SIZE), ("c", SIZE), ("large", 3 * SIZE)):
        residency.lease(adapter(name, size))
    with pytest.raises(AdapterBudgetExceeded):
        residency.lease(adapter("largest", 4 * SIZE + 2))
    residency.plan(["a", "b", "c", "large"])
    for name in "abc":
        residency.loaded(name, part=part)
    plan = residency.plan(["a", "b", "c"])
    assert [a.weights_digest for a in plan.actions if isinstance(a, MoveToDevice)] == ["a", "b"]
    assert plan.blocked == "c"
    assert residency.bytes_in("device") == 2 * part
    assert residency.bytes_in("host") == 6 * SIZE
    residency.loaded("large", part=9 * SIZE // 4)
    assert residency.plan(["large"]).impossible == ("large",)
