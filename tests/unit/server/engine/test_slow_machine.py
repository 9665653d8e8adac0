"""A machine with slow steps: the engine serves, counts as healthy while it works as planned,
and is killed only if it really hangs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from veneer_registry.errors import EngineFailed
from veneer_server.engine.execution.step_cost import measure
from veneer_server.engine.scheduling.step_limits import (
    SMALLEST_CHUNK,
    STEP_SECONDS,
    SchedulerLimits,
    StepCost,
)
from veneer_server.engine_client import supervisor
from veneer_server.engine_client.client import EngineClient
from veneer_server.engine_client.supervisor import HANG_FACTOR, SILENCE_SECONDS, Supervisor
from veneer_server.step.arrays import StepArrays
from veneer_server.wire.messages import (
    EngineConfig,
    EngineInfo,
    SamplingParams,
    SequenceRequest,
    StepDone,
    ToEngine,
)

from tests.engine_harness import GREEDY, engine
from tests.other_engine import engine_of
from tests.tiny_llama import make_tiny_llama
from tests.unit.server.engine.test_supervisor import INFO
from tests.unit.server.engine.world import World

# ------------------------------------------------------------------------ real processes


def config(base: Path, **changes: object) -> EngineConfig:
    return msgspec.structs.replace(
        EngineConfig(
            base_folder=str(base),
            cache_folder=str(base / "cache"),
            base_name="tiny",
            weights_fingerprint="",
            device="cpu",
            quantization="none",
            dtype="float32",
            threads=1,
            kv_cache_bytes=8 << 20,
            max_running=2,
        ),
        **changes,
    )


async def generate(client: EngineClient, prompt: int, new: int) -> int:
    """Tokens of one request."""
    request = SequenceRequest([5] * prompt, new, SamplingParams(temperature=0), ignore_eos=True)
    outputs = client.generate(request)
    async with aclosing(outputs):
        return sum([len(output.tokens) async for output in outputs])


@pytest.mark.push
async def test_an_engine_whose_steps_are_longer_than_the_old_limit_is_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits are a hundredth of the real ones: silence 0.05 s, and 0.6 s for a kill; a
    step of one token takes 0.8 s, and one of 30 takes 2."""
    monkeypatch.setattr(supervisor, "SILENCE_SECONDS", SILENCE_SECONDS / 100)
    monkeypatch.setattr(supervisor, "PING_SECONDS", 0.02)
    health: list[bool] = []
    with engine_of("tests.slow_engine", "0.8", "0.04", "0"):
        client = EngineClient(
            config(make_tiny_llama(tmp_path)), max_queue=2, on_health=health.append
        )
        info = await client.start()
        try:
            assert await generate(client, 30, 2) == 2
            assert client.starts == 1
            assert health == [True], "a planned step is no lack of health"
        finally:
            await client.stop()
    assert info.step_seconds >= 0.8
    assert info.token_seconds >= 0.02  # a difference of two times, so not exact
    assert info.max_batch_tokens < 512
    assert info.longest_step_seconds >= 2


