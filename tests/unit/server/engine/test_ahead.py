"""The loop with one step of lookahead, beside the loop that reads each step first.

A FAKE device keeps what each place of the KV cache was computed from, and chooses a token from
that. So a step that has the wrong token, position or block says something else from then on.
It executes late: a step when it is read, or when chance has it.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import pytest
from veneer_server.engine import loop
from veneer_server.engine.loop import StepLoop, Turn
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling import scheduler, sequence
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.step_limits import SchedulerLimits
from veneer_server.queues.fairness import Sender
from veneer_server.step.inbox import Inbox, Unheld
from veneer_server.step.plan import (
    AheadRunner,
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
    Submit,
)

from tests.planted import planted

BLOCK = 4
CONTEXT = 48
VOCAB = 23
EOS = 0
BAD = 13
"""A token of prompts whose logits are NaN."""


class Device:
    """FAKE: the KV cache, and the step's arithmetic.

    Args:
        random: when a constraint is late; None: never.
    """

    def __init__(self, random: Random | None = None) -> None:
        self.random = random
        self.late: list[int] = []
        """Sequences whose constraint was late."""
        self.cells: dict[int, int | None] = {}
        self.last: dict[int, int] = {}
        """What the last step sampled on the device, by sequence."""

    def run(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        before, self.last = self.last, {}
        return tuple(self._one(p, before) for p in plan.sequences)

    def _one(self, p: PlannedSequence, before: dict[int, int]) -> SequenceResult:
        tokens = list(p.tokens)
        if p.carries:
            tokens[-1] = before[p.sequence]
        content: int | None = self.cells[self._slot(p, p.start - 1)] if p.start else 1
        for at, token in enumerate(tokens, p.start):
            wrong = content is None or token == BAD
            content = None if wrong else hash((content, at, token))
            self.cells[self._slot(p, at)] = content
        scores = tuple(float(token) for token in p.score)
        if not p.samples or content is None:
            self.last[p.sequence] = 0  # a step may take it before the host knows
            return SequenceResult(finite=content is not None, scores=scores)
        token = hash((content, p.position, p.sampling.seed)) % VOCAB
        if p.unadjusted:
            self.last[p.sequence] = token
        elif p.token_counts is not None:
            token = (token + int(p.token_counts.counts.sum())) % VOCAB
        while token in p.forbidden:
            token += 1
        following = ConstraintState.GOES_ON
        if p.constraint is not None:
            following = ConstraintState.COMPLETE if token % 7 == 1 else self._following(p)
        if following is ConstraintState.LATE and self.random and self.random.random() < 0.5:
            return SequenceResult(following=following)  # its mask was late already
        return SequenceResult(token=token, scores=scores, following=following)

    def _following(self, p: PlannedSequence) -> ConstraintState:
        if self.random is None or self.random.random() < 0.6:
            return ConstraintState.GOES_ON
        return ConstraintState.LATE

    @staticmethod
    def _slot(p: PlannedSequence, at: int) -> int:
        block = p.blocks[at // BLOCK]
        assert block, "the padding block"
        return block * BLOCK + at % BLOCK


class Behind:
    """FAKE runner that reads each step before the next."""

    def __init__(self, random: Random | None = None) -> None:
        self.device = Device(random)

    def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        return self.device.run(plan)


class Ahead(Behind):
    """FAKE runner with lookahead."""

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.random = random
        self.queue: deque[StepPlan] = deque()
        self.results: deque[tuple[StepPlan, tuple[SequenceResult, ...]]] = deque()
        self.reads = self.behind = self.carried = 0

    def submit(self, plan: StepPlan) -> None:
        assert len(self.queue) + len(self.results) < 2, "more than one step is unread"
        assert not any(unread.scores for unread in self.queue)
        self.carried += sum(p.carries for p in plan.sequences)
        self.queue.append(plan)
        if self.random.random() < 0.5:
            self._advance()

    def _advance(self) -> None:
        plan = self.queue.popleft()
        self.results.append((plan, self.device.run(plan)))

    def read(self) -> tuple[SequenceResult, ...]:
        self.reads += 1
        self.behind += len(self.queue) + len(self.results) > 1
        if not self.results:
            self._advance()
        plan, results = self.results.popleft()
        self.device.late += [
            planned.sequence
            for planned, result in zip(plan.sequences, results, strict=True)
            if result.following is ConstraintState.LATE
        ]
        return results


@dataclass
class Said:
    """What a sequence was told."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    scores: list[float] = field(default_factory=list)


