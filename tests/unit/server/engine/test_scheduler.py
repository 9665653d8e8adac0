"""Scheduler, block manager and residency as one pure state machine."""

from __future__ import annotations

import pytest
from veneer_registry.errors import AdapterBudgetExceeded, AdapterInUse, AdapterPinned
from veneer_server.engine.residency import Drop, Residency
from veneer_server.engine.sequence import Finish

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