@pytest.mark.push
async def test_an_engine_that_hangs_is_killed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAKE as above, on a fast machine: the second step never ends."""
    monkeypatch.setattr(supervisor, "SILENCE_SECONDS", SILENCE_SECONDS / 100)
    monkeypatch.setattr(supervisor, "PING_SECONDS", 0.02)
    health: asyncio.Queue[bool] = asyncio.Queue()
    with engine_of("tests.slow_engine", "0", "0", "2"):
        client = EngineClient(
            config(make_tiny_llama(tmp_path)), max_queue=2, on_health=health.put_nowait
        )
        await client.start()
        try:
            with pytest.raises(EngineFailed):
                await generate(client, 30, 9)
            assert [await health.get() for _ in range(3)] == [True, False, True]
            assert client.starts >= 2, "more where loading is slow, too"
        finally:
            await client.stop()


# ----------------------------------------------------------------------------- the limits


def watching(info: EngineInfo) -> Supervisor:
    made = Supervisor(
        EngineConfig("", "", "", ""),
        on_message=lambda message: None,
        on_up=lambda info: None,
        on_down=lambda error: None,
        on_health=lambda healthy: None,
    )
    made.connection = type("FakeConnection", (), {"info": info})()
    return made


@pytest.mark.parametrize("longest", [0.0, 0.4, STEP_SECONDS])
def test_a_hang_is_told_in_10_s_where_steps_are_as_long_as_they_should_be(
    longest: float,
) -> None:
    made = watching(msgspec.structs.replace(INFO, longest_step_seconds=longest))
    assert made.silence_limit == SILENCE_SECONDS
    assert HANG_FACTOR * made.silence_limit == 60


def test_a_step_of_a_minute_is_no_hang_where_it_was_to_be_expected() -> None:
    made = watching(msgspec.structs.replace(INFO, longest_step_seconds=60.0))
    assert made.silence_limit == 60
    assert HANG_FACTOR * made.silence_limit == 720


# ------------------------------------------------------------------------- sizes of chunks

FAST = StepCost(step_s=0.01, token_s=0.001, attention_s=1e-7)
SLOW = StepCost(step_s=1.0, token_s=0.05, attention_s=2e-4)
"""Attention doubles what a token takes after 250 of them."""
SLOWEST = StepCost(step_s=9.0, token_s=1.0, attention_s=1e-3)
"""Even one token is past the target."""


def limits(cost: StepCost | None, **changes: float) -> SchedulerLimits:
    settings: dict[str, Any] = {"prefill_beside_decode": 128, **changes}
    return SchedulerLimits(512, 8, context_length=4096, cost=cost, **settings)


def test_a_fast_machine_computes_what_is_configured() -> None:
    assert (limits(FAST).prompt_tokens, limits(FAST).prompt_tokens_beside_decode) == (512, 128)
    assert limits(None).prompt_tokens == 512
    assert limits(FAST).longest_step_s(4096) < STEP_SECONDS


def test_a_slow_machine_computes_what_fits_the_target() -> None:
    slow = limits(SLOW)
    assert (slow.prompt_tokens, slow.prompt_tokens_beside_decode) == (80, 72)
    assert limits(SLOWEST).prompt_tokens == SMALLEST_CHUNK


def test_a_machine_that_is_fast_enough_computes_what_is_configured_beside_streams() -> None:
    """A limit in time changes nothing there; on a slow one it leaves the least chunk."""
    assert limits(FAST, prefill_beside_decode_s=0.2).prompt_tokens_beside_decode == 128
    fewer = limits(FAST, prefill_beside_decode_s=0.1)
    assert (fewer.prompt_tokens, fewer.prompt_tokens_beside_decode) == (512, 100)


def test_exact_mode_keeps_its_chunks_and_says_how_long_they_take() -> None:
    exact = limits(SLOW, exact=True)
    assert exact.prompt_tokens == 512
    assert exact.longest_step_s(4096) > limits(SLOW).longest_step_s(4096)


def took(world: World, plan: object) -> float:
    """Seconds of a step by the cost that the scheduler goes by."""
    cost = world.limits.cost
    assert cost is not None
    assert plan is not None
    rows = [
        (p.start + i + 1)
        for p in plan.sequences
        for i in range(len(p.tokens))  # type: ignore[attr-defined]
    ]
    return cost.step_s + sum(map(cost.row_s, rows))


@pytest.mark.parametrize("seed", range(20))
def test_no_planned_step_is_longer_than_the_target_but_for_the_least_chunk(seed: int) -> None:
    """Random costs and prompts; a long context makes chunks smaller, and all end."""
    print(f"seed {seed}")
    draw = random.Random(seed)
    cost = StepCost(draw.choice([0.1, 2.0, 6.0]), draw.choice([0.05, 0.4]), draw.random() / 50)
    world = World(budget=64, beside_decode=draw.choice([8, 32]), blocks=200, max_running=6)
    world.limits = world.scheduler.limits = SchedulerLimits(
        64,
        6,
        context_length=64,
        prefill_beside_decode=world.beside_decode,
        cost=cost,
    )
    for number in range(1, 12):
        world.submit(number, draw.randint(1, 50), draw.randint(1, 12), None)
    allowed = world.limits.longest_step_s(200 * 4)
    longest = 0.0
    while world.scheduler.has_work():
        plan = world.step()
        seconds = took(world, plan)
        longest = max(longest, seconds)
        prefilling = sum(len(p.tokens) for p in plan.sequences if len(p.tokens) > 1)  # type: ignore[union-attr]
        assert seconds <= STEP_SECONDS or prefilling <= SMALLEST_CHUNK
        assert seconds <= allowed
    assert longest > 0
    assert len(world.finished) == 11


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scores", [False, True])
def test_prompts_lengthen_a_step_beside_a_stream_by_so_many_seconds(
    seed: int, scores: bool
) -> None:
    """However long they are, and whether their tokens get log-probabilities."""
    print(f"seed {seed}")
    draw = random.Random(seed)
    cost, most = StepCost(0.1, draw.uniform(0.001, 0.01), draw.random() / 1e5), 0.3
    world = World(budget=512, beside_decode=512, blocks=2000, max_running=6)
    world.limits = world.scheduler.limits = SchedulerLimits(
        512,
        6,
        context_length=4096,
        prefill_beside_decode=512,
        prefill_beside_decode_s=most,
        cost=cost,
        score_work=0.5,
    )
    world.ask(0, [-100] * 2, 150)
    world.step()
    for number in range(1, 8):
        world.ask(number, [-number] * draw.randint(100, 500), 2, scores=scores)
    beside = 0
    while {*range(1, 8)} & world.live.keys():
        plan = world.step()
        assert plan is not None
        prompts = [p for p in plan.sequences if len(p.tokens) > 1]
        if len(prompts) == len(plan.sequences):
            continue
        each = 1.5 if scores else 1.0
        seconds = sum(
            cost.row_s(p.start + i + 1, each) for p in prompts for i in range(len(p.tokens))
        )
        assert seconds <= 1.25 * most + cost.row_s(512, each)
        beside += bool(prompts)
    assert beside > 5


def test_prompts_may_lengthen_a_step_fourfold_but_never_by_more_than_a_fifth_of_a_second() -> (
    None
):
    assert StepCost(0.005, 0.001, 1e-7).prefill_beside_decode_s == pytest.approx(0.02)
    assert StepCost(0.5, 0.05, 1e-6).prefill_beside_decode_s == 0.2


def limited(most: float) -> World:
    """A world of steps of 10 ms, in which each prompt token takes 1 ms."""
    world = World(budget=512, beside_decode=128, blocks=2000, max_running=6)
    world.limits = world.scheduler.limits = SchedulerLimits(
        512,
        6,
        context_length=4096,
        prefill_beside_decode=128,
        prefill_beside_decode_s=most,
        cost=StepCost(0.01, 0.001, 0.0),
    )
    return world


def lengths(world: World) -> dict[int, int]:
    """Run a step; return how many tokens each sequence had in it."""
    plan = world.step()
    assert plan is not None
    return {planned.sequence: len(planned.tokens) for planned in plan.sequences}


def test_who_comes_between_two_answers_waits_for_no_whole_prompt() -> None:
    """A prompt of somebody else is computed in short steps while others come and go, though
    nobody decodes at the moment."""
    world = limited(0.04)
    world.ask(1, [-1] * 2000, 2, key="hog")
    assert lengths(world) == {1: 512}, "alone it has the whole step"
    world.ask(2, [-2] * 3, 1, key="other")
    lengths(world)
    assert world.finished.keys() == {2}
    world.now += 4.0
    assert lengths(world) == {1: 40}
    world.now += 6.0
    assert lengths(world) == {1: 512}, "the other has not been there for a while"


def test_connections_of_one_caller_are_no_others() -> None:
    world = limited(0.04)
    world.ask(1, [-1] * 2000, 2, key="one")
    world.ask(2, [-2] * 3, 1, key="one")
    lengths(world)
    lengths(world)
    assert world.finished.keys() == {2}
    assert lengths(world) == {1: 512}


def test_a_first_token_waits_for_half_of_what_a_long_prompt_may_take() -> None:
    world = limited(0.04)
    world.ask(1, [-1] * 2, 50, key="stream")
    lengths(world)
    world.ask(2, [-2] * 2000, 2, key="hog")
    lengths(world)
    assert lengths(world) == {1: 1, 2: 40}
    world.ask(3, [-3] * 4, 1, key="other")
    assert lengths(world) == {1: 1, 2: 20, 3: 4}
    assert 3 in world.finished
    assert lengths(world) == {1: 1, 2: 40}


def test_the_cost_of_a_step_is_measured_and_not_guessed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FAKE: a backend that takes as long as its rows and their contexts say, by a clock that
    nothing else moves. Something else on the machine holds up one call in four."""
    clock, calls = 0.0, 0

    class Timed:
        def execute(self, step: StepArrays) -> None:
            nonlocal clock, calls
            calls += 1
            rows = len(step.tokens)
            clock += 0.004 + 0.0002 * rows + 1e-7 * rows * int(step.contexts[0])
            clock += 0.01 * (calls % 4 == 0)

        def finite(self, logits: object) -> None:
            pass

        def clear(self, blocks: list[int]) -> None:
            cleared.extend(blocks)

    cleared: list[int] = []
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    monkeypatch.setattr("time.process_time", lambda: clock)
    model = cast(Any, SimpleNamespace(context_length=8192))
    cost = measure(cast(Any, Timed()), model, block_size=16, blocks=100, threads=1)
    assert cost.step_s == pytest.approx(0.0042, rel=0.01)
    assert cost.token_s == pytest.approx(0.0002, rel=0.1)
    assert 1e-7 < cost.attention_s < 1.5e-7  # more than measured, since here K and V are cached
    assert cleared == [1, 2, 3, 4]