class Grammars:
    """FAKE: compiles at once."""

    def compile(
        self, sequence: int, constraint: Constraint, done: Callable[[Any], None], sender: Sender
    ) -> None:
        done(None)

    def forget(self, sequence: int) -> None:
        pass

    def ending(self, sequence: int) -> ConstraintState:
        return ConstraintState.GOES_ON


class Engine:
    """A loop without a thread."""

    def __init__(self, runner: Any, *, blocks: int, running: int, window: int | None) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self.said: dict[int, Said] = {}
        self.late: list[int] = runner.device.late
        residency = Residency(1000, 1000, itemsize=1)
        limits = SchedulerLimits(16, running, context_length=CONTEXT, prefill_beside_decode=5)
        chunk = 2 * limits.chunk if isinstance(runner, AheadRunner) else limits.chunk
        manager = BlockManager(blocks, BLOCK, window=window, chunk=chunk)
        self.scheduler = Scheduler(limits, manager, residency, frozenset({EOS}))
        self.loop = StepLoop(
            inbox=self.inbox,
            scheduler=self.scheduler,
            residency=residency,
            runner=runner,
            memory=None,  # type: ignore[arg-type]  # no adapters here
            send=self._send,
            clock=lambda: 0.0,
            grammars=Grammars(),
        )

    def _send(self, messages: list[FromEngine]) -> None:
        for message in messages:
            if isinstance(message, SequenceFailed):
                self.said[message.sequence].finish = message.error.reason
            elif isinstance(message, SequenceOutput):
                said = self.said[message.sequence]
                assert said.finish is None, "a token after the end"
                said.tokens += message.tokens
                said.finish = message.finish
                said.scores += message.prompt_logprobs or []

    def masks_arrive(self) -> None:
        """Those that were late."""
        while self.late:
            self.inbox.put(Unheld(self.late.pop()))

    def ask(self, number: int, request: SequenceRequest) -> None:
        self.said[number] = Said()
        self.inbox.put(Submit(number, request))

    def drain(self) -> None:
        for _ in range(3000):
            if self.loop.turn() is Turn.IDLE and not self.late:
                return
            self.loop.check_integrity()
            self.masks_arrive()
        raise AssertionError(f"never ended: {self.said}")


def _request(random: Random) -> SequenceRequest:
    prompt = [random.choice((1, 1, 2)) for _ in range(random.choice((1, 3, 9, 30)))]
    if random.random() < 0.05:
        prompt[random.randrange(len(prompt))] = BAD
    kinds = ("plain", "plain", "plain", "penalties", "least", "bias", "scores", "constraint")
    kind = random.choice(kinds)
    return SequenceRequest(
        prompt=prompt,
        max_tokens=min(random.choice((1, 2, 8, CONTEXT)), CONTEXT - len(prompt)),
        sampling=SamplingParams(
            seed=random.randrange(4),
            frequency_penalty=0.5 if kind == "penalties" else 0.0,
            logit_bias={3: 1.0} if kind == "bias" else {},
        ),
        ignore_eos=random.random() < 0.3,
        stop_token_ids=[5] if random.random() < 0.3 else [],
        min_tokens=random.choice((1, 4)) if kind == "least" else 0,
        constraint=Constraint("regex", "x") if kind == "constraint" else None,
        prompt_logprobs=kind == "scores",
        use_prefix_cache=random.random() < 0.8,
    )


