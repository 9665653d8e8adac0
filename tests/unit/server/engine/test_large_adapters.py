"""Large adapters: a token under one counts for as many as it takes the time of, in the budget
of a step and in fairness. No tensors."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from veneer_server.step.plan import StepPlan
from veneer_server.wire.messages import token_work

from tests.unit.server.engine.world import World, adapter

BASE_PARAMETERS = 1000


def with_large_adapters(draw: random.Random, **changes: Any) -> World:
    """A world in which the size of adapters counts."""
    fields: dict[str, Any] = {
        "budget": 64,
        "beside_decode": draw.choice([8, 16, 32]),
        "blocks": 150,
        "max_running": draw.choice([4, 8]),
        "device": 1 << 20,
        "host": 1 << 20,
    }
    world = World(**fields | changes)
    world.limits = world.scheduler.limits = replace(
        world.limits, base_parameters=BASE_PARAMETERS
    )
    return world


def work_of(world: World, plan: StepPlan) -> tuple[float, float]:
    """The work of a step's prompt tokens, and what adapters add to its decode."""
    works = {s.id: token_work(s.adapter, BASE_PARAMETERS) for s in world.live.values()}
    works |= {planned.sequence: planned.work for planned in plan.sequences}
    prefill = sum(
        len(p.tokens) * works[p.sequence] for p in plan.sequences if len(p.tokens) > 1
    )
    decode = sum(works[p.sequence] - 1 for p in plan.sequences if len(p.tokens) == 1)
    return prefill, decode


def test_an_adapter_of_an_ordinary_rank_counts_for_nothing() -> None:
    """Rank 64 in all projections of a base of 135M parameters has 19.5M."""
    of_rank_64 = adapter("a", 19_500_000)
    assert token_work(of_rank_64, 134_515_008) == 1
    of_rank_1024 = adapter("a", 16 * 19_500_000)
    # CPU time, measured: 3.4 times the base's for prompts, 6.2 for a row that decodes alone.
    assert 3.4 < token_work(of_rank_1024, 134_515_008) < 6.2
    assert token_work(of_rank_1024, 7_000_000_000) == 1
    assert token_work(of_rank_1024, 0) == token_work(None, 1) == 1


@pytest.mark.parametrize("seed", range(8))
def test_a_step_takes_no_more_for_large_adapters(seed: int) -> None:
    """Beside a stream of the base, however large adapters are: a step takes as much work as it
    may take prompt tokens, or a token or two more. All sequences end, and none that decodes is
    left out for longer than its turn."""
    print(f"seed {seed}")
    draw = random.Random(seed)
    world = with_large_adapters(draw)
    world.submit(1, 3, 50, None)
    for number in range(2, 12):
        size = draw.choice([0, 100, 1500, 4000, 20_000])
        source = adapter(f"a{size}", size) if size else None
        world.submit(number, draw.randint(1, 40), draw.randint(1, 12), source)
    beside, last = world.beside_decode, dict[int, int]()
    for step in range(3000):
        if not world.scheduler.has_work():
            break
        running = {s.id for s in world.scheduler.batch if s.remaining == 1}
        plan = world.step()
        while world.pending:
            world.arrive()
        if plan is None:
            continue
        planned = {p.sequence for p in plan.sequences}
        if running:
            prefill, decode = work_of(world, plan)
            heaviest = max(p.work for p in plan.sequences)
            # One token of a stream and one of a prompt, if each takes more than a half.
            more = heaviest * (2 if heaviest > beside / 2 else 1)
            assert prefill + decode <= beside + beside // 4 + more
            assert {1} & running <= planned, "the base's stream was left out"
        for id in planned & running:
            last[id] = step
        for id in running - planned:
            assert step - last.get(id, step) < 50, "a stream waits for ever"
    assert len(world.finished) == 11


@pytest.mark.parametrize("size", [400, 2333, 40_000])
def test_prompts_go_on_beside_many_streams_under_large_adapters(size: int) -> None:
    """However many there are, and however large: a prompt gets half of the tokens that it would
    get beside streams of the base."""
    world = with_large_adapters(random.Random(1), beside_decode=32, blocks=1000, max_running=64)
    large = adapter("large", size)
    for number in range(1, 16):
        world.ask(number, [-number] * 2, 30, large, tenant="hog")
    for _ in range(20):
        world.step()
        while world.pending:
            world.arrive()
    assert len(world.scheduler.batch) == 15
    world.ask(99, [-99] * 48, 1, tenant="light")
    for _ in range(3):
        world.step()
    assert 99 in world.finished


@pytest.mark.parametrize("seed", range(4))
def test_tenants_take_turns_at_decoding_under_large_adapters(seed: int) -> None:
    """A tenant's stream under an adapter that is hardly large gets a token in every second step
    at least, however many streams another tenant has under a huge one."""
    draw = random.Random(seed)
    world = with_large_adapters(draw, beside_decode=32, blocks=1000, max_running=64)
    huge, hardly = adapter("huge", draw.randint(4000, 40_000)), adapter("hardly", 170)
    for number in range(1, 16):
        world.ask(number, [-number] * 2, 30, huge, tenant="hog")
    world.ask(99, [-99] * 2, 20, hardly, tenant="light")
    for _ in range(60):
        world.step()
        while world.pending:
            world.arrive()
    assert 99 in world.finished


@pytest.mark.push
def test_service_under_a_large_adapter_counts_for_what_it_takes() -> None:
    """Two backlogged tenants: the one under a large adapter gets as much work, so fewer
    tokens."""
    world = with_large_adapters(random.Random(1), max_running=1)
    large = adapter("large", 2000)
    each = token_work(large, BASE_PARAMETERS)
    for number in range(1, 400):
        heavy = number % 2 == 0
        world.ask(
            number, [-number] * 4, 4, large if heavy else None, tenant="b" if heavy else "a"
        )
    for _ in range(300):
        world.step()
        while world.pending:
            world.arrive()
    ended = Counter(number % 2 for number in world.finished)
    assert ended[0] > 5
    assert 0.7 * each < ended[1] / ended[0] < 1.4 * each
