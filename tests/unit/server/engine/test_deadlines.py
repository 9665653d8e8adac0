"""Deadlines are refused early only if they could not have been met."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from veneer_server.queues.fairness import Sender
from veneer_server.wire.messages import (
    AdapterSource,
    Cancel,
    Constraint,
    SamplingParams,
    SequenceFailed,
    SequenceOutput,
    SequenceRequest,
    Submit,
    ToEngine,
)

from tests.unit.server.engine.test_loop import Engine
from tests.unit.server.engine.world import World, adapter

PACE = 32
"""Tokens a second: a full step of `Engine`."""


def engine(max_running: int = 4, grammars: SlowGrammars | None = None) -> Engine:
    """One that has had a step of a second, as full as can be. Later ones take no time."""
    made = Engine(max_running, context=1000, blocks=1000, pace=PACE, grammars=grammars)
    made.inbox.put(ask(-1, fresh(PACE, 1_000_000)))
    made.turn()
    made.inbox.put(Cancel(-1))
    made.turn()
    made.sent.clear()
    made.now, made.pace = 0.0, None
    return made


def ask(
    number: int,
    prompt: list[int],
    deadline: float | None = None,
    *,
    source: AdapterSource | None = None,
    constraint: Constraint | None = None,
) -> Submit:
    request = SequenceRequest(
        prompt, 3, SamplingParams(), adapter=source, constraint=constraint, deadline=deadline
    )
    return Submit(number, request)


def refused(made: Engine) -> list[SequenceFailed]:
    return [m for m in made.sent if isinstance(m, SequenceFailed)]


def first_tokens(made: Engine) -> set[int]:
    return {m.sequence for m in made.sent if isinstance(m, SequenceOutput)}


def fresh(length: int, begin: int = 10_000) -> list[int]:
    return list(range(begin, begin + length))


def test_prompts_that_wait_and_are_cached_are_not_in_the_way() -> None:
    """The workload of one system prompt: the queue is long, and done in a few steps."""
    made = engine(max_running=2)
    prompt = fresh(400)
    made.inbox.put(ask(0, prompt))
    while not first_tokens(made):
        made.turn()
    for number in range(1, 21):
        made.inbox.put(ask(number, prompt))
    made.turn()
    made.inbox.put(ask(99, [1] * 10, deadline=3.0))
    for _ in range(60):
        made.turn()
    assert refused(made) == []
    assert 99 in first_tokens(made)


def test_those_that_wait_for_an_adapter_are_not_in_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = engine()
    monkeypatch.setattr(made.memory, "load", lambda source: None)  # it never ends
    for number in range(20):
        made.inbox.put(ask(number, fresh(400, 1000 * number), source=adapter("cold")))
    made.turn()
    made.inbox.put(ask(99, [1] * 10, deadline=3.0))
    made.turn()
    assert refused(made) == []
    assert first_tokens(made) == {99}


def test_a_running_prompt_and_its_own_are_in_the_way_for_certain() -> None:
    made = engine()
    made.inbox.put(ask(1, fresh(320)))
    made.turn()
    made.inbox.put(ask(2, [1] * 64, deadline=8.0))  # 9 + 2 steps of a second, less a margin
    made.inbox.put(ask(3, [2] * 320, deadline=7.0))
    made.inbox.put(ask(4, [3] * 64, deadline=9.0))
    made.turn()
    behind, long = refused(made)
    assert (behind.sequence, long.sequence) == (2, 3)
    assert behind.error.metadata["ahead_tokens"] == "288"
    assert "retry" in behind.error.message
    assert "increase the deadline" in long.error.message


def test_a_prompt_on_its_way_into_the_cache_is_not_counted_twice() -> None:
    made = engine()
    made.inbox.put(ask(1, fresh(320)))
    made.turn()
    made.inbox.put(ask(2, fresh(320), deadline=7.0))  # 288 tokens for both
    made.inbox.put(ask(3, [*fresh(310), *[1] * 80], deadline=7.0))  # and 80 of its own
    made.turn()
    assert [m.sequence for m in refused(made)] == [3]


@pytest.mark.parametrize("exact", [False, True])
def test_a_prompt_that_goes_on_in_small_chunks_is_not_in_the_way_whole(exact: bool) -> None:
    """Where log-probabilities are wanted, or in exact mode; `World` checks the bound."""
    world = World(budget=600, beside_decode=600, blocks=600, exact=exact)
    world.ask(1, fresh(500), 3, scores=not exact)
    world.step()
    world.submit(2, 10, 1, None)
    world.step()
    assert 2 in world.finished
    assert 1 in world.live
    assert world.bounds_met == 1
    world.drain()


class SlowGrammars:
    """FAKE: constraints that are ready when the test says so."""

    def __init__(self) -> None:
        self.done: list[Callable[[None], None]] = []

    def compile(
        self,
        sequence: int,
        constraint: Constraint,
        done: Callable[[None], None],
        sender: Sender,
    ) -> None:
        self.done.append(done)

    def forget(self, sequence: int) -> None:
        pass


@pytest.mark.parametrize("constraint", [None, Constraint("regex", "a+")])
@pytest.mark.parametrize(("late", "in_time"), [(0.0, True), (6.0, True), (7.0, False)])
def test_a_deadline_runs_while_the_message_and_its_constraint_wait(
    constraint: Constraint | None, late: float, in_time: bool
) -> None:
    """64 tokens: 2 seconds, less a margin."""
    grammars = SlowGrammars()
    made = engine(grammars=grammars)
    made.inbox.put(ask(1, fresh(64), deadline=8.0, constraint=constraint))
    if constraint is not None:
        made.turn()
    made.now += late
    for done in grammars.done:
        done(None)
    for _ in range(3):
        made.turn()
    assert [m.sequence for m in refused(made)] == ([] if in_time else [1])
    assert first_tokens(made) == ({1} if in_time else set())


class FakeConnection:
    """FAKE: an engine that takes everything and says nothing."""

    def __init__(self) -> None:
        self.written: list[ToEngine] = []

    def write(self, message: ToEngine) -> None:
        self.written.append(message)
