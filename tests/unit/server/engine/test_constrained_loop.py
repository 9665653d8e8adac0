"""The step loop with constraints: no step waits for a compilation, nothing is left behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from veneer_registry.errors import InvalidField
from veneer_server.engine.loop import StepLoop
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.step_limits import SchedulerLimits
from veneer_server.queues.fairness import NOBODY, Sender
from veneer_server.step.inbox import Inbox, Unheld
from veneer_server.step.plan import (
    ConstraintFailure,
    ConstraintState,
    PlannedSequence,
    SequenceResult,
    StepPlan,
)
from veneer_server.wire.messages import (
    Cancel,
    Constraint,
    FromEngine,
    SamplingParams,
    SequenceFailed,
    SequenceOutput,
    SequenceRequest,
    Stop,
    Submit,
)


class FakeGrammars:
    """FAKE: compiles when the test says so."""

    def __init__(self) -> None:
        self.begun: queue.SimpleQueue[tuple[int, Callable[[InvalidField | None], None]]] = (
            queue.SimpleQueue()
        )
        self.forgotten: list[int] = []
        self.endings: dict[int, ConstraintFailure | ConstraintState] = {}

    def compile(
        self,
        sequence: int,
        constraint: Constraint,
        done: Callable[[InvalidField | None], None],
        sender: Sender = NOBODY,
    ) -> None:
        self.begun.put((sequence, done))

    def ending(self, sequence: int) -> ConstraintFailure | ConstraintState:
        return self.endings.pop(sequence, ConstraintState.GOES_ON)

    def forget(self, sequence: int) -> None:
        self.forgotten.append(sequence)


class FakeRunner:
    """FAKE: every sequence says 100 plus the position; `failures` end theirs, and those
    that are `late` say nothing."""

    def __init__(self) -> None:
        self.failures: dict[int, ConstraintFailure] = {}
        self.complete: set[int] = set()
        self.late: set[int] = set()
        self.plans: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()

    def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        self.plans.put(plan)
        return tuple(map(self._result, plan.sequences))

    def _result(self, planned: PlannedSequence) -> SequenceResult:
        failure = self.failures.get(planned.sequence)
        following = ConstraintState.GOES_ON
        if planned.sequence in self.late:
            following = ConstraintState.LATE
        elif planned.sequence in self.complete:
            following = ConstraintState.COMPLETE
        samples = planned.samples and failure is None and following is not ConstraintState.LATE
        return SequenceResult(
            token=100 + planned.position if samples else None,
            following=following,
            failure=failure,
        )


class Loop:
    """A running step loop."""

    def __init__(self, grammars: FakeGrammars | None) -> None:
        self.grammars = grammars or FakeGrammars()
        self.runner = FakeRunner()
        self.inbox: Inbox = queue.SimpleQueue()
        self.out: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        residency = Residency(host_budget=1, device_budget=1, itemsize=2, shared=True)
        self.scheduler = Scheduler(
            SchedulerLimits(max_batch_tokens=64, max_running=8, context_length=64),
            BlockManager(32, 4),
            residency,
            frozenset(),
        )
        self.loop = StepLoop(
            inbox=self.inbox,
            scheduler=self.scheduler,
            residency=residency,
            runner=self.runner,
            memory=None,  # type: ignore[arg-type]  # no adapters here
            send=lambda messages: [self.out.put(m) for m in messages] and None,
            grammars=grammars,
        )
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()

    def submit(self, sequence: int, *, constrained: bool = True, **fields: Any) -> None:
        fields.setdefault("max_tokens", 3)
        constraint = Constraint("regex", "x") if constrained else None
        self.inbox.put(
            Submit(
                sequence,
                SequenceRequest(
                    prompt=[1, 2],
                    sampling=SamplingParams(temperature=0),
                    constraint=constraint,
                    **fields,
                ),
            )
        )

    def end_of(self, sequence: int) -> SequenceOutput | SequenceFailed:
        """Its last message."""
        while True:
            match message := self.out.get(timeout=30):
                case SequenceFailed(sequence=number) if number == sequence:
                    return message
                case SequenceOutput(sequence=number, finish=str()) if number == sequence:
                    return message


@pytest.fixture
def loop() -> Iterator[Loop]:
    running = Loop(FakeGrammars())
    yield running
    running.inbox.put(Stop())
    running.thread.join()
    running.loop.check_integrity()


def test_others_go_on_while_a_constraint_compiles(loop: Loop) -> None:
    loop.submit(1)
    number, done = loop.grammars.begun.get(timeout=30)
    assert number == 1
    loop.submit(2, constrained=False)
    assert isinstance(loop.end_of(2), SequenceOutput)
    assert loop.scheduler.running == loop.scheduler.waiting == 0
    done(None)
    end = loop.end_of(1)
    assert isinstance(end, SequenceOutput)
    assert end.finish == "length"
    assert loop.grammars.forgotten.count(1) == 1


def test_a_constraint_that_does_not_compile_fails_its_sequence(loop: Loop) -> None:
    loop.submit(1)
    _, done = loop.grammars.begun.get(timeout=30)
    done(InvalidField("no: simplify", metadata={"field": "constraint.regex"}))
    end = loop.end_of(1)
    assert isinstance(end, SequenceFailed)
    assert (end.error.reason, end.error.metadata) == (
        "INVALID_FIELD",
        {"field": "constraint.regex"},
    )


def test_cancelling_during_compilation_leaves_nothing(loop: Loop) -> None:
    loop.submit(1)
    _, done = loop.grammars.begun.get(timeout=30)
    loop.inbox.put(Cancel(1))
    end = loop.end_of(1)
    assert isinstance(end, SequenceOutput)
    assert end.finish == "cancelled"
    before = loop.grammars.forgotten.count(1)
    done(None)  # the worker was not asked: its matcher comes now
    loop.submit(2, constrained=False)
    loop.end_of(2)
    assert loop.grammars.forgotten.count(1) == before + 1


def test_a_complete_constraint_stops_and_a_failed_one_fails_and_both_are_forgotten(
    loop: Loop,
) -> None:
    loop.runner.failures[1] = ConstraintFailure("fuel", "too large")
    loop.runner.complete.add(2)
    for number in (1, 2):
        loop.submit(number, ignore_eos=True, max_tokens=9)
        loop.grammars.begun.get(timeout=30)[1](None)
    failed, stopped = loop.end_of(1), loop.end_of(2)
    assert isinstance(failed, SequenceFailed)
    assert failed.error.reason == "INVALID_FIELD"
    assert "too large" in failed.error.message
    assert isinstance(stopped, SequenceOutput)
    assert (stopped.finish, len(stopped.tokens)) == ("stop", 1)
    assert sorted(loop.grammars.forgotten) == [1, 2]


def test_a_late_mask_leaves_its_sequence_out_of_steps_and_delays_no_other(loop: Loop) -> None:
    """It was waited for by every stream of the step."""
    loop.runner.late.add(1)
    loop.submit(1, ignore_eos=True)
    loop.grammars.begun.get(timeout=30)[1](None)
    loop.runner.plans.get(timeout=30)
    loop.submit(2, constrained=False)
    assert isinstance(loop.end_of(2), SequenceOutput)
    planned = [loop.runner.plans.get_nowait() for _ in range(loop.runner.plans.qsize())]
    assert [[p.sequence for p in plan.sequences] for plan in planned] == [[2], [2], [2]]
    loop.runner.late.clear()
    loop.inbox.put(Unheld(1))
    first = loop.runner.plans.get(timeout=30).sequences[0]
    assert (first.sequence, first.tokens, first.position) == (1, (1, 2), 2)
    end = loop.end_of(1)
    assert isinstance(end, SequenceOutput)
    assert (end.finish, end.tokens) == ("length", [104])


@pytest.mark.parametrize(
    "how", [ConstraintState.COMPLETE, ConstraintFailure("memory", "too large")]
)
def test_what_is_known_late_of_a_sequence_ends_it(
    how: ConstraintState | ConstraintFailure, loop: Loop
) -> None:
    loop.runner.late.add(1)
    loop.submit(1, ignore_eos=True)
    loop.grammars.begun.get(timeout=30)[1](None)
    loop.runner.plans.get(timeout=30)
    loop.grammars.endings[1] = how
    loop.inbox.put(Unheld(1))
    end = loop.end_of(1)
    if isinstance(how, ConstraintState):
        assert isinstance(end, SequenceOutput)
        assert (end.finish, end.tokens) == ("stop", [])
    else:
        assert isinstance(end, SequenceFailed)
        assert end.error.metadata == {"field": "constraint", "limit": "memory"}
    assert loop.grammars.forgotten == [1]


def test_a_held_sequence_can_be_cancelled(loop: Loop) -> None:
    loop.runner.late.add(1)
    loop.submit(1)
    loop.grammars.begun.get(timeout=30)[1](None)
    loop.runner.plans.get(timeout=30)
    loop.inbox.put(Cancel(1))
    loop.inbox.put(Unheld(1))  # came too late
    end = loop.end_of(1)
    assert isinstance(end, SequenceOutput)
    assert end.finish == "cancelled"
    assert loop.grammars.forgotten == [1]


def test_without_grammars_a_constraint_is_refused() -> None:
    running = Loop(None)
    running.submit(1)
    end = running.end_of(1)
    assert isinstance(end, SequenceFailed)
    assert end.error.metadata == {"field": "constraint"}
    running.inbox.put(Stop())
    running.thread.join()
