"""Random histories of tenants over the real scheduler, with a FAKE executor and loads.

Tenants that stay backlogged and runnable get service by weight within the bound of
`fair_shares`; nobody waits while there is room; adapters of a tenant take turns. Service is
counted here, from what the steps computed, not by the scheduler's counters.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from types import ModuleType

import pytest
from veneer_server.engine.scheduling import admission, fair_shares, scheduler, waiting
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.step.plan import SequenceResult, StepPlan

from tests.planted import planted
from tests.unit.server.engine.world import SIZE, World, adapter

HISTORIES = 2000
STEPS = 60
PROMPT, NEW = 24, 12
"""Most tokens."""


@dataclass
class Backlog:
    """Two tenants that have both been backlogged and runnable since some moment.

    Attributes:
        least, most: difference of their services by weight.
    """

    least: float
    most: float


@dataclass
class Fair(World):
    """A world without the checks of K and V, that counts service.

    Attributes:
        served: by tenant: prompt tokens computed at the first start, and twice the output.
        weights: by tenant.
        running_most: for the bound.
    """

    served: Counter[str] = field(default_factory=Counter)
    weights: dict[str, float] = field(default_factory=dict)
    backlogs: dict[tuple[str, str], Backlog] = field(default_factory=dict)
    turns: dict[tuple[str, str | None], Counter[str | None]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    started_once: set[int] = field(default_factory=set)

    def step(self, seconds: float = 1.0, poison: int | None = None) -> StepPlan | None:
        self.now += seconds
        actions, impossible = self.scheduler.plan_adapters(self.now)
        assert not impossible
        self.carry_out(actions)
        before = self._runnable()
        self._observe(before)
        running = {s.id for s in self.scheduler.batch}
        plan = self.scheduler.schedule(self.now)
        preempted = running - {s.id for s in self.scheduler.batch}
        self.seen["preempted"] += len(preempted)
        started = [s for s in self.scheduler.batch if s.id not in running]
        for sequence in started:
            if sequence.id not in self.started_once:
                self.started_once.add(sequence.id)
                computed = sequence.prompt_length - sequence.cached_tokens
                self.served[sequence.request.tenant] += computed
                self.seen["started"] += 1
        after = self._runnable()
        self._check_turns(before, started, after)
        if not preempted:
            self._check_conserved(after)
        self._observe(after)
        if plan is not None:
            self._execute(plan)
        return plan

    def _execute(self, plan: StepPlan) -> None:
        results = tuple(SequenceResult(token=1 if p.samples else None) for p in plan.sequences)
        updates, actions = self.scheduler.update(plan, results)
        self.carry_out(actions)
        for update in updates:
            if update.token is not None:
                self.served[update.sequence.request.tenant] += 2
            if update.finish is not None:
                self.live.pop(update.sequence.id)

    def _runnable(self) -> list[Sequence]:
        """What waits, has not started before, and could start."""
        return [
            s
            for s in self.scheduler.queue
            if s.admitted is None and (s.digest is None or self.residency.ready(s.digest))
        ]

    def _observe(self, runnable: list[Sequence]) -> None:
        """Extend the backlogs of those that are runnable now, and check the bound."""
        if self.scheduler.admission.lacking_too_long(self.now) is not None:
            self.backlogs.clear()  # some are held back, so that an adapter gets room
            return
        names = {s.request.tenant for s in runnable}
        for pair in combinations(sorted(self.weights), 2):
            if not names.issuperset(pair):
                self.backlogs.pop(pair, None)
                continue
            one, other = (self.served[name] / self.weights[name] for name in pair)
            seen = self.backlogs.setdefault(pair, Backlog(one - other, one - other))
            seen.least = min(seen.least, one - other)
            seen.most = max(seen.most, one - other)
            self.seen["backlogged"] += 1
            weight = min(self.weights[name] for name in pair)
            bound = 2 * (PROMPT + 2 * NEW * self.max_running) / weight
            apart = seen.most - seen.least
            assert apart <= bound, f"{pair} are {apart:.0f} apart, bound {bound:.0f}"

    def _check_conserved(self, left: list[Sequence]) -> None:
        """Check that whoever still waits lacks a place or blocks."""
        if self.scheduler.admission.lacking_too_long(self.now) is not None or not left:
            return
        if self.scheduler.running >= self.max_running:
            self.seen["full"] += 1
            return
        free = self.scheduler.blocks.total - self.scheduler.blocks.used
        needed = -(-max(len(s.tokens) for s in self.scheduler.queue) // 4)
        assert free < needed + self.scheduler.running + 1, "waits though there is room"
        self.seen["no blocks"] += 1

    def _check_turns(
        self, ready: list[Sequence], started: list[Sequence], left: list[Sequence]
    ) -> None:
        """Check that no adapter gets a second turn before another one of its tenant that was
        runnable all the time has had its first."""
        if self.scheduler.admission.lacking_too_long(self.now) is not None:
            self.turns.clear()
            return
        present = {(s.request.tenant, s.digest) for s in ready}
        self.turns = {key: turns for key, turns in self.turns.items() if key in present}
        for sequence in started:
            if sequence.place < 0:
                continue  # it was preempted
            tenant, digest = sequence.request.tenant, sequence.digest
            self.turns.pop((tenant, digest), None)
            for (other, waits), turns in self.turns.items():
                if other == tenant and waits != digest:
                    turns[digest] += 1
                    self.seen["turns"] += 1
                    assert turns[digest] <= 1, f"{waits} of {tenant} has had no turn"
        for key in present & {(s.request.tenant, s.digest) for s in left}:
            self.turns.setdefault(key, Counter())


def history(random: random.Random) -> Counter[str]:
    """One history. Returns what it came upon."""
    names = [f"t{i}" for i in range(random.choice([2, 2, 3]))]
    world = Fair(
        device=random.choice([2, 8]) * SIZE,
        host=8 * SIZE,
        blocks=random.choice([12, 16, 60]),
        max_running=random.choice([1, 1, 2, 3]),
        budget=256,
        beside_decode=256,
        max_wait=0.0,
        patience=random.choice([5.0, 1e9]),
    )
    world.weights = {name: random.choice([0.5, 1.0, 1.0, 4.0]) for name in names}
    kinds = {name: (random.choice([1, PROMPT]), random.choice([1, NEW])) for name in names}
    idle = dict.fromkeys(names, False)
    number = 0
    for _ in range(STEPS):
        for name in names:
            if random.random() < 0.05:
                idle[name] = not idle[name]
                kinds[name] = random.choice([1, PROMPT]), random.choice([1, NEW])
            waits = sum(s.request.tenant == name for s in world.live.values())
            if not idle[name] and random.random() < (0.7 if waits < 5 else 0.1):
                number += 1
                source = random.choice([None, None, "a", "b", "c"])
                prompt, new = kinds[name]
                world.ask(
                    number,
                    [-number] * prompt,
                    new,
                    adapter(source) if source else None,
                    tenant=name,
                    weight=world.weights[name],
                )
        if world.pending and random.random() < 0.5:
            world.arrive(random.randrange(len(world.pending)))
        if world.live and random.random() < 0.05:
            world.cancel(random.choice(list(world.live)))
            world.seen["cancelled"] += 1
        if random.random() < 0.02:  # all of a tenant leave at once
            for sequence in [s for s in world.live.values() if s.request.tenant == names[0]]:
                world.cancel(sequence.id)
        world.seen["steps"] += 1
        world.step()
    world.scheduler.check_integrity()
    return world.seen


def histories(count: int, seed: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    for number in range(count):
        try:
            seen += history(random.Random(f"{seed} {number}"))
        except AssertionError as error:
            raise AssertionError(f"history {number} of seed {seed}: {error}") from error
    return seen


@pytest.mark.push
def test_the_bound_of_fairness_holds_in_random_histories() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    seen = histories(HISTORIES, seed)
    print(dict(seen))
    assert seen["backlogged"] > 20 * HISTORIES
    assert seen["turns"] > HISTORIES
    assert seen["full"] > 5 * HISTORIES
    assert seen["preempted"] > HISTORIES / 10
    assert seen["no blocks"] > HISTORIES / 10


PLANTED: dict[str, tuple[ModuleType, str, str]] = {
    "no lift from idle": (
        fair_shares,
        "share.counter = max(share.counter, least)",
        "share.counter += 0 * least",
    ),
    "output is not charged": (
        scheduler,
        "sequence.share.charge(OUTPUT_COST * sequence.work)",
        "pass",
    ),
    "prompts are not charged": (
        scheduler,
        "sequence.share.charge(PROMPT_COST * sequence.prompt_work * max(1, computed))",
        "sequence.share.charge(1)",
    ),
    "weights do not count": (fair_shares, "cost / self.weight", "cost"),
    "an adapter keeps its turn": (
        waiting,
        "group.started(sequence, now)\n            group.turn = self._next_turn()",
        "group.started(sequence, now)",
    ),
    "a place stays empty": (admission, "if places <= 0:", "if places <= 1:"),
    "what waits for an adapter counts as backlogged": (
        waiting,
        "self._set_ready(group.flow or self.preempted, group, ready=ready)",
        "self._set_ready(group.flow or self.preempted, group, ready=True)",
    ),
}


@pytest.mark.verify
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug: str) -> None:
    with planted(*PLANTED[bug]), pytest.raises(AssertionError):
        histories(300, seed=1)
