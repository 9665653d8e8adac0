"""The runner with a backend whose logits are a function of token and position."""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from veneer_server.constraints.grammars import GrammarFailed, Grammars
from veneer_server.engine.execution.model_runner import ModelRunner
from veneer_server.engine.loop import StepLoop
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.step_limits import SchedulerLimits
from veneer_server.step.arrays import StepArrays, finite_rows
from veneer_server.step.inbox import Inbox, Unheld
from veneer_server.step.plan import PlannedSequence, StepPlan
from veneer_server.wire.messages import (
    Constraint,
    ConstraintLimits,
    FromEngine,
    SamplingParams,
    SequenceFailed,
    SequenceOutput,
    SequenceRequest,
    Stop,
    Submit,
)

from tests.unit.server.never_slow import never_slow

VOCAB, EOS, BLOCK = 49152, 2, 4
PEOPLE = Constraint(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 10},
                "age": {"type": "integer", "maximum": 99, "minimum": 0},
            },
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
)


class FakeBackend:
    """FAKE: a row's logits depend on its token and position alone; ``spoiled`` tokens
    give NaN."""

    def __init__(self) -> None:
        self.spoiled: set[int] = set()

    def execute(self, step: StepArrays) -> torch.Tensor:
        rows = []
        for row in step.logit_rows.tolist():
            token, position = int(step.tokens[row]), int(step.positions[row])
            generator = torch.Generator().manual_seed(token * 100_003 + position)
            logits = torch.randn(VOCAB, generator=generator) * 2
            rows.append(logits * torch.nan if token in self.spoiled else logits)
        return torch.stack(rows)

    def finite(self, logits: torch.Tensor) -> list[bool]:
        return finite_rows(logits)

    def clear(self, blocks: list[int]) -> None:
        """There is no cache to clear."""


INBOXES: list[Inbox] = []
"""The last is that of the loop that runs."""


@pytest.fixture(scope="module")
def grammars(base_folder: Path) -> Iterator[Grammars]:
    with pytest.MonkeyPatch.context() as patch:
        never_slow(patch)
        made = Grammars.of_base(
            base_folder,
            vocab_size=VOCAB,
            eos_token_ids=[EOS],
            limits=ConstraintLimits(),
            unhold=lambda sequence: INBOXES[-1].put(Unheld(sequence)),
        )
        assert made.usable()
        yield made
        made.close()


def allowed(grammars: Grammars) -> NDArray[np.bool_]:
    """What may come next in sequence 1, however long it takes to know."""
    known = grammars.allowed(1, time.monotonic() + 60)
    assert isinstance(known, np.ndarray)
    return known


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None


def run(grammars: Grammars, blocks: int, requests: list[dict[str, Any]]) -> list[Answer]:
    """What the requests get from a loop with so many KV blocks."""
    inbox: Inbox = queue.SimpleQueue()
    INBOXES.append(inbox)
    out: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
    residency = Residency(host_budget=1, device_budget=1, itemsize=2, shared=True)
    limits = SchedulerLimits(max_batch_tokens=64, max_running=8, context_length=256)
    scheduler = Scheduler(
        limits, BlockManager(blocks, BLOCK, prefix_cache=False), residency, frozenset({EOS})
    )
    schedule, preempted = scheduler.schedule, []

    def noted(now: float) -> StepPlan | None:
        running = {s.id for s in scheduler.batch}
        plan = schedule(now)
        preempted.extend(s.id for s in scheduler.queue if s.id in running)
        return plan

    scheduler.schedule = noted  # type: ignore[method-assign]
    loop = StepLoop(
        inbox=inbox,
        scheduler=scheduler,
        residency=residency,
        runner=ModelRunner(FakeBackend(), {}, BLOCK, grammars),
        memory=None,  # type: ignore[arg-type]  # no adapters here
        send=lambda messages: [out.put(m) for m in messages] and None,
        grammars=grammars,
    )
    thread = threading.Thread(target=loop.run, daemon=True)
    for number, request in enumerate(requests):
        inbox.put(Submit(number, SequenceRequest(**request)))
    thread.start()
    answers = [Answer() for _ in requests]
    ended = 0
    while ended < len(requests):
        message = out.get(timeout=60)
        if isinstance(message, SequenceFailed):
            answers[message.sequence].error = message.error.message
            ended += 1
        elif isinstance(message, SequenceOutput):
            answers[message.sequence].tokens += message.tokens
            answers[message.sequence].finish = message.finish
            ended += message.finish is not None
    inbox.put(Stop())
    thread.join()
    loop.check_integrity()
    assert bool(preempted) == (blocks < 64), "small pools must preempt, large ones must not"
    return answers


