"""The step loop's messages, turn by turn, with a FAKE runner and a FAKE memory."""

from __future__ import annotations

import queue
from dataclasses import dataclass, field

from veneer_server.engine.loop import GrammarMemory, StepLoop
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.step_limits import SchedulerLimits
from veneer_server.step.inbox import Arrived, Inbox
from veneer_server.step.plan import Runner, SequenceResult, StepPlan
from veneer_server.wire.messages import (
    Activate,
    AdapterSource,
    Cancel,
    Evict,
    FromEngine,
    Occupancy,
    OperationDone,
    Pause,
    Ping,
    Pong,
    Prefilled,
    ResetPrefixCache,
    SamplingParams,
    SequenceFailed,
    SequenceOutput,
    SequenceRequest,
    StepDone,
    Stop,
    Submit,
    Unpin,
)

from tests.unit.server.engine.world import adapter


class FakeRunner:
    """FAKE: token 5, always; no time passes."""

    def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        return tuple(SequenceResult(token=5 if p.samples else None) for p in plan.sequences)


@dataclass
class FakeMemory:
    """FAKE: loads and moves end at once; drops are noted."""

    inbox: Inbox
    held: set[tuple[str, str]] = field(default_factory=set)
    room: int | None = None

    def load(self, source: AdapterSource) -> None:
        self.inbox.put(Arrived(source.weights_digest, "host", {}))

    def move(self, weights_digest: str) -> None:
        self.inbox.put(Arrived(weights_digest, "device", {}))

    def admit(self, arrived: Arrived) -> None:
        self.held.add((arrived.weights_digest, arrived.tier))

    def drop(self, weights_digest: str, tier: str) -> None:
        self.held.remove((weights_digest, tier))


class Engine:
    """A loop that is told turn by turn; ``now`` is its clock.

    Args:
        pace: tokens a second that steps compute; None where they take no time.
    """

    def __init__(
        self,
        max_running: int = 4,
        context: int = 64,
        blocks: int = 20,
        *,
        runner: Runner | None = None,
        memory: type[FakeMemory] = FakeMemory,
        pace: float | None = None,
        grammars: GrammarMemory | None = None,
    ) -> None:
        self.now = 0.0
        self.pace = pace
        self.inbox: Inbox = queue.SimpleQueue()
        self.sent: list[FromEngine] = []
        residency = Residency(1000, 1000, itemsize=1)
        self.memory = memory(self.inbox)
        self.scheduler = Scheduler(
            SchedulerLimits(32, max_running, context_length=context),
            BlockManager(blocks, 4),
            residency,
            frozenset({0}),
        )
        self.loop = StepLoop(
            inbox=self.inbox,
            scheduler=self.scheduler,
            residency=residency,
            runner=runner or Paced(self),
            memory=self.memory,
            send=self.sent.extend,
            clock=lambda: self.now,
            grammars=grammars,
        )

    def turn(self) -> None:
        self.loop.turn()

    def of(self, kind: type[FromEngine]) -> list[FromEngine]:
        return [m for m in self.sent if isinstance(m, kind)]


