"""Budgets that change while the engine runs: what is evicted, who waits, who fails, and
when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from veneer_registry.errors import AdapterBudgetExceeded
from veneer_server.engine.residency import load_planner
from veneer_server.wire.messages import (
    Activate,
    BudgetsState,
    Evicted,
    OperationDone,
    SequenceFailed,
    SequenceOutput,
    UpdateBudgets,
    decode_from_engine,
    decode_to_engine,
    encode,
)

from tests.planted import planted
from tests.refused import refused
from tests.unit.server.engine.test_loop import Engine, request
from tests.unit.server.engine.test_residency import Memory
from tests.unit.server.engine.world import SIZE, World, adapter


def engine(*activated: str, pin: bool = False) -> Engine:
    """With 1,000 bytes for each tier, and these adapters in both."""
    made = Engine(max_running=8, context=1000, blocks=1000)
    for number, name in enumerate(activated):
        made.inbox.put(Activate(number, adapter(name), "device", pin))
        turns(made, 5)
    return made


def turns(made: Engine, count: int) -> None:
    for _ in range(count):
        made.turn()


def update(
    made: Engine, *, host: int | None = None, device: int | None = None
) -> OperationDone:
    made.inbox.put(UpdateBudgets(99, host, device))
    made.turn()
    (done,) = [m for m in made.sent if isinstance(m, OperationDone) and m.operation == 99]
    made.sent.remove(done)
    return done


def failures(made: Engine) -> dict[int, str]:
    return {m.sequence: m.error.reason for m in made.sent if isinstance(m, SequenceFailed)}


def finished(made: Engine) -> set[int]:
    return {m.sequence for m in made.sent if isinstance(m, SequenceOutput) and m.finish}


def evicted(made: Engine) -> list[tuple[str, str, str]]:
    return [(e.weights_digest, e.tier, e.cause) for e in made.sent if isinstance(e, Evicted)]


def test_the_messages_cross_the_wire() -> None:
    sent: Sequence[UpdateBudgets] = [UpdateBudgets(1, None, 5), UpdateBudgets(2, 7)]
    assert decode_to_engine(encode(sent)[4:]) == sent
    answer = [OperationDone(1, budgets=BudgetsState(1, 2, 3, 4))]
    assert decode_from_engine(encode(answer)[4:]) == answer


def test_what_is_not_in_use_goes_at_once_and_the_answer_says_what_is_left() -> None:
    made = engine(*"abc")
    done = update(made, device=2 * SIZE)
    assert done.budgets == BudgetsState(1000, 2 * SIZE, 3 * SIZE, 2 * SIZE)
    done = update(made, host=SIZE)
    assert done.budgets == BudgetsState(SIZE, 2 * SIZE, SIZE, 2 * SIZE)
    assert {cause for _, _, cause in evicted(made)} == {"budget"}
    assert [tier for _, tier, _ in evicted(made)] == ["device", "host", "host"]
    assert len(made.memory.held) == 3
    made.loop.check_integrity()


def test_memory_that_a_backend_reserved_at_its_start_does_not_grow() -> None:
    made = engine("a")
    made.memory.room = 1000
    refusal = update(made, device=1001).error
    assert refusal is not None
    assert refusal.reason == "ADAPTER_BUDGET_EXCEEDED"
    assert "--device-adapter-bytes" in refusal.message
    for device in (SIZE, 1000):  # lowered, and raised again to what is there
        done = update(made, host=2000, device=device)
        assert done.budgets == BudgetsState(2000, device, SIZE, SIZE)


def test_a_larger_budget_is_used_in_the_same_turn() -> None:
    made = engine()
    update(made, device=SIZE)
    made.inbox.put(request(1, adapter("a"), new=500))
    turns(made, 4)
    made.inbox.put(request(2, adapter("b"), new=500))
    turns(made, 10)
    assert ("b", "device") not in made.memory.held
    assert update(made, device=2 * SIZE).budgets == BudgetsState(
        1000, 2 * SIZE, 2 * SIZE, 2 * SIZE
    )
    turns(made, 2)
    assert ("b", "device") in made.memory.held
    assert made.scheduler.running == 2


@pytest.mark.parametrize("shared", [False, True])
def test_a_lower_budget_is_kept_when_those_that_run_have_ended(
    shared: bool,
) -> None:
    """Also under steady traffic for each adapter in DEVICE, which else never goes."""

    def run() -> None:
        world = World(
            device=3 * SIZE,
            host=3 * SIZE,
            blocks=400,
            max_running=32,
            shared=shared,
            patience=5,
        )
        for number in range(1, 240):
            world.submit(number, 2, 6, adapter("abc"[number % 3]))
            if number == 60:
                world.set_budgets(host=SIZE if shared else None, device=SIZE)
                assert world.bytes_held("device") == 3 * SIZE, "all run"
            world.step()
            while world.pending:
                world.arrive()
            if number > 100:
                assert world.bytes_held("device") <= SIZE, "it is kept soon, and stays kept"
        world.drain()
        assert world.finished.keys() == set(range(1, 240))

    run()
    unmarked = planted(load_planner, "    _mark_leaving(ledger)\n    return", "    return")
    # The assertion in `run` above.
    with unmarked, pytest.raises(AssertionError, match="kept soon"):
        run()


def test_pinned_adapters_refuse_a_budget_below_them_and_nothing_changes() -> None:
    made = engine("a", "b", pin=True)
    done = update(made, device=2 * SIZE - 1)
    assert done.error is not None
    assert done.error.reason == "ADAPTER_BUDGET_EXCEEDED"
    assert "unpin" in done.error.message
    assert done.error.metadata["pinned"] == str(2 * SIZE)
    residency = made.scheduler.residency
    assert (residency.budget("host"), residency.budget("device")) == (1000, 1000)
    assert evicted(made) == []
    assert update(made, device=2 * SIZE).error is None
    assert made.memory.held >= {("a", "device"), ("b", "device")}


def test_on_a_cpu_pins_to_either_tier_count_for_host() -> None:
    memory = Memory(shared=True)
    memory.activate("a", "device", pin=True)
    memory.activate("b", "host", pin=True)
    memory.settle()
    memory.set_budgets(SIZE, 2 * SIZE)  # HOST may take the larger of the two
    with refused(AdapterBudgetExceeded, budget=SIZE, tier="host"):
        memory.set_budgets(None, SIZE)
    assert memory.settle().impossible == ()
    assert memory.there.keys() >= {("a", "device"), ("b", "host")}


def test_who_waits_for_what_can_never_fit_fails_and_who_runs_with_it_ends() -> None:
    made = engine()
    made.inbox.put(request(1, adapter("large", 3 * SIZE), new=30))
    turns(made, 5)
    update(made, device=4 * SIZE)
    made.inbox.put(request(2, adapter("other", 3 * SIZE)))
    made.inbox.put(request(3, adapter("small")))
    turns(made, 2)
    assert not failures(made)
    done = update(made, device=2 * SIZE)
    assert done.budgets is not None
    assert done.budgets.device_bytes >= 3 * SIZE, "more than the budget while it runs"
    made.inbox.put(request(4, adapter("large", 3 * SIZE)))
    turns(made, 2)
    assert failures(made) == dict.fromkeys((2, 4), "ADAPTER_BUDGET_EXCEEDED")
    while made.scheduler.has_work():
        made.turn()
    assert finished(made) == {1, 3}
    assert ("large", "device") not in made.memory.held
    made.loop.check_integrity()


def test_an_activation_that_can_never_fit_any_more_is_answered() -> None:
    made = engine()
    made.inbox.put(request(1, adapter("busy", 9 * SIZE), new=30))
    turns(made, 5)
    made.inbox.put(Activate(7, adapter("large", 5 * SIZE)))
    turns(made, 3)
    update(made, device=2 * SIZE)
    turns(made, 2)
    (answer,) = [m for m in made.sent if isinstance(m, OperationDone)]
    assert answer.operation == 7
    assert answer.error is not None
    assert answer.error.reason == "ADAPTER_BUDGET_EXCEEDED"


def test_where_it_was_found_is_counted_when_a_request_comes() -> None:
    """DEVICE, HOST or DISK, whatever is loaded before it starts."""
    made = engine("near")
    made.inbox.put(Activate(8, adapter("middle"), "host"))
    turns(made, 3)
    for number, name in enumerate(("near", "middle", "far", "far", "near")):
        made.inbox.put(request(number, adapter(name)))
    while made.scheduler.has_work() or not made.inbox.empty():
        made.turn()
    outputs = [m for m in made.sent if isinstance(m, SequenceOutput) and m.tier]
    assert {m.sequence: m.tier for m in outputs} == {
        0: "device", 1: "host", 2: "disk", 3: "disk", 4: "device",
    }  # fmt: skip
