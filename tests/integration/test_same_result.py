"""The same requests plain, chunked, preempted, cached and in exact mode.

Only the order of sums may differ, since it depends on the shapes of a step. So the
bound is that of the arithmetic: 1e-4 in float32; `BFLOAT16_BOUND` for NF4 with bfloat16
activations, which is also the distance between two plain runs in different batches.
In exact mode, and with the native backend, results are bit-identical.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from veneer_server.backends.native.compiler import NativeUnavailable, build
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.step.plan import StepPlan
from veneer_server.wire.messages import EngineConfig, SamplingParams

from tests.engine_harness import Answer, EngineHarness, engine, source
from tests.server_harness import Server, running_server

pytestmark = [pytest.mark.push, pytest.mark.real_base]

SEED = 11
NEW_TOKENS = 8
BLOCK = 16
FLOAT32_BOUND = 1e-4
BFLOAT16_BOUND = 0.4
"""Largest difference of a log-probability, natural logarithm, over all runs."""
ADAPTERS = (None, "patterns", "attention")
LENGTHS = (30, 60)
"""Not far from the end of a block, so that each sequence grows soon."""


def start(
    base: Path, cache: Path, quantization: Any, dtype: Any, backend: Any = "torch"
) -> Iterator[EngineHarness]:
    config = EngineConfig(
        base_folder=str(base),
        cache_folder=str(cache),
        base_name="smollm2-135m",
        weights_fingerprint="",
        device="cpu",
        quantization=quantization,
        dtype=dtype,
        backend=backend,
        max_batch_tokens=1024,
        max_prefill_tokens=1024,
        kv_cache_bytes=128 << 20,
    )
    with engine(config) as harness:
        yield harness


@pytest.fixture(scope="module")
def full(base_folder: Path, cache_dir: Path) -> Iterator[EngineHarness]:
    yield from start(base_folder, cache_dir, "none", "float32")


@pytest.fixture(scope="module")
def served(base_folder: Path, cache_dir: Path) -> Iterator[EngineHarness]:
    yield from start(base_folder, cache_dir, "nf4", "bfloat16")


@pytest.fixture(scope="module")
def native(base_folder: Path, cache_dir: Path) -> Iterator[EngineHarness]:
    try:
        build(cache_dir)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    threads = torch.get_num_threads()
    yield from start(base_folder, cache_dir, "nf4", "bfloat16", "native")
    torch.set_num_threads(threads)


def prompt_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(SEED + seed)
    found: list[int] = torch.randint(100, 40000, (length,), generator=generator).tolist()
    return found


def batch(adapters: dict[str, Path]) -> list[dict[str, Any]]:
    """Base and adapters, two prompts each, the same for all."""
    print(f"seed {SEED}")
    return [
        {
            "prompt": prompt_of(length, length),
            "adapter": source(adapters[name]) if name else None,
            "max_tokens": NEW_TOKENS,
            "logprobs": True,
            "ignore_eos": True,
        }
        for length in LENGTHS
        for name in ADAPTERS
    ]


def distance(one: Answer, other: Answer) -> float:
    """Largest difference of log-probabilities, as long as both have the same history.

    Where the greedy tokens part, both took a likeliest one, and the likeliest's
    log-probability differs no more than the distributions do; what follows is another
    text.
    """
    pairs = list(zip(one.tokens, other.tokens, strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs) - 1)
    return max(
        abs(a - b) for a, b in list(zip(one.logprobs, other.logprobs, strict=True))[: same + 1]
    )


@pytest.fixture
def preemptions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of sequences, once for each time that one was preempted."""
    seen: list[int] = []
    right = Scheduler.schedule

    def counted(self: Scheduler, now: float) -> StepPlan | None:
        running = {s.id for s in self.batch}
        plan = right(self, now)
        seen.extend(s.id for s in self.queue if s.id in running)
        return plan

    monkeypatch.setattr(Scheduler, "schedule", counted)
    return seen


