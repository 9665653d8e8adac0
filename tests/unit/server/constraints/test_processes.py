"""Constraint processes with the real library: stopped, killed, and over their limits."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from veneer_registry.errors import InvalidField
from veneer_server.constraints import grammars, matchers
from veneer_server.constraints.family import MatcherFamily
from veneer_server.constraints.frames import ChildEnded, MatchingSetup, ParentReady
from veneer_server.constraints.grammars import GrammarFailed, Grammars
from veneer_server.step.plan import ConstraintState
from veneer_server.wire.messages import (
    Constraint,
    ConstraintDone,
    ConstraintLimits,
    MatcherEnded,
)

from tests.attacks.hostile_constraints import HOSTILE
from tests.unit.server.never_slow import never_slow

VOCAB, EOS = 49152, 2
DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
LETTERS = Constraint("regex", "[a-z]{200}")
TOO_LARGE = Constraint("regex", "((((a?){30}){30}){30}){30}")
"""Its states are too many after some tokens."""


class Constraints:
    """`Grammars`, and what it tells the loop and the metrics."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.unheld: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.reports: queue.SimpleQueue[ConstraintDone | MatcherEnded] = queue.SimpleQueue()
        # Servers of other tests, which have such processes too.
        self._others = set(psutil.Process().children())
        self.grammars = Grammars.of_base(
            folder,
            vocab_size=VOCAB,
            eos_token_ids=[EOS],
            limits=ConstraintLimits(**limits),
            unhold=self.unheld.put,
            report=self.reports.put,
        )
        assert self.grammars.usable()

    def compile(self, sequence: int, constraint: Constraint) -> InvalidField | None:
        done: queue.SimpleQueue[InvalidField | None] = queue.SimpleQueue()
        self.grammars.compile(sequence, constraint, done.put)
        return done.get(timeout=60)

    def allowed(self, sequence: int) -> NDArray[np.bool_]:
        """What may come next, however long it takes to know."""
        while True:
            known = self.grammars.allowed(sequence, time.monotonic() + 60)
            if isinstance(known, np.ndarray):
                return known
            assert known is ConstraintState.LATE
            assert self.unheld.get(timeout=60) == sequence
            assert self.grammars.ending(sequence) is not ConstraintState.COMPLETE

    def say(self, sequence: int, token: int) -> ConstraintState:
        return self.grammars.advance({sequence: token}, time.monotonic() + 60)[sequence]

    def say_for_ever(self, sequence: int) -> None:
        while True:
            self.say(sequence, token_of(self.allowed(sequence)))

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of these constraints that have not ended."""
        ours = set(psutil.Process().children()) - self._others
        found = []
        for process in [each for one in ours for each in (one, *_below(one))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith(name) and process.status() not in DEAD:
                    found.append(process)
        return found

    def ended(self) -> MatcherEnded:
        """The next report of a matcher's end."""
        while True:
            report = self.reports.get(timeout=60)
            if isinstance(report, MatcherEnded):
                return report


def _below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []


@pytest.fixture
def make(base_folder: Path) -> Iterator[Callable[..., Constraints]]:
    made: list[Constraints] = []

    def begin(**limits: Any) -> Constraints:
        made.append(Constraints(base_folder, **limits))
        return made[-1]

    yield begin
    for one in made:
        one.grammars.close()


def token_of(mask: NDArray[np.bool_]) -> int:
    return int(np.flatnonzero(mask)[-1])


@pytest.mark.push
@pytest.mark.parametrize("name", ["veneer-matcher", "veneer-constrai"])
def test_sequences_outlive_the_process_that_follows_them(
    name: str, make: Callable[..., Constraints], monkeypatch: pytest.MonkeyPatch
) -> None:
    never_slow(monkeypatch)
    made = make()
    for sequence in (1, 2):
        assert made.compile(sequence, LETTERS) is None
    for _ in range(3):
        made.say(1, token_of(made.allowed(1)))
    before = made.allowed(1)
    [killed] = made.processes(name)
    killed.kill()
    assert made.ended().cause == "killed"
    made.say(1, token_of(before))
    after, fresh = made.allowed(1), made.allowed(2)
    assert after.any()
    assert made.compile(3, LETTERS) is None
    assert (made.allowed(3) == fresh).all()
    for _ in range(4):
        made.say(3, token_of(made.allowed(3)))
    assert (made.allowed(3) == after).all()


