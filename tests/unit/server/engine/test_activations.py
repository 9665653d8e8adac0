"""Concurrent activations and evictions: each gets one answer, and a correct one."""

from __future__ import annotations

from typing import Literal

from veneer_registry.errors import AdapterCorrupt
from veneer_server.step.inbox import Arrived
from veneer_server.wire.messages import (
    Activate,
    AdapterSource,
    Cancel,
    Evict,
    OperationDone,
    SequenceFailed,
    SequenceOutput,
)

from tests.unit.server.engine.test_loop import Engine, FakeMemory, request
from tests.unit.server.engine.world import SIZE, adapter


class SlowMemory(FakeMemory):
    """FAKE: a load or move ends when the test puts its `Arrived` into the inbox."""

    def load(self, source: AdapterSource) -> None:
        pass

    def move(self, weights_digest: str) -> None:
        pass


def engine(*, device: int = 1000, slow: bool = False) -> Engine:
    memory = SlowMemory if slow else FakeMemory
    made = Engine(context=1000, blocks=1000, memory=memory)
    made.scheduler.residency.set_budgets(host=None, device=device)
    return made


def turns(made: Engine, *messages: Activate | Evict | Cancel | Arrived) -> None:
    for message in messages:
        made.inbox.put(message)
    for _ in range(5):
        made.turn()


def answers(made: Engine) -> dict[int, str]:
    """Reasons by operation; empty where it succeeded."""
    done = [m for m in made.sent if isinstance(m, OperationDone)]
    assert len({m.operation for m in done}) == len(done), "answered twice"
    return {m.operation: m.error.reason if m.error else "" for m in done}


def test_an_eviction_ends_the_activation_that_waits_for_room() -> None:
    made = engine(device=SIZE)
    made.inbox.put(request(1, adapter("busy"), new=900))
    turns(made, Activate(1, adapter("x"), "host"))
    turns(made, Activate(2, adapter("x"), "device"))
    assert answers(made) == {1: ""}
    turns(made, Evict(3, "x"))
    assert answers(made) == {1: "", 2: "ADAPTER_EVICTED", 3: ""}
    turns(made, Cancel(1))
    assert made.scheduler.residency.tier("x") == "disk"
    assert made.memory.held == {("busy", "host"), ("busy", "device")}
    made.loop.check_integrity()


def test_an_eviction_ends_the_activation_whose_load_is_under_way() -> None:
    made = engine(slow=True)
    turns(made, Activate(1, adapter("x"), "host"))
    turns(made, Evict(2, "x"))
    turns(made, Arrived("x", "host", {}))
    assert answers(made) == {1: "ADAPTER_EVICTED", 2: ""}
    assert made.memory.held == set()
    made.loop.check_integrity()


def test_an_eviction_that_is_refused_leaves_the_activation() -> None:
    made = engine(slow=True)
    turns(made, Activate(1, adapter("x"), "device", pin=True), Evict(2, "x"))
    turns(made, Arrived("x", "host", {}))
    turns(made, Arrived("x", "device", {}))
    assert answers(made) == {1: "", 2: "ADAPTER_PINNED"}
    assert made.scheduler.residency.pinned("x")


def test_each_activation_is_answered_when_its_own_tier_is_reached() -> None:
    made = engine(slow=True)
    turns(made, Activate(1, adapter("x"), "device"), Activate(2, adapter("x"), "host"))
    turns(made, Arrived("x", "host", {}))
    assert answers(made) == {2: ""}
    turns(made, Arrived("x", "device", {}))
    assert answers(made) == {1: "", 2: ""}
    assert made.scheduler.residency.tier("x") == "device"


def test_an_eviction_during_a_move_that_fails_frees_the_host_copy() -> None:
    made = engine(slow=True)
    turns(made, Activate(1, adapter("x"), "device"))
    turns(made, Arrived("x", "host", {}))
    turns(made, Evict(2, "x"), Arrived("x", "device", {}, AdapterCorrupt("no")))
    assert made.memory.held == set()
    made.loop.check_integrity()


def test_requests_go_on_in_device_when_a_pin_cannot_read_the_host_copy_again() -> None:
    """A GPU with little room in HOST: the copy there has gone, and the file is damaged."""
    made = engine(slow=True)
    made.scheduler.residency.set_budgets(host=SIZE, device=None)
    turns(made, Activate(1, adapter("x"), "device"))
    for tier in ("host", "device"):
        turns(made, Arrived("x", tier, {}))
    turns(made, Activate(2, adapter("y"), "host"))
    turns(made, Arrived("y", "host", {}))
    assert ("x", "host") not in made.memory.held
    made.inbox.put(request(1, adapter("x"), new=30))
    turns(made, Activate(3, adapter("x"), "host", pin=True))
    turns(made, Arrived("x", "host", {}, AdapterCorrupt("no")))
    assert answers(made)[3] == "ADAPTER_CORRUPT"
    while made.scheduler.has_work():
        made.turn()
    assert not made.of(SequenceFailed)
    assert [m.finish for m in made.sent if isinstance(m, SequenceOutput)][-1] == "length"
    assert not made.scheduler.residency.pinned("x")


def test_a_request_that_cannot_be_served_takes_no_operators_pin() -> None:
    made = engine(device=SIZE)
    tiers: list[Literal["host", "device"]] = ["device", "host"]
    for number, tier in enumerate(tiers):
        turns(made, Activate(number, adapter(tier), tier, pin=True))
    made.inbox.put(request(1, adapter("host")))
    turns(made)
    failed = [m for m in made.sent if isinstance(m, SequenceFailed)]
    assert [m.error.reason for m in failed] == ["ADAPTER_BUDGET_EXCEEDED"]
    assert all(made.scheduler.residency.pinned(name) for name in tiers)