# ------------------------------------------------------------------- what measuring leaves


def test_measuring_leaves_no_trace_in_the_cache_and_no_block_taken(tmp_path: Path) -> None:
    with engine(config(make_tiny_llama(tmp_path))) as made:
        cache = made.runner.backend.cache  # type: ignore[attr-defined]
        assert not any(layer.any() for layer in (*cache.keys, *cache.values))
        assert made.scheduler.blocks.used == made.scheduler.blocks.cached == 0
        assert made.info.step_seconds > 0
        (answer,) = made.run([{"prompt": [5] * 20, "max_tokens": 3, "sampling": GREEDY}])
        assert len(answer.tokens) == 3


async def test_a_longer_step_than_was_measured_moves_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow:
        """FAKE: a process that tells of a long step, and is silent from then on."""

        info = INFO

        async def messages(self) -> AsyncIterator[StepDone]:
            yield StepDone(1, 30.0, 0, 1, 0)
            told.set()
            await asyncio.Event().wait()

        def write(self, message: ToEngine) -> None:
            pass

        async def close(self) -> None:
            pass

    async def opened(config: EngineConfig) -> Slow:
        return Slow()

    told = asyncio.Event()
    monkeypatch.setattr(supervisor.EngineConnection, "open", opened)
    made = watching(INFO)
    await made.start()
    await told.wait()
    assert made.silence_limit == 120
    await made.stop()