def test_a_preempted_constrained_sequence_resumes_where_it_was(
    grammars: Grammars, base_folder: Path
) -> None:
    requests = [
        {
            "prompt": [10 + number] * 6,
            "max_tokens": 40,
            "sampling": SamplingParams(seed=number),
            "constraint": PEOPLE if number % 2 else None,
            "ignore_eos": True,
        }
        for number in range(4)
    ]
    roomy, tight = run(grammars, 200, requests), run(grammars, 16, requests)
    assert tight == roomy
    assert {a.finish for a in tight[1::2]} == {"stop"}
    assert len(grammars) == 0


def say_for_ever(grammars: Grammars, token: int) -> None:
    while True:
        allowed(grammars)
        grammars.advance({1: token}, time.monotonic() + 60)


def plan_for(**fields: Any) -> PlannedSequence:
    given: dict[str, Any] = {
        "sequence": 1,
        "digest": None,
        "tokens": (5,),
        "start": 0,
        "blocks": array("q", [1]),
        "samples": True,
        "score": (),
        "logprobs": False,
        "sampling": SamplingParams(temperature=0),
        "position": 1,
    }
    return PlannedSequence(**given | fields)


def test_tops_and_scores_come_where_they_were_asked_for() -> None:
    runner = ModelRunner(FakeBackend(), {}, BLOCK)
    plan = StepPlan(
        (
            plan_for(tokens=(8,)),
            plan_for(logprobs=True, top_logprobs=3),
            plan_for(logprobs=True),
            plan_for(tokens=(5, 6, 7), score=(6, 7), position=3, logprobs=True, top_logprobs=2),
            plan_for(tokens=(5, 6), score=(6, 7), samples=False, top_logprobs=2, ranks=True),
        )
    )
    results = runner.execute(plan)
    assert results[1].token == results[2].token != results[0].token
    assert results[4].token is None
    assert results[1].logprob == results[2].logprob
    assert results[0].logprob is None
    assert [r.tops and len(r.tops) for r in results] == [None, 3, None, 2, None]
    for row in (1, 3):  # greedy: the likeliest is the one that was chosen
        tops = results[row].tops
        assert tops is not None
        assert tops[0] == (results[row].token, pytest.approx(results[row].logprob))
    assert [[len(t) for t in r.score_tops] for r in results] == [
        [],
        [],
        [],
        [2, 2],
        [2, 2],
    ]
    # The first rows of both score the same token at the same place.
    assert results[3].scores == results[4].scores
    assert results[3].score_tops == results[4].score_tops
    assert [len(r.score_ranks) for r in results] == [0, 0, 0, 0, 2]
    assert min(results[4].score_ranks) >= 1


def test_a_row_that_is_not_finite_has_no_token_and_does_not_advance_its_constraint(
    grammars: Grammars,
) -> None:
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    grammars.compile(1, Constraint("regex", "[a-z][0-9]"), done.put)
    assert done.get(timeout=60) is None
    backend = FakeBackend()
    backend.spoiled.add(9)
    runner = ModelRunner(backend, {}, BLOCK, grammars)
    constraint = Constraint("regex", "[a-z][0-9]")
    before = allowed(grammars)
    results = runner.execute(
        StepPlan((plan_for(tokens=(9,), constraint=constraint), plan_for(sequence=2)))
    )
    assert [r.finite for r in results] == [False, True]
    assert results[0].token is None
    assert results[1].token is not None
    assert (allowed(grammars) == before).all()
    [good] = runner.execute(StepPlan((plan_for(constraint=constraint),)))
    assert before[good.token]
    assert not (allowed(grammars) == before).all()
    grammars.forget(1)