def all_ways(
    harness: EngineHarness, requests: list[dict[str, Any]], preemptions: list[int]
) -> dict[str, list[Answer]]:
    """The answers by the way that the engine took to them."""
    harness.reconfigure()
    ways = {"plain": harness.run(requests), "cached": harness.run(requests)}
    for request, *answers in zip(requests, *ways.values(), strict=True):
        whole = (len(request["prompt"]) - 1) // BLOCK * BLOCK
        assert [a.outputs[0].cached_tokens for a in answers] == [0, whole]
    harness.reconfigure(
        prefix_cache=False, max_batch_tokens=16, max_running=16, prefill_beside_decode=5
    )
    ways["chunked"] = harness.run(requests)
    # Two of the shorter ones fit as they come, and not when they grow.
    assert not preemptions
    harness.reconfigure(kv_blocks=2 * -(-LENGTHS[0] // BLOCK) + 1)
    ways["preempted"] = harness.run(requests)
    assert preemptions, "the pool was not small enough"
    return ways


def worst(ways: dict[str, list[Answer]]) -> dict[str, float]:
    found = {
        way: max(distance(a, b) for a, b in zip(ways["plain"], answers, strict=True))
        for way, answers in ways.items()
    }
    print({way: f"{d:.1e}" for way, d in found.items()})
    return found


def test_float32_every_way_gives_the_same(
    full: EngineHarness, real_adapters: dict[str, Path], preemptions: list[int]
) -> None:
    ways = all_ways(full, batch(real_adapters), preemptions)
    assert max(worst(ways).values()) < FLOAT32_BOUND
    for answers in ways.values():
        assert [a.tokens for a in answers] == [a.tokens for a in ways["plain"]]


def test_nf4_in_bfloat16_every_way_stays_within_its_rounding(
    served: EngineHarness, real_adapters: dict[str, Path], preemptions: list[int]
) -> None:
    ways = all_ways(served, batch(real_adapters), preemptions)
    found = worst(ways)
    assert max(found.values()) < BFLOAT16_BOUND
    # Negative control: another adapter's answers are not within the bound.
    each = len(ADAPTERS)
    short, long = ways["plain"][:each], ways["plain"][each:]
    apart = [
        max(distance(short[0], short[i]), distance(long[0], long[i])) for i in range(1, each)
    ]
    print("apart", apart)
    assert min(apart) > BFLOAT16_BOUND


def test_exact_mode_is_bitwise_the_same_in_any_company(
    served: EngineHarness, real_adapters: dict[str, Path], preemptions: list[int]
) -> None:
    """A needle of two chunks, sampled, among others: before, behind and between them."""
    others = batch(real_adapters)
    needle = others[1] | {
        "prompt": prompt_of(150, 99),
        "sampling": SamplingParams(temperature=1.0, seed=5),
    }

    def place(at: int, company: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
        found = served.run([*company[:at], needle, *company[at:]])[at]
        assert found.error is None
        return found.tokens, found.logprobs

    served.reconfigure(exact=True)
    alone = place(0, [])
    assert len(alone[0]) == NEW_TOKENS
    assert place(0, others[:3]) == alone
    # Eight rows of one adapter take other kernels than one row: here it shows if they
    # share a call.
    assert place(4, [others[1]] * 7) == alone
    served.reconfigure(exact=True, max_batch_tokens=16, prefill_beside_decode=1)
    assert place(1, others[4:]) == alone
    assert not preemptions
    served.reconfigure(exact=True, kv_blocks=-(-(150 + NEW_TOKENS) // BLOCK) + 1)
    # Shorter ones come first, and grow when the needle is there.
    small = [r | {"prompt": r["prompt"][:10]} for r in others[:1]]
    assert place(1, small) == alone
    assert preemptions, "the pool was not small enough"


def test_native_every_way_gives_the_same_bits(
    native: EngineHarness,
    served: EngineHarness,
    real_adapters: dict[str, Path],
    preemptions: list[int],
) -> None:
    """No kernel chooses its order of sums by what shares the step: no exact mode needed."""
    requests = batch(real_adapters)
    ways = all_ways(native, requests, preemptions)
    plain = [(a.tokens, a.logprobs) for a in ways["plain"]]
    for way, answers in ways.items():
        assert [(a.tokens, a.logprobs) for a in answers] == plain, way
    alone = [native.run([request])[0] for request in requests]
    assert [(a.tokens, a.logprobs) for a in alone] == plain
    # And it is the same model as torch's.
    served.reconfigure()
    torch_s = served.run(requests)
    apart = max(distance(a, b) for a, b in zip(ways["plain"], torch_s, strict=True))
    print("from torch", apart)
    assert apart < BFLOAT16_BOUND


@pytest.mark.asyncio(loop_scope="session")
async def test_a_repeated_prompt_is_served_from_the_prefix_cache(server: Server) -> None:
    prompt = "One day a fox met a crow who had found a piece of cheese. " * 8

    async def cached(**fields: Any) -> int:
        answer = await server.generate(prompt=prompt, stopping={"max_tokens": 2}, **fields)
        assert answer.usage.prompt_tokens > 100
        return int(answer.usage.cached_prompt_tokens)

    before = (await server.metric("veneer_prefix_cache_hit_tokens_total"))[""]
    assert await cached() == 0
    again = await cached()
    assert again > 90
    assert await cached(adapter="rank-4") == 0, "K and V of other weights"
    assert await cached(use_prefix_cache=False) == 0
    assert (await server.metric("veneer_prefix_cache_hit_tokens_total"))[""] == before + again
    assert (await server.metric("veneer_prefix_cache_usage_ratio"))[""] > 0


@pytest.mark.asyncio(loop_scope="session")
async def test_exact_server_says_the_same_alone_and_in_company(
    cache_dir: Path, real_adapters: dict[str, Path], tmp_path: Path
) -> None:
    async with running_server(tmp_path / "data", cache_dir, "--exact") as exact:
        await exact.push(real_adapters["rank-16"], "sql")
        needle: dict[str, Any] = {
            "prompt": "The ship left the harbour before dawn.",
            "adapter": "sql",
            "sampling": {"seed": 3, "temperature": 0.8},
            "stopping": {"max_tokens": 5, "ignore_eos": True},
            "output": {"logprobs": True},
        }

        async def ask(**fields: Any) -> list[tuple[int, float]]:
            answer = await exact.generate(**needle | fields)
            assert not answer.usage.cached_prompt_tokens
            return [(entry.token_id, entry.logprob) for entry in answer.logprobs]

        alone = await ask()
        company = [ask(prompt="A longer prompt of another kind. " * n) for n in (1, 3)]
        answers = await asyncio.gather(*company, ask(), ask(adapter=""))
        assert answers[2] == alone
        assert answers[3] != alone