def _history(seed: int) -> Ahead:
    """A history with both loops; their sequences must be told the same."""
    random = Random(seed)
    asked = {number: _request(random) for number in range(1, random.randint(2, 14))}
    window = random.choice((None, None, 6))
    alone = Engine(Behind(), blocks=200, running=1, window=window)
    for number, request in asked.items():
        alone.ask(number, request)
    alone.drain()
    fewest = Engine(Ahead(random), blocks=2, running=1, window=window)
    least = fewest.scheduler.blocks.most_blocks(CONTEXT)
    runner = Ahead(random)
    engine = Engine(
        runner,
        blocks=1 + random.choice((least, least + 3, 60)),
        running=random.choice((1, 3, 8)),
        window=window,
    )
    cancelled: set[int] = set()
    for number, request in asked.items():
        engine.ask(number, request)
        if random.random() < 0.15:
            cancelled.add(gone := random.randint(1, number))
            engine.inbox.put(Cancel(gone))
        for _ in range(random.choice((0, 1, 3, 9))):
            engine.loop.turn()
            engine.loop.check_integrity()
            if random.random() < 0.3:
                engine.masks_arrive()
    engine.drain()
    for number, expected in alone.said.items():
        found = engine.said[number]
        if number in cancelled and found.finish == "cancelled":
            assert found.tokens == expected.tokens[: len(found.tokens)]
        else:
            assert found == expected, f"sequence {number} of history {seed}"
    assert not [*runner.queue, *runner.results], "a step was never read"
    assert not engine.scheduler.blocks.used
    return runner


@pytest.mark.push
def test_sequences_are_told_the_same_one_step_ahead() -> None:
    runners = [_history(seed) for seed in range(400)]
    assert sum(r.carried for r in runners) > 2000
    assert sum(r.behind for r in runners) > 2000


def test_the_device_always_has_a_step_to_go_on_with() -> None:
    runner = Ahead(Random(0))
    engine = Engine(runner, blocks=60, running=8, window=None)
    for number in range(1, 5):
        engine.ask(number, SequenceRequest([1, 2], 20, SamplingParams(), None, ignore_eos=True))
    engine.drain()
    assert all(len(said.tokens) == 20 for said in engine.said.values())
    assert (runner.reads, runner.behind) == (20, 19)
    assert runner.carried == 4 * 19, "each token but the last is taken from the device"


def test_a_sequence_that_ends_costs_one_row_at_most() -> None:
    runner = Ahead(Random(0))
    engine = Engine(runner, blocks=60, running=8, window=None)
    stops = [*range(VOCAB)]
    request = SequenceRequest([1, 2], 20, SamplingParams(), None, stop_token_ids=stops)
    engine.ask(1, request)
    engine.drain()
    assert len(engine.said[1].tokens) == 1
    assert runner.carried == 1


def test_scores_are_read_before_the_next_step() -> None:
    runner = Ahead(Random(0))
    engine = Engine(runner, blocks=60, running=8, window=None)
    request = SequenceRequest(
        [1, 2] * 12, 3, SamplingParams(), None, ignore_eos=True, prompt_logprobs=True
    )
    engine.ask(1, request)
    engine.drain()
    assert len(engine.said[1].scores) == 23
    assert len(engine.said[1].tokens) == 3


PLANTED: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "host-sampled tokens are taken from the device": partial(
        planted,
        sequence,
        "return self.carried and goes_on and self.length < context",
        "return goes_on and self.length < context",
    ),
    "the position does not count the token that is awaited": partial(
        planted, sequence, "position=length,", "position=known,"
    ),
    "a step begins where the last one did": partial(
        planted,
        sequence,
        "start = sequence.computed + sequence.ahead",
        "start = sequence.computed",
    ),
    "blocks are those of the last step": partial(
        planted,
        scheduler,
        "while not self.blocks.grow(sequence, sequence.begun + count):",
        "while not self.blocks.grow(sequence, sequence.computed + count):",
    ),
    "a preempted sequence still awaits a token": partial(
        planted,
        scheduler,
        "sequence.computed = sequence.ahead = sequence.awaited = 0",
        "sequence.computed = 0",
    ),
    "results do not come back": partial(
        planted, scheduler, "sequence.returned(planned)", "pass"
    ),
    "the wrong step's results are applied": partial(
        planted,
        loop,
        "self._report(flying, runner.read())",
        "self._report(plan, runner.read())",
    ),
    "the last step is never read": partial(
        planted,
        loop,
        "if plan is not None or self._flying is not None:",
        "if plan is not None:",
    ),
    "a step with scores is left unread": partial(
        planted, loop, "if plan is not None and plan.scores:", "if False:"
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_noticed(name: str) -> None:
    def look() -> None:
        for seed in range(400):
            _history(seed)

    noticed = (AssertionError, LookupError, AttributeError, ValueError)
    with PLANTED[name](), pytest.raises(noticed):
        look()