class Paced(FakeRunner):
    """FAKE: steps take the engine's time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        if self._engine.pace is not None:
            self._engine.now += plan.rows / self._engine.pace
        return super().execute(plan)


def request(number: int, source: AdapterSource | None = None, new: int = 3) -> Submit:
    return Submit(number, SequenceRequest([1] * 9, new, SamplingParams(), source))


def test_what_is_computed_of_a_prompt_is_told_chunk_by_chunk() -> None:
    """A prompt that one step computes needs no message; one whose caller leaves has had its
    last before the end."""
    engine = Engine(context=200, blocks=60)
    engine.inbox.put(Submit(1, SequenceRequest([1] * 9, 1, SamplingParams())))
    engine.turn()
    assert engine.of(Prefilled) == []
    engine.inbox.put(Submit(2, SequenceRequest([2] * 100, 1, SamplingParams())))
    for _ in range(4):
        engine.turn()
    assert engine.of(Prefilled) == [Prefilled(2, tokens, 0) for tokens in (32, 64, 96)]
    engine.sent.clear()
    engine.inbox.put(Submit(3, SequenceRequest([3] * 100, 1, SamplingParams())))
    engine.turn()
    engine.turn()
    engine.inbox.put(Cancel(3))
    engine.turn()
    about = [m for m in engine.sent if isinstance(m, Prefilled | SequenceOutput)]
    assert [m.tokens for m in about[:-1]] == [32, 64, 64]
    assert about[-1] == SequenceOutput(3, [], finish="cancelled")


def test_a_prompt_whose_first_token_fails_was_computed() -> None:
    class Broken(FakeRunner):
        def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
            return tuple(SequenceResult(token=None, finite=False) for _ in plan.sequences)

    engine = Engine(runner=Broken())
    engine.inbox.put(request(1))
    engine.turn()
    kinds = [type(m) for m in engine.sent if isinstance(m, Prefilled | SequenceFailed)]
    assert kinds == [Prefilled, SequenceFailed]
    assert engine.of(Prefilled) == [Prefilled(1, 9, 0)]


def test_an_eviction_that_drains_is_carried_out_when_its_sequences_fail() -> None:
    engine = Engine()
    engine.inbox.put(Activate(1, adapter("a")))
    for _ in range(4):
        engine.turn()
    engine.inbox.put(request(1, adapter("a"), new=40))
    engine.turn()
    assert engine.memory.held == {("a", "host"), ("a", "device")}
    engine.inbox.put(Evict(2, "a", "drain"))
    engine.turn()
    assert engine.of(OperationDone)[-1] == OperationDone(2, done=False)
    engine.inbox.put(Evict(3, "a", "abort"))
    engine.turn()
    assert [m.sequence for m in engine.sent if isinstance(m, SequenceFailed)] == [1]
    assert engine.memory.held == set()
    engine.loop.check_integrity()


def test_answers_to_messages_do_not_wait_for_the_next_step() -> None:
    """A step may take a second, and who cancelled or evicts is not served by it."""
    seen: list[list[FromEngine]] = []

    class Watching(FakeRunner):
        def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
            seen.append(list(engine.sent))
            engine.inbox.put(Stop())
            return super().execute(plan)

    engine = Engine(runner=Watching())
    for message in (request(1), request(2), Cancel(2), Unpin(3, "a")):
        engine.inbox.put(message)
    engine.loop.run()
    (before,) = seen
    assert SequenceOutput(2, [], finish="cancelled") in before
    assert OperationDone(3) in before
    assert [(m.running, m.waiting) for m in before if isinstance(m, Occupancy)] == [(1, 0)]


def test_cached_tokens_are_reported_once_with_the_first_output_and_its_step() -> None:
    engine = Engine()
    for number in (1, 2):
        engine.inbox.put(request(number))
        for _ in range(4):
            engine.turn()
    outputs = [m for m in engine.sent if isinstance(m, SequenceOutput)]
    assert [(m.sequence, m.cached_tokens) for m in outputs] == [
        (1, 0), (1, 0), (1, 0), (2, 8), (2, 0), (2, 0),
    ]  # fmt: skip
    steps = [m for m in engine.sent if isinstance(m, StepDone)]
    assert [(m.prefix_asked, m.prefix_found) for m in steps] == [
        (9, 0), (0, 0), (0, 0), (9, 8), (0, 0), (0, 0),
    ]  # fmt: skip
    occupancy = [m for m in engine.sent if isinstance(m, Occupancy)][-1]
    assert (occupancy.kv_blocks_used, occupancy.kv_blocks_cached) == (0, 2)


def with_deadline(number: int, prompt: range, deadline: float) -> Submit:
    request = SequenceRequest(list(prompt), 3, SamplingParams(), deadline=deadline)
    return Submit(number, request)


def test_a_deadline_is_refused_when_what_runs_makes_it_impossible() -> None:
    """The loop measures the pace: a full step of 32 tokens takes a second."""
    engine = Engine(pace=32, context=128, blocks=60)
    engine.inbox.put(with_deadline(1, range(40), 0.001))
    engine.turn()
    assert engine.of(SequenceFailed) == [], "nothing was measured yet"
    assert engine.now == 1
    engine.inbox.put(with_deadline(2, range(100, 140), 1.5))
    engine.inbox.put(with_deadline(3, range(50, 114), 2.6))
    engine.turn()
    alone, behind = [m for m in engine.sent if isinstance(m, SequenceFailed)]
    assert (alone.sequence, behind.sequence) == (2, 3)
    assert {m.error.reason for m in (alone, behind)} == {"DEADLINE_TOO_SHORT"}
    assert alone.error.retry_after_s is None, "40 tokens take longer whoever waits"
    assert behind.error.retry_after_s is not None, "64 tokens do not, once 1 has gone"
    assert "retry" in behind.error.message
    assert engine.scheduler.waiting + engine.scheduler.running == 1
    while engine.scheduler.has_work():
        engine.turn()
    engine.sent.clear()
    engine.inbox.put(with_deadline(4, range(50, 58), engine.now + 0.3))
    # The first one's prompt: it is cached.
    engine.inbox.put(with_deadline(5, range(40), engine.now + 0.5))
    engine.turn()
    assert not engine.of(SequenceFailed)
    assert engine.scheduler.running == 2


def test_a_wait_for_a_place_is_not_counted_as_the_adapters_load() -> None:
    engine = Engine(max_running=1)
    engine.inbox.put(request(1, new=40))
    engine.turn()
    engine.inbox.put(request(2, adapter("a")))
    engine.turn()
    engine.now += 2
    for _ in range(4):
        engine.turn()
    assert engine.memory.held == {("a", "host"), ("a", "device")}
    engine.now += 30
    engine.inbox.put(Cancel(1))
    engine.turn()
    outputs = [m for m in engine.sent if isinstance(m, SequenceOutput)]
    first = next(m for m in outputs if m.sequence == 2)
    assert (first.load_seconds, first.queue_seconds) == (2, 30)


def test_a_prompt_that_looks_for_no_prefix_is_no_lookup_of_the_prefix_cache() -> None:
    engine = Engine()
    for number, (share, scores) in enumerate([(True, False), (False, False), (True, True)]):
        engine.inbox.put(
            Submit(
                number,
                SequenceRequest(
                    [1] * 9,
                    1,
                    SamplingParams(),
                    use_prefix_cache=share,
                    prompt_logprobs=scores,
                ),
            )
        )
        engine.turn()
    steps = [m for m in engine.sent if isinstance(m, StepDone)]
    assert [(m.prefix_asked, m.prefix_found) for m in steps] == [(9, 0), (0, 0), (0, 0)]


def test_adapters_of_what_runs_and_what_waits_are_told() -> None:
    engine = Engine(max_running=2)
    engine.inbox.put(request(1, adapter("a"), new=20))
    engine.turn()
    assert engine.of(Occupancy)[-1].waiting_adapters == ("a",)  # type: ignore[union-attr]
    for number, source in ((2, adapter("a")), (3, adapter("b"))):
        engine.inbox.put(request(number, source, new=20))
    for _ in range(4):
        engine.turn()
    told = engine.of(Occupancy)[-1]
    assert isinstance(told, Occupancy)
    assert (told.running_adapters, told.waiting_adapters) == (("a",), ("b",))


def test_the_prefix_cache_is_reset_between_steps() -> None:
    engine = Engine()
    engine.inbox.put(request(1, new=9))
    for _ in range(9):
        engine.turn()
    assert engine.scheduler.blocks.cached > 0
    engine.inbox.put(ResetPrefixCache(7))
    engine.turn()
    assert OperationDone(7) in engine.sent
    assert engine.scheduler.blocks.cached == 0
    engine.loop.check_integrity()


def test_a_paused_loop_runs_no_step_and_goes_on_where_it_was() -> None:
    def outputs(engine: Engine) -> list[tuple[int, str | None]]:
        found = [m for m in engine.sent if isinstance(m, SequenceOutput)]
        return [(m.sequence, m.finish) for m in found]

    engine = Engine()
    engine.inbox.put(request(1, new=3))
    engine.turn()
    steps, had = engine.loop.steps, outputs(engine)
    assert (steps, had) == (1, [(1, None)])
    for message in (Pause(7, paused=True), request(2, new=2), Ping(5), Cancel(9)):
        engine.inbox.put(message)
    engine.inbox.put(Activate(8, adapter("a")))
    for _ in range(5):
        engine.turn()
    assert (engine.loop.steps, outputs(engine)) == (steps, had)
    assert engine.of(Pong) == [Pong(5, steps)], "it answers as ever"
    assert OperationDone(7) in engine.sent
    assert ("a", "device") in engine.memory.held, "adapters are loaded"
    engine.loop.check_integrity()
    engine.inbox.put(request(3, new=2))
    engine.inbox.put(Cancel(3))
    engine.turn()
    assert outputs(engine)[-1] == (3, "cancelled")
    engine.inbox.put(Pause(10, paused=False))
    for _ in range(10):
        engine.turn()
    assert {number for number, finish in outputs(engine) if finish == "length"} == {1, 2}
    assert not engine.scheduler.has_work()
    engine.loop.check_integrity()
