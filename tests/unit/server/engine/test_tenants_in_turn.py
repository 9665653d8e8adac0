"""Who starts first: tenants by service, adapters in turn, priorities inside a tenant."""

from __future__ import annotations

from tests.unit.server.engine.world import SIZE, World, adapter


def started(world: World) -> list[int]:
    """Numbers of the sequences in the order in which they started."""
    return world.starts


def run_until(world: World, number: int, limit: int = 500) -> int:
    """Steps until a sequence has its first token; loads end at once."""
    for step in range(1, limit):
        world.step()
        while world.pending:
            world.arrive()
        if world.outputs[number]:
            return step
    raise AssertionError(f"{number} got no token in {limit} steps")


def test_a_tenant_with_many_requests_delays_another_ones_by_a_turn() -> None:
    world = World(blocks=200, max_running=2)
    for number in range(1, 60):
        world.ask(number, [-number] * 4, 8, tenant="hog")
    for _ in range(20):
        world.step()
    world.ask(1000, [-1000] * 4, 8, tenant="light")
    # What runs ends within 8 steps, and then it is the light one's turn.
    assert run_until(world, 1000) <= 8 + 2
    world.drain()


def test_who_alternates_idling_and_bursts_gains_nothing() -> None:
    world = World(blocks=200, max_running=1)
    number = 0
    for burst in range(6):
        for _ in range(30):  # idle, while the other one is served
            number += 1
            world.ask(number, [-number] * 4, 2, tenant="steady")
            world.step()
        before = len(started(world))
        for each in range(20):
            bursty = 1000 + 100 * burst + each
            world.ask(bursty, [-bursty] * 4, 2, tenant="bursty")
        for _ in range(40):
            world.step()
        during = started(world)[before:][:16]
        assert sum(n < 1000 for n in during) >= 7, "half of them are the steady one's"
        for each in list(world.live):
            if each >= 1000:
                world.cancel(each)
    world.drain()


def test_a_weight_of_three_is_three_times_the_service() -> None:
    world = World(blocks=200, max_running=1)
    for number in range(1, 41):
        world.ask(number, [-number] * 4, 2, tenant="one", weight=1)
        world.ask(number + 100, [-number - 100] * 4, 2, tenant="three", weight=3)
    for _ in range(60):
        world.step()
    starts = started(world)
    three = sum(number > 100 for number in starts)
    assert 2.5 <= three / (len(starts) - three) <= 3.5


def test_adapters_of_a_tenant_take_turns() -> None:
    world = World(device=4 * SIZE, blocks=200, max_running=1, max_wait=0)
    for number in range(1, 20):
        world.ask(number, [-number] * 2, 1, adapter("busy"), tenant="a")
    for _ in range(3):
        world.step()
        while world.pending:
            world.arrive()
    world.ask(100, [-100] * 2, 1, adapter("quiet"), tenant="a")
    world.ask(101, [-101] * 2, 1, adapter("quiet"), tenant="a")
    world.step()
    while world.pending:
        world.arrive()
    world.drain()
    order = started(world)
    first, second = order.index(100), order.index(101)
    assert second - first == 2, "the other adapter's turn is between them"
    assert first < 8


def test_a_priority_counts_inside_its_tenant_only() -> None:
    world = World(blocks=200, max_running=1)
    for number in range(1, 11):
        world.ask(number, [-number] * 2, 1, tenant="a")
    world.ask(20, [-20] * 2, 1, tenant="a", priority=-5)
    world.ask(21, [-21] * 2, 1, tenant="a", priority=5)
    for number in range(31, 41):
        world.ask(number, [-number] * 2, 1, tenant="b")
    world.drain()
    order = started(world)
    assert order.index(20) <= 1, "the most urgent one of its tenant"
    assert order.index(21) >= 18, "the least urgent one"
    ours = [n for n in order if n < 30]
    assert {n > 30 for n in order[:2]} == {True, False}, "tenants take turns all the same"
    assert ours[1:11] == list(range(1, 11))


def test_ten_seconds_of_waiting_are_worth_a_step_of_priority() -> None:
    """So a request is overtaken for ever by none."""
    world = World(blocks=200, max_running=1)
    world.ask(1, [-1] * 2, 3, tenant="a")
    world.step(0.0)
    world.ask(2, [-2] * 2, 1, tenant="a", priority=2)
    for number in range(10, 60):
        world.ask(number, [-number] * 2, 1, tenant="a")
        world.step(1.0)
    order = started(world)
    before = [n for n in order[: order.index(2)] if n >= 10]
    assert 15 <= len(before) <= 25


def test_a_tenant_that_waits_for_many_adapters_delays_no_other_ones_load() -> None:
    world = World(device=100 * SIZE, host=100 * SIZE, blocks=200)
    for number in range(1, 50):
        world.ask(number, [-number] * 2, 1, adapter(f"hog {number}"), tenant="hog")
    world.ask(100, [-100] * 2, 1, adapter("light"), tenant="light")
    world.plan_adapters()
    assert ("light", "host") in world.pending
    world.drain()


def test_a_tenant_without_its_adapters_delays_no_other() -> None:
    world = World(device=100 * SIZE, host=100 * SIZE, blocks=200, max_running=2)
    for number in range(1, 20):
        world.ask(number, [-number] * 2, 2, adapter(f"cold {number}"), tenant="cold")
    for number in range(101, 120):
        world.ask(number, [-number] * 2, 2, tenant="warm")
    for _ in range(19 * 2):  # no load ends
        world.step()
    assert all(number in world.finished for number in range(101, 120))


def test_a_want_without_room_holds_back_those_whose_turn_is_later() -> None:
    world = World(device=SIZE, host=100 * SIZE, blocks=200, patience=3, max_running=8)
    world.ask(1, [-1] * 2, 20, adapter("busy"), tenant="running")
    for _ in range(3):
        world.step()
        while world.pending:
            world.arrive()
    world.ask(2, [-2] * 2, 1, adapter("lacking"), tenant="waits")
    for _ in range(6):
        world.step()
        while world.pending:
            world.arrive()
    world.ask(3, [-3] * 2, 1, adapter("busy"), tenant="third")
    world.ask(4, [-4] * 2, 1, tenant="fourth")
    world.drain()
    order = started(world)
    assert order.index(2) < order.index(3), "it kept the room taken"
    assert order.index(4) < order.index(2), "the base takes no room"


def test_scarce_room_goes_to_tenants_in_turn() -> None:
    """Though each of the hog's wants is older than the light one's."""
    world = World(device=SIZE, host=100 * SIZE, blocks=200, patience=1)
    for number in range(1, 31):
        world.ask(number, [-number] * 2, 2, adapter(f"hog {number}"), tenant="hog")
    for _ in range(4):
        world.step()
        while world.pending:
            world.arrive()
    world.ask(100, [-100] * 2, 2, adapter("light"), tenant="light")
    before = len(world.finished)
    run_until(world, 100)
    assert len(world.finished) - before <= 2
    world.drain()


def test_of_tenants_with_equal_service_the_newcomer_goes_first() -> None:
    """Who comes back from idle is lifted to the other's service, and so is equal to it."""
    world = World(blocks=200, max_running=1)
    for number in range(1, 10):
        world.ask(number, [-number] * 4, 4, tenant="hog")
    while len(world.finished) < 2:
        world.step()
    assert world.scheduler.running == 0, "the place has just become free"
    world.ask(100, [-100] * 4, 4, tenant="light")
    before = len(started(world))
    run_until(world, 100)
    assert started(world)[before] == 100