def test_a_mask_that_is_late_is_not_waited_for(
    make: Callable[..., Constraints], monkeypatch: pytest.MonkeyPatch
) -> None:
    never_slow(monkeypatch)
    made = make()
    assert made.compile(1, LETTERS) is None
    token = token_of(made.allowed(1))
    [stopped] = made.processes("veneer-matcher")
    stopped.suspend()
    now = time.monotonic()
    assert made.grammars.advance({1: token}, now)[1] is ConstraintState.GOES_ON
    assert made.grammars.allowed(1, now) is ConstraintState.LATE
    assert made.unheld.empty()
    stopped.resume()
    assert made.unheld.get(timeout=60) == 1
    assert made.grammars.ending(1) is ConstraintState.GOES_ON
    assert made.grammars.allowed(1, now).any()  # type: ignore[union-attr]


@pytest.mark.push
def test_what_a_full_socket_does_not_take_waits_for_room(
    make: Callable[..., Constraints], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the step does not wait for it."""
    never_slow(monkeypatch)
    made = make()
    assert made.compile(1, LETTERS) is None
    token = token_of(made.allowed(1))
    large = [json.dumps([f"{n} " + "x" * 10_000]) for n in range(30)]
    for at, text in enumerate(large):
        assert made.compile(100 + at, Constraint("choice", text)) is None
        made.grammars.forget(100 + at)
    stopped = made.processes("veneer-matcher")
    for process in stopped:
        process.suspend()
    done: queue.SimpleQueue[InvalidField | None] = queue.SimpleQueue()
    for at, text in enumerate(large):
        made.grammars.compile(200 + at, Constraint("choice", text), done.put)
    assert made.grammars.advance({1: token}, time.monotonic())[1] is ConstraintState.GOES_ON
    for process in stopped:
        process.resume()
    assert [done.get(timeout=60) for _ in large] == [None] * 30
    assert made.allowed(1).any()


@pytest.mark.push
@pytest.mark.parametrize("quick", [True, False])
def test_many_large_constraints_end_each_other_and_no_small_one(
    quick: bool, make: Callable[..., Constraints], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, which has no room for all of them."""
    if quick:
        never_slow(monkeypatch)
    else:
        monkeypatch.setattr(grammars, "SLOW_MASK_S", 0.0)
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    made = make()
    assert made.compile(1, LETTERS) is None
    problems = set()
    numbers = itertools.count(100)
    live: list[int] = []
    for _ in range(3):  # later ones use memory that earlier ones have freed
        for sequence in itertools.islice(numbers, rng.randrange(20, 40)):
            text = f"{sequence} " + "x" * rng.choice([2_000, 5_000, 10_000])
            assert made.compile(sequence, Constraint("choice", json.dumps([text]))) is None
            live.append(sequence)
        for sequence in list(live):
            try:
                assert made.allowed(sequence).any()
                over = rng.random() < 0.5
            except GrammarFailed as failed:
                problems.add((failed.failure.limit, failed.failure.problem))
                over = True
            if over:
                made.grammars.forget(sequence)
                live.remove(sequence)
        made.say(1, token_of(made.allowed(1)))
    [(limit, problem)] = problems
    assert limit == "memory"
    assert "MiB together, and this is the largest" in problem


@pytest.mark.push
def test_a_process_that_says_nothing_is_replaced(
    make: Callable[..., Constraints], monkeypatch: pytest.MonkeyPatch
) -> None:
    never_slow(monkeypatch)
    monkeypatch.setattr(matchers, "SILENCE_S", 2.0)
    made = make()
    assert made.compile(1, LETTERS) is None
    token = token_of(made.allowed(1))
    [stopped] = made.processes("veneer-matcher")
    stopped.suspend()
    made.say(1, token)
    assert made.allowed(1).any()
    assert made.ended().cause == "limit"


def test_what_fails_in_the_middle_ends_alone(make: Callable[..., Constraints]) -> None:
    made = make()
    for sequence, constraint in ((1, TOO_LARGE), (2, LETTERS)):
        assert made.compile(sequence, constraint) is None
    with pytest.raises(GrammarFailed) as caught:
        made.say_for_ever(1)
    assert caught.value.failure.limit == "fuel"
    made.say(2, token_of(made.allowed(2)))
    assert made.allowed(2).any()


@pytest.mark.push
def test_many_different_constraints_do_not_fill_a_process(
    make: Callable[..., Constraints],
) -> None:
    """Each compiled one takes 5 MB; they were kept for the next request that has the same."""
    made = make(matcher_memory=32 << 20, mask_seconds=5.0, compile_seconds=10.0)
    for number in range(12):
        options = [
            {"type": "object", "properties": {f"a{i}x{number}": {"type": "string"}, "b": {}}}
            for i in range(300)
        ]
        schema = Constraint("json_schema", json.dumps({"anyOf": options}))
        assert made.compile(number, schema) is None
        made.grammars.forget(number)
    sizes = [p.memory_full_info().uss for p in made.processes("veneer-matcher")]
    assert max(sizes) < 48 << 20


def test_a_slow_sequence_is_followed_by_a_process_that_yields(
    make: Callable[..., Constraints], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matchers, "SLOW_MASK_S", 0.0)
    made = make()
    assert made.compile(1, LETTERS) is None
    assert made.say(1, token_of(made.allowed(1))) is ConstraintState.LATE
    assert made.unheld.get(timeout=60) == 1
    assert made.grammars.ending(1) is ConstraintState.GOES_ON
    assert made.allowed(1).any()
    nices = sorted(p.nice() for p in made.processes("veneer-matcher"))
    assert nices == [os.nice(0), os.nice(0) + 10]


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_no_hostile_constraint_outlives_its_limits(
    case: str, make: Callable[..., Constraints]
) -> None:
    hostile = HOSTILE[case]
    if len(hostile.text) > 128 << 10:
        pytest.skip("refused by its size before")
    made = make(compile_seconds=0.2)
    kind: Any = hostile.kind
    error = made.compile(1, Constraint(kind, hostile.text))
    assert error is None or error.metadata["field"] == f"constraint.{kind}"
    assert made.compile(2, LETTERS) is None
    made.grammars.forget(1)
    psutil.wait_procs(made.processes("veneer-compile"), timeout=60)
    assert made.processes("veneer-compile") == []


def test_what_nobody_waits_for_is_killed(make: Callable[..., Constraints]) -> None:
    made = make(compile_seconds=60)
    schema = {"type": "integer", "multipleOf": 99999989}
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    made.grammars.compile(1, Constraint("json_schema", json.dumps(schema)), done.put)
    while not (running := made.processes("veneer-compile")):
        pass
    running[0].suspend()
    made.grammars.forget(1)
    running[0].wait(60)
    assert done.empty()
    assert len(made.grammars) == 0


def test_a_trial_killed_from_outside_is_tried_again_once(
    make: Callable[..., Constraints],
) -> None:
    made = make(compile_seconds=60)
    schema = Constraint("json_schema", json.dumps({"type": "integer", "multipleOf": 99999989}))
    done: queue.SimpleQueue[InvalidField | None] = queue.SimpleQueue()
    made.grammars.compile(1, schema, done.put)
    seen: set[int] = set()
    while len(seen) < 2:
        for process in made.processes("veneer-compile"):
            if process.pid not in seen:
                seen.add(process.pid)
                os.kill(process.pid, signal.SIGKILL)
    error = done.get(timeout=60)
    assert error is not None
    assert error.metadata["limit"] == "memory"


def test_what_has_ended_is_not_signalled(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process id may be another's by then: only the parent, which reaps, signals."""
    setup = MatchingSetup(str(base_folder / "tokenizer.json"), VOCAB, [EOS], ConstraintLimits())
    family = MatcherFamily(setup)
    family.start()
    try:
        assert family.receive() == ParentReady("")
        first = family.fork("trial")
        first.close()  # it has nothing to do then
        assert family.receive() == ChildEnded(first.number, 0)
        with monkeypatch.context() as without:
            for name in ("kill", "setpriority"):
                without.delattr(os, name)
            first.kill("too late")
            first.yield_to_others()
            second = family.fork("trial")
            second.kill("in time")
        assert family.receive() == ChildEnded(second.number, signal.SIGKILL)
        second.close()
    finally:
        family.end()
