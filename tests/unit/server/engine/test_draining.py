"""DRAIN: an adapter's memory is freed once the sequences that ran at the time of the call have
ended, whatever is requested meanwhile. Uses a FAKE runner and a FAKE memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
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

A = adapter("a")


@dataclass
class Noted(FakeMemory):
    """Also notes what it is told; loads and moves end when the test says so, if ``slow``."""

    told: list[str] = field(default_factory=list)
    slow: bool = False

    def load(self, source: AdapterSource) -> None:
        self.told.append(f"load {source.name}")
        if not self.slow:
            super().load(source)

    def move(self, weights_digest: str) -> None:
        if not self.slow:
            super().move(weights_digest)

    def drop(self, weights_digest: str, tier: str) -> None:
        self.told.append(f"drop {weights_digest} {tier}")
        super().drop(weights_digest, tier)


class Drained(Engine):
    """An engine that holds adapter ``a`` in DEVICE and HOST."""

    memory: Noted

    def __init__(self, max_running: int = 4, blocks: int = 1000) -> None:
        super().__init__(max_running, context=1000, blocks=blocks, memory=Noted)
        self.turns(Activate(1, A))
        assert self.in_memory
        self.memory.told.clear()
        self.sent.clear()

    def turns(self, *messages: object, count: int = 5) -> None:
        for message in messages:
            self.inbox.put(message)  # type: ignore[arg-type]
        for _ in range(count):
            self.turn()
            if not self.scheduler.has_work():
                self.loop.check_integrity()

    @property
    def in_memory(self) -> bool:
        """Adapter ``a`` takes room."""
        return any(digest == "a" for digest, _ in self.memory.held)

    def answer(self, operation: int) -> OperationDone:
        (found,) = (
            m for m in self.sent if isinstance(m, OperationDone) and m.operation == operation
        )
        return found

    def tokens(self, number: int) -> int:
        outputs = [m for m in self.sent if isinstance(m, SequenceOutput)]
        return sum(len(m.tokens) for m in outputs if m.sequence == number)

    def finish(self, *numbers: int, new: int) -> None:
        """All of them get their tokens, and nothing is left of them."""
        for _ in range(50 * new * len(numbers)):
            if not self.scheduler.has_work():
                break
            self.turn()
        assert not [m for m in self.sent if isinstance(m, SequenceFailed)]
        assert {n: self.tokens(n) for n in numbers} == dict.fromkeys(numbers, new)
        self.loop.check_integrity()


def test_a_request_that_comes_after_a_drain_does_not_undo_it() -> None:
    engine = Drained()
    engine.turns(request(1, A, new=20))
    engine.turns(Evict(2, "a"))
    assert not engine.answer(2).done
    engine.turns(request(3, A, new=20))
    assert engine.tokens(3) == 0, "it runs on what was drained"
    assert engine.tokens(1) == 15, "what ran goes on"
    engine.turns(count=6)
    assert engine.memory.told[:2] == ["drop a device", "drop a host"]
    engine.finish(1, 3, new=20)
    assert engine.memory.told == ["drop a device", "drop a host", "load a"]
    first = next(m for m in engine.sent if isinstance(m, SequenceOutput) and m.sequence == 3)
    assert first.tier == "disk"


def test_requests_that_keep_coming_neither_hold_a_drain_up_nor_starve() -> None:
    engine = Drained(max_running=3)
    engine.turns(request(1, A, new=30))
    engine.turns(Evict(2, "a"))
    numbers = range(10, 60)
    for number in numbers:
        engine.turns(request(number, A, new=30), count=1)
    assert engine.memory.told == ["drop a device", "drop a host", "load a"]
    engine.finish(1, *numbers, new=30)


def test_what_waits_and_has_not_run_does_not_keep_the_memory() -> None:
    engine = Drained(max_running=1)
    engine.turns(request(1, new=20), request(2, A, new=5))
    engine.turns(Evict(3, "a"), count=1)
    assert engine.answer(3).done
    assert engine.answer(3).freed_bytes == 2 * SIZE
    engine.finish(1, new=20)
    engine.finish(2, new=5)


def test_a_load_under_way_for_what_waits_is_dropped_and_begun_anew() -> None:
    engine = Drained()
    engine.turns(Evict(2, "a"))
    engine.memory.slow = True
    engine.turns(request(1, A, new=5))
    engine.turns(Evict(3, "a"))
    assert not engine.answer(3).done
    engine.turns(Arrived("a", "host", {}))
    assert engine.memory.told[-2:] == ["drop a host", "load a"]
    engine.memory.slow = False
    engine.turns(Arrived("a", "host", {}))
    engine.finish(1, new=5)


def test_what_is_preempted_does_not_keep_the_memory() -> None:
    engine = Drained(blocks=16)  # 60 tokens: one of the two is preempted
    engine.turns(request(1, new=40), count=1)
    engine.turns(request(2, A, new=30), count=1)
    engine.turns(Evict(3, "a"), count=1)
    assert not engine.answer(3).done
    while engine.scheduler.running == 2:
        engine.turn()
    engine.turn()
    assert engine.scheduler.running == engine.scheduler.waiting == 1
    assert engine.memory.told[:2] == ["drop a device", "drop a host"]
    for _ in range(200):
        engine.turn()
    assert [engine.tokens(n) for n in (1, 2)] == [40, 30]
    engine.loop.check_integrity()


def test_a_drain_of_what_drains_already_and_then_an_abort() -> None:
    engine = Drained()
    engine.turns(request(1, A, new=50))
    engine.turns(Evict(2, "a"), Evict(3, "a"), request(4, A, new=50))
    assert not engine.answer(2).done
    assert not engine.answer(3).done
    engine.turns(Evict(5, "a", "abort"))
    assert not engine.in_memory
    failed = [m.sequence for m in engine.sent if isinstance(m, SequenceFailed)]
    assert sorted(failed) == [1, 4], "it ends what waits, too"


def test_a_cancel_of_the_last_that_ran_completes_a_drain() -> None:
    engine = Drained()
    engine.turns(request(1, A, new=50))
    engine.turns(Evict(2, "a"), request(3, A, new=5), count=2)
    engine.memory.told.clear()
    engine.turns(Cancel(1), count=1)
    assert engine.memory.told[:2] == ["drop a device", "drop a host"]
    engine.finish(3, new=5)


def test_an_operators_later_activation_ends_a_drain() -> None:
    engine = Drained()
    engine.turns(request(1, A, new=20))
    engine.turns(Evict(2, "a"), request(3, A, new=20))
    engine.turns(Activate(4, A, pin=True))
    assert engine.answer(4).error is None
    engine.finish(1, 3, new=20)
    assert engine.memory.told == []
    assert engine.scheduler.residency.pinned("a")


def test_a_drain_leaves_other_adapters_alone() -> None:
    engine = Drained(max_running=2)
    engine.turns(request(1, A, new=40))
    engine.turns(Evict(2, "a"), request(3, A, new=5), request(4, adapter("b"), new=5))
    assert engine.tokens(4) > 0, "it waits behind what is drained"
    for _ in range(100):
        engine.turn()
    assert [engine.tokens(n) for n in (1, 3, 4)] == [40, 5, 5]


@pytest.mark.parametrize("running", [True, False], ids=["running", "waiting"])
def test_what_was_deleted_is_free_when_its_last_request_has_ended(running: bool) -> None:
    """Nobody can ask for it any more, so those that wait use what is there."""
    engine = Drained(max_running=1)
    engine.turns(request(1, A if running else None, new=20), request(2, A, new=5))
    engine.turns(Evict(3, "a", "forget"))
    assert not engine.answer(3).done
    engine.finish(1, new=20)
    engine.finish(2, new=5)
    assert engine.memory.told == ["drop a device", "drop a host"]


def test_what_was_deleted_and_is_there_again_stays() -> None:
    """Another name has the same weights: they are wanted after all."""
    engine = Drained()
    engine.turns(request(1, A, new=20))
    engine.turns(Evict(2, "a", "forget"))
    engine.turns(request(3, A, new=5))
    for _ in range(50):
        engine.turn()
    assert engine.in_memory
    assert engine.memory.told == []