def test_a_constraint_that_fails_ends_its_row_only(grammars: Grammars) -> None:
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    impossible = Constraint("regex", "((((a?){30}){30}){30}){30}")
    grammars.compile(1, impossible, done.put)
    assert done.get(timeout=60) is None
    a = int(np.flatnonzero(allowed(grammars))[-1])
    with pytest.raises(GrammarFailed):
        say_for_ever(grammars, a)
    runner = ModelRunner(FakeBackend(), {}, BLOCK, grammars)
    results = runner.execute(
        StepPlan((plan_for(constraint=impossible), plan_for(sequence=2, logprobs=True)))
    )
    assert results[0].token is None
    assert results[0].failure
    assert results[1].failure is None
    assert results[1].token is not None
    assert results[1].logprob is not None
    grammars.forget(1)


def test_a_row_that_nothing_can_be_drawn_from_ends_alone(grammars: Grammars) -> None:
    """An infinite temperature, which requests are refused, makes NaN of what a
    constraint forbids."""
    wild = SamplingParams(temperature=math.inf)
    requests = [
        {"prompt": [10] * 6, "max_tokens": 5, "sampling": sampling, "constraint": constraint}
        for sampling, constraint in (
            (SamplingParams(seed=1), None),
            (wild, PEOPLE),
            (SamplingParams(seed=2), PEOPLE),
        )
    ]
    first, none, last = run(grammars, 200, requests)
    assert none.error is not None
    assert "NaN" in none.error
    assert (none.tokens, none.finish) == ([], None)
    assert [(len(a.tokens), a.finish) for a in (first, last)] == [(5, "length")] * 2
    assert len(grammars) == 0


def test_stop_tokens_wait_for_the_least_number_of_tokens(grammars: Grammars) -> None:
    def asked(**more: Any) -> dict[str, Any]:
        return {
            "prompt": [10] * 6,
            "max_tokens": 9,
            "sampling": SamplingParams(temperature=0),
            **more,
        }

    [free] = run(grammars, 200, [asked()])
    first, fifth = free.tokens[0], free.tokens[4]
    early, held = run(
        grammars,
        200,
        [asked(stop_token_ids=[first]), asked(stop_token_ids=[first], min_tokens=4)],
    )
    assert (early.tokens, early.finish) == ([first], "stop")
    assert len(held.tokens) >= 4
    assert first not in held.tokens[:4]
    # One that comes when it may ends the output, like one that nobody held up.
    [in_time] = run(grammars, 200, [asked(stop_token_ids=[fifth], min_tokens=4)])
    assert (in_time.tokens, in_time.finish) == (free.tokens[:5], "stop")
    # Preempted or not: what counts is what was generated.
    requests = [asked(prompt=[20 + n] * 6, max_tokens=40, min_tokens=30) for n in range(4)]
    assert run(grammars, 16, requests) == run(grammars, 200, requests)


def test_a_complete_constraint_ends_before_the_least_number_of_tokens(
    grammars: Grammars,
) -> None:
    sampling = SamplingParams(temperature=0)
    word = {
        "prompt": [10] * 6,
        "max_tokens": 9,
        "min_tokens": 9,
        "sampling": sampling,
        "constraint": Constraint("choice", '["yes", "no"]'),
    }
    endless = {**word, "constraint": Constraint("regex", "[a-z]+")}
    done, goes_on = run(grammars, 200, [word, endless])
    assert done.finish == "stop"
    assert len(done.tokens) < 9
    assert len(goes_on.tokens) == 9, "the constraint would allow an end earlier"


def test_a_grammar(grammars: Grammars) -> None:
    grammar = Constraint("grammar", 'start: ("a" | "b") "-" NUMBER\nNUMBER: /[0-9]{3}/')
    answers = run(
        grammars,
        200,
        [
            {
                "prompt": [10] * 6,
                "max_tokens": 20,
                "sampling": SamplingParams(temperature=0),
                "constraint": constraint,
            }
            for constraint in (grammar, Constraint("grammar", "start: nothing"))
        ],
    )
    assert answers[0].finish == "stop"
    assert answers[1].error is not None
