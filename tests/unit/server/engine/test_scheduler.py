"""Scheduler, block manager and residency as one pure state machine."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, Literal

import pytest
from veneer_registry.errors import AdapterBudgetExceeded, AdapterInUse, AdapterPinned
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.residency.tiers import Drop
from veneer_server.engine.scheduling.sequence import Finish, SequenceState

from tests.refused import refused
from tests.unit.server.engine.world import SIZE, World, adapter


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


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("tenant", ["a", "b"])
def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one(
    tenant: str, streams: bool
) -> None:
    """Neither another tenant's nor one's own, beside streams or not."""
    world = World(budget=16, beside_decode=16, blocks=400)
    if streams:
        world.ask(1, [-1] * 2, 60, tenant="a")
        world.step()
    world.ask(2, [-2] * 200, 1, tenant="a")
    world.step()
    world.ask(3, [-3] * 6, 1, tenant=tenant)
    world.step()
    assert 3 in world.finished
    world.drain()


def test_a_long_prompt_gets_half_of_each_step_beside_short_ones() -> None:
    """However many come, and they get the other half."""
    world = World(budget=16, blocks=400, max_running=8)
    world.submit(1, 160, 1, None)
    world.step()
    number = 1
    for _ in range(17):
        for _ in range(4):
            number += 1
            world.submit(number, 4, 1, None)
        world.step()
    assert 1 in world.finished
    assert len(world.finished) - 1 > 1.8 * 17
    world.drain()


def test_long_prompts_of_one_caller_are_computed_one_after_another() -> None:
    """So that the first answer comes as soon as it can, and each has the whole of a step."""
    world = World(budget=16, blocks=400)
    for number in (1, 2, 3):
        world.submit(number, 64, 1, None)
    for _ in range(4):
        plan = world.step()
        assert plan is not None
        assert plan.rows == 16
    assert set(world.finished) == {1}
    assert len(world.starts) == 1
    world.drain()


def test_a_prompt_of_two_steps_does_not_wait_for_its_callers_long_one() -> None:
    world = World(budget=16, blocks=400)
    world.submit(1, 200, 1, None)
    world.step()
    world.submit(2, 14, 1, None)
    world.step()
    world.step()
    assert 2 in world.finished
    world.drain()


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_long_prompts_of_many_tenants_do_not_preempt_each_other(prefix_cache: bool) -> None:
    """Where the cache holds K and V of two of them: each is computed once."""
    world = World(budget=32, blocks=126, max_running=16, prefix_cache=prefix_cache)
    for number in range(1, 9):
        world.ask(number, [-number] * 240, 2, tenant=f"t{number}")
    world.drain()
    assert not world.preempted
    assert world.computed == 8 * 240


def test_long_prompts_of_two_tenants_get_on_together() -> None:
    """The one that comes later, and has had less, is computed within twice its own time."""
    world = World(budget=16, blocks=600)
    world.ask(1, [-1] * 800, 1, tenant="a")
    world.step()
    world.ask(2, [-2] * 128, 1, tenant="b")
    for _ in range(2 * 128 // 16 + 1):
        world.step()
    assert 2 in world.finished
    assert 1 not in world.finished
    world.drain()


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


@pytest.mark.parametrize("shared", [False, True])
def test_a_want_without_room_stops_only_what_would_take_its_room(shared: bool) -> None:
    """Younger ones that fit go on; once it has waited for `patience`, only into HOST,
    which it does not lack where the tiers have memory of their own."""
    world = World(device=3 * SIZE, host=3 * SIZE, blocks=60, patience=5, shared=shared)
    if not shared:
        world.set_budgets(host=10 * SIZE)
    world.submit(1, 2, 50, adapter("busy", 2 * SIZE))
    for _ in range(3):
        world.step()
        while world.pending:
            world.arrive()
    world.submit(2, 2, 2, adapter("big", 3 * SIZE))
    world.submit(3, 2, 2, adapter("small", SIZE // 2))
    for _ in range(5):
        world.step()
        while world.pending:
            world.arrive()
    assert 3 in world.finished
    assert 2 in world.live
    world.submit(4, 2, 2, adapter("late", SIZE // 4))
    for _ in range(10):
        world.step()
        while world.pending:
            world.arrive()
    assert 1 in world.live
    assert 4 in world.live
    assert world.residency.tier("late") == ("disk" if shared else "host")
    world.drain()


def test_small_adapters_do_not_starve_a_large_one() -> None:
    """Each fits beside those that run, so that room for the large one never comes by itself."""
    world = World(device=3 * SIZE, host=20 * SIZE, blocks=200, patience=5)
    for step in range(1, 100):
        if step == 10:
            world.submit(1000, 2, 2, adapter("large", 3 * SIZE))
        if step % 4 == 0:
            world.submit(step, 2, 8, adapter(f"small {step}", SIZE // 20))
        world.step()
        while world.pending:
            world.arrive()
        if 1000 in world.finished:
            break
    # Its patience, what ran then, its own load and tokens, and a few steps to spare.
    assert step < 10 + 5 + 10 + 5 + 5
    world.drain()


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
    with refused(AdapterBudgetExceeded, bytes=80, budget=50, tier="host"):
        residency.lease(adapter("big", 20))


def test_pinned_adapters_are_kept_and_what_cannot_fit_beside_them_is_named() -> None:
    residency = Residency(host_budget=1000, device_budget=250, itemsize=1)
    for name in ("one", "two"):
        assert not residency.activate(adapter(name), "device", pin=True)
        residency.plan([])
        residency.loaded(name)
        residency.plan([])
        residency.moved(name)
    with refused(AdapterBudgetExceeded, bytes=100, pinned=200, tier="device"):
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
    assert residency.try_hold("a")
    assert residency.evict("a", "drain", unpin=False) == (False, 0, [])
    assert residency.tier("a") == "device"
    residency.unhold("a")
    assert residency.release("a") == [Drop("a", "device", "admin"), Drop("a", "host", "admin")]
    assert residency.tier("a") == "disk"
    residency.activate(adapter("a"), "host", pin=True)
    residency.plan([])
    residency.loaded("a")
    with pytest.raises(AdapterPinned):
        residency.evict("a", "drain", unpin=False)
    assert residency.evict("a", "drain", unpin=True)[:2] == (True, SIZE)


def test_prefill_beside_decoding_streams_has_a_budget_of_its_own() -> None:
    world = World(budget=32, beside_decode=6, blocks=60)
    world.submit(1, 3, 30, None)
    world.step()
    world.submit(2, 20, 2, None)
    world.submit(3, 20, 2, None)
    sizes = []
    for _ in range(7):
        plan = world.step()
        assert plan is not None
        sizes.append({p.sequence: len(p.tokens) for p in plan.sequences})
    # The older prompt first, in chunks of 6; what is left over goes to the younger.
    assert sizes[:4] == [{1: 1, 2: 6}, {1: 1, 2: 6}, {1: 1, 2: 6}, {1: 1, 2: 2, 3: 4}]
    alone = World(budget=32, beside_decode=6, blocks=60)
    alone.submit(1, 30, 2, None)
    plan = alone.step()
    assert plan is not None
    assert plan.rows == 30


@pytest.mark.parametrize(
    ("budget", "prompt", "chunks"), [(32, 10, [10]), (32, 11, [8, 3]), (10, 10, [8, 2])]
)
def test_a_crumb_of_a_prompt_does_not_cost_all_streams_a_step(
    budget: int, prompt: int, chunks: list[int]
) -> None:
    world = World(budget=budget, beside_decode=8, blocks=60)
    world.submit(1, 3, 30, None)
    world.step()
    world.submit(2, prompt, 2, None)
    sizes = []
    for _ in chunks:
        plan = world.step()
        assert plan is not None
        sizes.append({p.sequence: len(p.tokens) for p in plan.sequences}[2])
    assert sizes == chunks
    world.drain()


def test_nobody_ends_in_the_crumb_that_an_older_prompt_could_not_use() -> None:
    world = World(budget=32, beside_decode=8, blocks=60)
    world.submit(1, 3, 30, None)
    world.step()
    world.submit(2, 20, 2, None)
    world.submit(3, 1, 2, None)
    plan = world.step()
    assert plan is not None
    assert {p.sequence: len(p.tokens) for p in plan.sequences} == {1: 1, 2: 8}
    world.drain()


def test_the_bound_of_a_deadline_leaves_out_what_may_be_preempted() -> None:
    world = World(budget=8, beside_decode=4, blocks=17)
    world.submit(1, 20, 40, None)
    world.submit(2, 30, 4, None)
    while not world.outputs[1]:
        world.step()
    world.step()
    assert world.live[2].state is SequenceState.RUNNING
    assert world.live[2].remaining > 1
    world.submit(3, 5, 2, None)
    # Its own, and a token of the first: the second may lose its blocks to the first.
    assert world.least[3].tokens == 5 + 1
    world.drain()


def residents(world: World, *names: str) -> None:
    for name in names:
        world.residency.activate(adapter(name), "device", pin=False)
    for _ in range(2):
        world.plan_adapters()
        while world.pending:
            world.arrive()


def test_while_places_are_scarce_those_go_first_that_add_no_adapter() -> None:
    world = World(max_running=2, blocks=60, max_wait=10)
    residents(world, "a", "b")
    world.submit(1, 2, 40, adapter("a"))
    world.submit(2, 2, 3, adapter("a"))
    world.step()
    world.submit(3, 2, 2, adapter("b"))
    world.submit(4, 2, 2, adapter("a"))
    world.submit(5, 2, 2, None)
    while 5 not in world.finished:
        world.step()
    assert 4 in world.finished
    assert 3 not in world.finished
    world.drain()


def test_nobody_is_overtaken_past_the_longest_wait() -> None:
    world = World(max_running=1, blocks=60, max_wait=6)
    residents(world, "a", "b")
    world.submit(1, 2, 2, adapter("a"))
    world.step()
    world.submit(2, 2, 2, adapter("b"))
    world.submit(3, 2, 2, adapter("a"))
    for number in range(4, 40):
        world.submit(number, 2, 2, None)
        world.step()
        if 2 in world.finished:
            break
    # Ages are in steps here: it is first once it has waited for 6 of them.
    assert 2 in world.finished
    assert world.now - 1 <= 6 + 4
    assert 4 in world.finished


def test_places_for_all_are_given_in_order_of_arrival() -> None:
    world = World(budget=32, beside_decode=2, blocks=60)
    residents(world, "a", "b")
    world.submit(1, 2, 20, adapter("a"))
    world.step()
    world.submit(2, 2, 2, adapter("b"))
    world.submit(3, 2, 2, adapter("a"))
    plan = world.step()
    assert plan is not None
    assert [p.sequence for p in plan.sequences] == [1, 2]


@pytest.mark.parametrize("pinned", [None, "host", "device"])
def test_who_keeps_no_room_taken_is_not_held_back(
    pinned: Literal["host", "device"] | None,
) -> None:
    """The base model and adapters pinned to DEVICE give no room by waiting."""
    world = World(device=2 * SIZE, blocks=200, patience=2)
    world.residency.activate(adapter("pin"), pinned or "device", pin=pinned is not None)
    residents(world, "pin", "busy")
    world.submit(1, 2, 40, adapter("busy"))
    world.submit(2, 2, 40, adapter("pin"))
    world.step()
    world.submit(3, 2, 2, adapter("late"))
    for _ in range(4):
        world.step()
        while world.pending:
            world.arrive()
    world.submit(4, 2, 2, None)
    world.submit(5, 2, 2, adapter("pin"))
    world.submit(6, 2, 2, adapter("busy"))
    for _ in range(4):
        world.step()
    assert 4 in world.finished
    assert (5 in world.finished) == (pinned == "device")
    assert 6 not in world.finished
    world.drain()


def test_an_operators_activation_gets_room_despite_steady_traffic() -> None:
    world = World(device=SIZE, blocks=60, patience=2)
    residents(world, "busy")
    world.submit(1, 2, 10, adapter("busy"))
    world.step()
    world.residency.activate(adapter("new"), "device", pin=False)
    for number in range(2, 30):
        world.submit(number, 2, 10, adapter("busy"))
        world.step()
        while world.pending:
            world.arrive()
        if world.residency.tier("new") == "device":
            break
    assert world.residency.tier("new") == "device"
    world.drain()


def test_exact_chunks_depend_on_the_prompt_alone() -> None:
    def chunks(world: World, number: int) -> list[tuple[int, int]]:
        found = []
        while number in world.live:
            plan = world.step()
            assert plan is not None
            found += [(p.start, len(p.tokens)) for p in plan.sequences if p.sequence == number]
        return found

    alone = World(exact=True, blocks=60, budget=64)
    alone.submit(1, 40, 5, None)
    crowded = World(exact=True, blocks=60, budget=8, beside_decode=1)
    crowded.submit(2, 3, 20, None)
    crowded.step()
    crowded.submit(1, 40, 5, None)
    crowded.submit(3, 30, 5, None)
    expected = [(0, 40), (40, 1), (41, 1), (42, 1), (43, 1)]
    assert chunks(alone, 1) == expected
    assert chunks(crowded, 1) == expected
    preempted = World(exact=True, blocks=12, budget=64)
    preempted.submit(2, 3, 30, None)
    preempted.submit(1, 34, 10, None)
    found = chunks(preempted, 1)
    assert 1 in preempted.preempted
    # Again from the start, its own tokens one by one.
    again = max(i for i, chunk in enumerate(found) if chunk == (0, 34))
    assert again > 0
    assert found[again:] == [(0, 34), *((p, 1) for p in range(34, 43))]


def lines_of_a_step(waiting: int, adapters: int) -> int:
    """Lines of Python that planning a step executes while sequences wait."""
    world = World(blocks=200, max_running=4)
    for number in range(1, 5):
        world.submit(number, 3, 30, None)
    world.step()
    for number in range(5, 5 + waiting):
        world.submit(number, 3, 3, adapter(f"{number % adapters}") if adapters else None)
    world.scheduler.plan_adapters(world.now)
    world.scheduler.schedule(world.now)
    lines = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        world.scheduler.plan_adapters(world.now)
        world.scheduler.schedule(world.now)
        assert world.scheduler.waiting_for_adapter == (waiting if adapters else 0)
    finally:
        sys.settrace(before)
    assert world.scheduler.waiting == waiting
    return lines


def test_of_many_waiting_adapters_the_longest_waiting_are_reported() -> None:
    """The engine reports them after each step; thousands would make the step longer."""
    world = World(planned=4)
    for number in range(1, 10):
        world.submit(number, 3, 3, adapter("ihgfedcba"[number - 1]))
    assert world.scheduler.waiting_adapters == ("f", "g", "h", "i")


@pytest.mark.push
@pytest.mark.parametrize("adapters", [0, 50, 3000])
def test_a_step_does_no_more_work_when_more_sequences_wait(adapters: int) -> None:
    """A step must not become longer for those that run."""
    few = lines_of_a_step(min(300, adapters or 300), adapters)
    assert lines_of_a_step(3000, adapters) <= few * 1.1
