"""Scheduler, block manager and residency as one pure state machine."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from veneer_registry.errors import AdapterBudgetExceeded, AdapterInUse, AdapterPinned
from veneer_server.engine.block_manager import BlockManager
from veneer_server.engine.messages import AdapterSource, SamplingParams, Submit
from veneer_server.engine.residency import Drop, Load, MoveToDevice, Residency
from veneer_server.engine.scheduler import Scheduler, SchedulerLimits
from veneer_server.engine.sequence import Finish, Sequence, StepPlan, StepResult

SIZE = 100


def adapter(name: str, size: int = SIZE) -> AdapterSource:
    return AdapterSource(weights_digest=name, folder="", parameters=size, name=name)


@dataclass
class World:
    """A scheduler with a clock and an adapter memory that is instantly obedient
    when told to be; tokens are a function of the sequence, so mix-ups show."""

    device: int = 3 * SIZE
    host: int = 6 * SIZE
    blocks: int = 17
    max_running: int = 8
    budget: int = 32
    now: float = 0.0
    pending: list[tuple[str, str]] = field(default_factory=list)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, Finish] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.residency = Residency(self.host, self.device, itemsize=1)
        self.scheduler = Scheduler(
            SchedulerLimits(self.budget, self.max_running, context_length=64, patience=5),
            BlockManager(self.blocks, 4),
            self.residency,
            frozenset({0}),
        )

    def submit(self, number: int, prompt: int, new: int, source: AdapterSource | None) -> None:
        request = Submit(
            sequence=number,
            prompt=[1] * prompt,
            max_tokens=new,
            sampling=SamplingParams(),
            adapter=source,
        )
        found = self.residency.lease(source) if source else None
        self.scheduler.add(Sequence(request, self.now, found))
        self.outputs[number] = []

    def plan_adapters(self) -> None:
        actions, impossible = self.scheduler.plan_adapters(self.now)
        assert not impossible
        for action in actions:
            match action:
                case Load():
                    self.pending.append((action.source.weights_digest, "host"))
                case MoveToDevice():
                    self.pending.append((action.weights_digest, "device"))

    def arrive(self, index: int = 0) -> None:
        digest, tier = self.pending.pop(index)
        (self.residency.loaded if tier == "host" else self.residency.moved)(digest)
        self.residency.settle(digest)

    def step(self) -> StepPlan | None:
        self.now += 1
        self.plan_adapters()
        plan = self.scheduler.schedule(self.now)
        if plan is not None:
            self.apply(plan)
        self.scheduler.check_integrity()
        return plan

    def apply(self, plan: StepPlan) -> None:
        tokens = tuple(
            100 * p.sequence + p.position if p.samples else None for p in plan.sequences
        )
        nothing: tuple[float | None, ...] = (None,) * len(tokens)
        result = StepResult(tokens, nothing, ((),) * len(tokens), (True,) * len(tokens))
        for update in self.scheduler.update(plan, result, lambda actions: None):
            assert update.token is not None
            self.outputs[update.sequence.id].append(update.token)
            if update.finish is not None:
                self.finished[update.sequence.id] = update.finish

    def drain(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work():
                return
            self.step()
            while self.pending:
                self.arrive()
        raise AssertionError("sequences never ended: starved")


def test_rows_are_sorted_by_adapter_and_the_base_comes_first() -> None:
    world = World(blocks=60)
    for number, name in enumerate(["b", "a", "", "b", "a", ""]):
        world.submit(number, 2, 20, adapter(name) if name else None)
    for _ in range(4):
        world.step()
        while world.pending:
            world.arrive()
    plan = world.step()
    assert plan is not None
    assert [p.digest for p in plan.sequences] == [None, None, "a", "a", "b", "b"]
    assert plan.adapters == ("a", "b")


def test_a_decoding_sequence_takes_part_in_every_step_while_others_prefill() -> None:
    world = World(budget=8, blocks=40)
    world.submit(1, 3, 30, None)
    world.step()
    for number in range(2, 5):
        world.submit(number, 20, 2, None)
    for _ in range(12):
        plan = world.step()
        assert plan is not None
        assert 1 in [p.sequence for p in plan.sequences]
        assert plan.rows <= 8


def test_a_sequence_whose_adapter_is_loading_does_not_block_others() -> None:
    world = World()
    world.submit(1, 2, 2, adapter("slow"))
    world.submit(2, 2, 2, None)
    world.step()
    assert world.outputs[2]
    assert not world.outputs[1]


def test_preempted_sequences_resume_with_the_same_tokens() -> None:
    # 16 usable blocks of 4 tokens; three sequences of up to 32 tokens cannot all fit.
    world = World()
    for number in (1, 2, 3):
        world.submit(number, 6, 26, None)
    world.drain()
    for number in (1, 2, 3):
        assert world.outputs[number] == [100 * number + p for p in range(6, 32)]
        assert world.finished[number] is Finish.LENGTH


def test_the_oldest_waiter_gets_room_for_its_adapter_despite_steady_traffic() -> None:
    """One adapter fills the device and is always in use; another must still get in."""
    world = World(device=SIZE)
    world.submit(1, 2, 20, adapter("busy"))
    for number in range(2, 60):
        if number == 5:
            world.submit(1000, 2, 2, adapter("late"))
        world.submit(number, 2, 20, adapter("busy"))
        world.step()
        while world.pending:
            world.arrive()
    assert 1000 in world.finished, "starved by younger requests"


def test_what_an_older_request_wants_is_not_evicted_for_a_younger_one() -> None:
    world = World(device=SIZE, host=4 * SIZE)
    world.submit(1, 2, 1, adapter("first"))
    world.submit(2, 2, 1, adapter("second"))
    world.plan_adapters()
    world.arrive()
    world.plan_adapters()
    while world.pending:
        world.arrive()
    assert world.residency.tier("first") == "device"
    world.plan_adapters()
    assert world.residency.tier("first") == "device"


def test_an_adapter_larger_than_a_budget_is_refused_at_once() -> None:
    residency = Residency(host_budget=50, device_budget=500, itemsize=4)
    with pytest.raises(AdapterBudgetExceeded, match="host-cache-bytes"):
        residency.lease(adapter("big", 20))


def test_pinned_adapters_are_kept_and_what_cannot_fit_beside_them_is_named() -> None:
    residency = Residency(host_budget=1000, device_budget=250, itemsize=1)
    for name in ("one", "two"):
        assert not residency.activate(adapter(name), "device", pin=True)
        residency.plan([])
        residency.loaded(name)
        residency.plan([])
        residency.moved(name)
    with pytest.raises(AdapterBudgetExceeded, match="pinned"):
        residency.activate(adapter("three"), "device", pin=True)
    residency.lease(adapter("four"))
    residency.plan(["four"])
    residency.loaded("four")
    assert residency.plan(["four"]).impossible == ("four",)


def test_eviction_modes() -> None:
    residency = Residency(host_budget=1000, device_budget=1000, itemsize=1)
    residency.lease(adapter("a"))
    residency.plan(["a"])
    residency.loaded("a")
    residency.plan(["a"])
    residency.moved("a")
    with pytest.raises(AdapterInUse):
        residency.evict("a", "fail_if_busy", unpin=False)
    assert residency.evict("a", "drain", unpin=False) == (False, 0, [])
    assert residency.tier("a") == "device"
    assert residency.release("a") == [Drop("a", "device", "admin"), Drop("a", "host", "admin")]
    assert residency.tier("a") == "disk"
    residency.activate(adapter("a"), "host", pin=True)
    residency.plan([])
    residency.loaded("a")
    with pytest.raises(AdapterPinned):
        residency.evict("a", "drain", unpin=False)
    assert residency.evict("a", "drain", unpin=True)[:2] == (True, SIZE)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.integers(1, 30),
            st.integers(1, 30),
            st.sampled_from(["", "a", "b", "c", "d", "e", "f", "g", "h"]),
        ),
        st.tuples(st.just("cancel"), st.integers(1, 40)),
        st.tuples(st.just("arrive"), st.integers(0, 5)),
        st.tuples(st.just("fail"), st.integers(0, 5)),
        st.tuples(
            st.just("evict"),
            st.sampled_from("abcdefgh"),
            st.sampled_from(["drain", "fail_if_busy"]),
        ),
        st.tuples(st.just("step")),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(ACTIONS)
def test_no_history_loses_a_block_a_hold_or_a_request(
    history: list[tuple[object, ...]],
) -> None:
    world = World()
    asked: dict[int, tuple[int, int]] = {}
    ended: set[int] = set()
    for action in history:
        match action:
            case ("submit", int(prompt), int(new), str(name)):
                number = len(asked) + 1
                asked[number] = (prompt, new)
                world.submit(number, prompt, new, adapter(name) if name else None)
            case ("cancel", int(number)):
                world.scheduler.cancel(number)
                ended.add(number)
            case ("arrive", int(index)) if world.pending:
                world.arrive(index % len(world.pending))
            case ("fail", int(index)) if world.pending:
                digest, _ = world.pending.pop(index % len(world.pending))
                for sequence in world.scheduler.using(digest):
                    world.scheduler.cancel(sequence.id)
                    ended.add(sequence.id)
                world.residency.failed(digest)
            case ("evict", str(name), str(mode)):
                try:
                    world.residency.evict(name, mode, unpin=False)  # type: ignore[arg-type]
                except AdapterInUse:
                    note(f"{name} busy")
            case ("step",):
                world.step()
        world.scheduler.check_integrity()
    while world.pending:
        world.arrive()
    world.drain()
    assert world.scheduler.blocks.used == 0
    for number, (prompt, new) in asked.items():
        if number in ended:
            continue
        assert number in world.finished
        assert world.outputs[number] == [100 * number + p for p in range(prompt, prompt + new)]
