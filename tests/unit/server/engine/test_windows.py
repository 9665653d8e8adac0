"""Where every layer has a window, K and V that none reaches any more are given back.

That no kernel reads them: `native/test_long_contexts`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from veneer_registry.errors import ContextTooLong
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.serving.limits import most_prompt_tokens, room
from veneer_server.step.reach import first_reached, most_blocks
from veneer_server.wire.messages import EngineConfig

from tests.engine_harness import Answer, EngineHarness, engine
from tests.refused import refused
from tests.torture.forms import Form, forms
from tests.unit.server.engine.test_supervisor import INFO
from tests.unit.server.engine.world import BLOCK, CONTEXT, World
from tests.unit.server.test_decoder import SHAPES, save_random

POISON = 7
"""A token whose embedding is infinite."""


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.integers(1, 200),
    window=st.none() | st.integers(1, 60),
    chunk=st.integers(1, 40),
    size=st.integers(1, 20),
)
def test_no_sequence_holds_more_blocks_than_it_is_said_to(
    tokens: int, window: int | None, chunk: int, size: int
) -> None:
    """And a long one holds that many at some time, whose tokens are all in one step's reach."""

    def held(computed: int, count: int) -> int:
        return -(-(computed + count) // size) - first_reached(computed, window, size)

    most = max(
        held(computed, count)
        for computed in range(tokens)
        for count in range(1, min(chunk, tokens - computed) + 1)
    )
    bound = most_blocks(tokens, window, chunk, size)
    assert bound >= most
    if window is None or tokens > window + chunk + 2 * size:
        assert bound == most


def test_a_sequence_longer_than_the_cache_is_served() -> None:
    world = World(window=6, budget=8, blocks=5)
    assert world.scheduler.blocks.total * BLOCK < CONTEXT // 2
    assert world.scheduler.blocks.can_ever_hold(CONTEXT)
    world.submit(1, CONTEXT - 20, 20, None)
    world.drain()  # checks what each step reads, and what is held after it
    assert len(world.outputs[1]) == 20
    assert world.scheduler.blocks.longest(CONTEXT) == CONTEXT
    whole = World(budget=8, blocks=5)
    assert not whole.scheduler.blocks.can_ever_hold(CONTEXT)
    assert whole.scheduler.blocks.longest(CONTEXT) == 4 * BLOCK


def test_more_sequences_run_at_once() -> None:
    running = {}
    for window in (None, 6):
        world = World(window=window, budget=16, blocks=17)
        for number in (1, 2, 3):
            world.submit(number, 40, 20, None)
        most = 0
        while world.scheduler.has_work():
            world.step()
            most = max(most, world.scheduler.running)
        running[window] = most
        assert all(len(world.outputs[number]) == 20 for number in (1, 2, 3))
        assert (not world.preempted) == (window is not None)
    assert running[6] == 3


def test_a_prefix_is_found_by_the_blocks_of_its_window_alone() -> None:
    world = World(window=6, budget=8, blocks=9)
    first = [1] * 25
    world.ask(1, first, 1)
    world.drain()
    # Another prompt takes the oldest idle blocks: those at the beginning of the first.
    world.ask(2, [2] * 17, 1)
    world.drain()
    sequence = world.ask(3, [*first, 5, 6, 7, 8], 1)
    cache = world.scheduler.blocks.cache
    world.drain()
    assert cache.find(sequence.block_keys[0]) is None, "the head is gone"
    assert sequence.cached_tokens == 24


def test_a_prefix_without_its_window_is_not_used() -> None:
    world = World(window=6, budget=8, blocks=17)
    prompt = [1] * 25
    world.ask(1, prompt, 1)
    world.drain()
    sequence = world.ask(2, prompt, 1)
    blocks = world.scheduler.blocks
    assert blocks.cached_prefix(sequence) == 24
    missing = blocks.cache.find(sequence.block_keys[4])
    assert missing is not None
    blocks.cache.wake(missing)  # an eviction of one block in the middle
    blocks.cache.forget(missing)
    blocks._free.append(missing)  # private: evicting just this one has no other way
    # Blocks 5 and 6 are there, but from their end block 4 is reached.
    assert blocks.cached_prefix(sequence) == 16
    world.drain()
    assert sequence.cached_tokens == 16


# torch and the best kernels in `make test`; other kernels take long to compile.
@pytest.fixture(
    params=[
        pytest.param(form, marks=pytest.mark.push if at > 1 else ())
        for at, form in enumerate(forms())
    ],
    ids=lambda form: form.name,
)
def form(request: pytest.FixtureRequest) -> Form:
    chosen: Form = request.param
    return chosen


@pytest.fixture
def tiny(tmp_path: Path, cache_dir: Path, form: Form) -> Iterator[EngineHarness]:
    save_random(SHAPES["mistral-window"], tmp_path)
    config = EngineConfig(
        base_folder=str(tmp_path),
        cache_folder=str(cache_dir),  # of the kernels; the base is in no cache
        base_name="tiny",
        weights_fingerprint="",
        device="cpu",
        max_batch_tokens=32,
        max_running=4,
        kv_cache_bytes=1 << 20,
        **form.settings,
    )
    with engine(config) as harness:
        yield harness


def test_giving_back_changes_no_bit_of_what_is_generated(tiny: EngineHarness) -> None:
    """Prompts in chunks, decoding, a cached prefix; beside others, who get the blocks."""
    prompts = [[3 + (seed * 37 + n * 11) % 300 for n in range(150)] for seed in range(3)]
    prompts.append(prompts[0] + [9] * 20)

    def run() -> list[Answer]:
        requests = [
            {"prompt": prompt, "max_tokens": 40, "logprobs": True, "ignore_eos": True}
            for prompt in prompts
        ]
        return [*tiny.run(requests[:3]), *tiny.run(requests[3:])]

    engines = tiny.scheduler.blocks
    assert engines.window_blocks is not None
    given_back = run()
    assert given_back[3].outputs[0].cached_tokens > 100
    tiny.reconfigure()  # blocks without a window
    assert tiny.scheduler.blocks.window_blocks is None
    kept = run()
    for mine, other in zip(given_back, kept, strict=True):
        assert mine.error is other.error is None
        assert (mine.tokens, mine.logprobs) == (other.tokens, other.logprobs)


def test_a_cache_of_a_few_blocks_serves_the_whole_context(tiny: EngineHarness) -> None:
    request = {"max_tokens": 60, "logprobs": True, "ignore_eos": True}
    request["prompt"] = [3 + n * 11 % 300 for n in range(440)]
    (roomy,) = tiny.run([request])
    tiny.settle()
    blocks = BlockManager(6, 16, window=24, chunk=tiny.scheduler.limits.chunk)
    tiny.scheduler.blocks = blocks
    assert blocks.longest(512) == 512 > blocks.total * 16
    (tight,) = tiny.run([request])
    assert len(tight.tokens) == 60
    assert (tight.tokens, tight.logprobs) == (roomy.tokens, roomy.logprobs)


def test_the_front_lets_in_what_the_engine_can_hold() -> None:
    """Of a prompt that is longer than the cache, with windows and without."""
    windows = msgspec.structs.replace(
        INFO, context_length=1000, kv_cache_tokens=100, longest_sequence=1000
    )
    assert most_prompt_tokens(windows) == 999
    assert room(windows, None, 600) == 400
    without = msgspec.structs.replace(windows, longest_sequence=100)
    assert most_prompt_tokens(without) == 99
    with refused(ContextTooLong, kv_cache_tokens="100"):
        room(without, None, 600)


def test_a_nan_that_the_last_row_does_not_reach_is_noticed(
    tmp_path: Path, cache_dir: Path, form: Form
) -> None:
    """In three layers with a window of 24, the last of 120 tokens does not see the first's NaN.
    Left in the cache, it would reach whoever gets its block: 0 x NaN is NaN."""
    model = save_random(SHAPES["mistral-window"], tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.inf
    model.save_pretrained(tmp_path)
    config = EngineConfig(
        base_folder=str(tmp_path),
        cache_folder=str(cache_dir),
        base_name="tiny",
        weights_fingerprint="",
        device="cpu",
        max_batch_tokens=128,
        max_running=4,
        kv_cache_bytes=1 << 20,
        **form.settings,
    )
    with engine(config) as harness:
        healthy = {"prompt": [3, 4, 5], "max_tokens": 8, "logprobs": True, "ignore_eos": True}
        (before,) = harness.run([healthy])
        others = [10 + n % 300 for n in range(119)]
        for prompt in ([POISON, *others], [*others[:60], POISON, *others[60:]]):
            (wrong,) = harness.run([{"prompt": prompt}])
            assert wrong.error == "NON_FINITE_OUTPUT"
        (scored,) = harness.run([{"prompt": others, "prompt_logprobs": True}])
        assert len(scored.prompt_logprobs) == 118
        blocks = harness.scheduler.blocks
        for answer in harness.run([healthy] * min(12, blocks.total)):
            assert answer.tokens == before.tokens
            # float32 or bfloat16, beside others: torch's sums depend on the batch.
            assert answer.logprobs == pytest.approx(before.logprobs, abs=1e-4)
