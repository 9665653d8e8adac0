"""A backend with bytes for an adapter, but no place between those that are there."""

from __future__ import annotations

from veneer_server.step.inbox import Arrived, NoSlot
from veneer_server.wire.messages import (
    Activate,
    Evicted,
    OperationDone,
    SequenceFailed,
    SequenceOutput,
)

from tests.unit.server.engine.test_loop import Engine, FakeMemory, request
from tests.unit.server.engine.world import adapter


class TwoPlaces(FakeMemory):
    """FAKE: DEVICE holds two copies, although the budget has bytes for ten."""

    def move(self, weights_digest: str) -> None:
        copies = [digest for digest, tier in self.held if tier == "device"]
        error = NoSlot("no place") if len(copies) == 2 else None
        self.inbox.put(Arrived(weights_digest, "device", {}, error))


def engine(*activated: str, pin: bool = False) -> Engine:
    made = Engine(context=1000, blocks=1000, memory=TwoPlaces)
    for number, name in enumerate(activated):
        made.inbox.put(Activate(number, adapter(name), "device", pin))
    turns(made)
    return made


def turns(made: Engine) -> None:
    for _ in range(12):
        made.turn()
    made.loop.check_integrity()


def finished(made: Engine) -> set[int]:
    return {m.sequence for m in made.sent if isinstance(m, SequenceOutput) and m.finish}


def test_the_idle_copy_that_is_worth_least_makes_a_place() -> None:
    made = engine("a", "b")
    made.inbox.put(request(1, adapter("c")))
    turns(made)
    assert finished(made) == {1}
    gone = [m for m in made.sent if isinstance(m, Evicted)]
    assert [(m.weights_digest, m.tier, m.cause) for m in gone] == [("a", "device", "capacity")]


def test_copies_in_use_are_waited_for() -> None:
    made = engine("a", "b")
    made.inbox.put(request(1, adapter("a"), new=40))
    made.inbox.put(request(2, adapter("b"), new=30))
    made.turn()
    made.inbox.put(request(3, adapter("c")))
    turns(made)
    assert not finished(made)
    turns(made)
    turns(made)
    assert finished(made) >= {2, 3}
    assert not made.of(SequenceFailed)


def test_where_no_copy_ever_leaves_it_fails_and_says_why() -> None:
    made = engine("a", "b", pin=True)
    made.inbox.put(request(1, adapter("c")))
    made.inbox.put(Activate(7, adapter("c"), "device"))
    turns(made)
    (failed,) = (m for m in made.sent if isinstance(m, SequenceFailed))
    assert failed.error.reason == "ADAPTER_BUDGET_EXCEEDED"
    (done,) = (m for m in made.sent if isinstance(m, OperationDone) and m.operation == 7)
    assert done.error is not None
    assert not [m for m in made.sent if isinstance(m, Evicted)]
