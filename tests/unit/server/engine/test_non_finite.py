"""A sequence's NaN does not spread: not into the prefix cache, not into reused KV blocks.

Tested with every backend of the machine, since each has its own cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from veneer_server.engine.scheduling.speculation import Speculation
from veneer_server.wire.messages import EngineConfig

from tests.engine_harness import EngineHarness, engine
from tests.torture.forms import Form, forms
from tests.unit.server.engine.world import FreeSteps
from tests.unit.server.test_decoder import SHAPES, save_random

POISON = 7
"""A token whose embedding is infinite."""
KV_BLOCKS = 5


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
    """A tiny model with few KV blocks and small steps."""
    config = SHAPES["llama"]
    model = save_random(config, tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.inf
    model.save_pretrained(tmp_path)
    token_bytes = (
        2
        * (2 if form.native else 4)
        * config.num_hidden_layers
        * config.num_key_value_heads
        * 32
    )
    settings = EngineConfig(
        base_folder=str(tmp_path),
        cache_folder=str(cache_dir),  # of the kernels; the base is in no cache
        base_name="tiny",
        weights_fingerprint="",
        device="cpu",
        max_batch_tokens=16,
        max_running=4,
        kv_cache_bytes=token_bytes * 16 * (KV_BLOCKS + 1),
        **form.settings,
    )
    with engine(settings) as harness:
        assert harness.scheduler.blocks.total == KV_BLOCKS
        yield harness


def test_blocks_of_a_sequence_that_went_wrong_harm_nobody(tiny: EngineHarness) -> None:
    healthy = {"prompt": [3, 4, 5], "max_tokens": 8, "logprobs": True, "ignore_eos": True}
    (before,) = tiny.run([healthy])
    # All blocks of the pool, one after another, hold its NaN.
    (wrong,) = tiny.run([{"prompt": [POISON] * (16 * KV_BLOCKS - 1)}])
    assert wrong.error == "NON_FINITE_OUTPUT"
    for answer in tiny.run([healthy] * KV_BLOCKS):
        assert answer.tokens == before.tokens
        assert answer.logprobs == pytest.approx(before.logprobs, abs=1e-4)


def test_a_long_prompt_fails_at_the_chunk_that_went_wrong(tiny: EngineHarness) -> None:
    """A chunk that samples nothing is checked all the same, before it is shared."""
    steps = tiny.loop.steps
    (wrong,) = tiny.run([{"prompt": [POISON, *range(10, 60)]}])
    assert wrong.error == "NON_FINITE_OUTPUT"
    assert tiny.loop.steps == steps + 1
    assert tiny.scheduler.blocks.cached == 0


def test_a_draft_that_goes_wrong_is_not_noticed(tiny: EngineHarness, form: Form) -> None:
    """Its NaN is in the same step and the same KV block as good rows, and reaches nothing."""
    if not form.native:
        pytest.skip("speculation needs rows that do not depend on the rows beside them")
    healthy = {"prompt": [3, 4, 5], "max_tokens": 12, "logprobs": True, "ignore_eos": True}
    (plain,) = tiny.run([healthy])
    speculation = Speculation([(1, 1.0)])
    speculation.times = FreeSteps([(1, 1.0)])
    tiny.reconfigure()
    tiny.scheduler.speculation = speculation
    for wrong in range(8):
        expected = [*plain.tokens[:wrong], POISON, *plain.tokens[wrong:]]
        (drafted,) = tiny.run([healthy | {"prediction": expected}])
        assert drafted.error is None
        assert (drafted.tokens, drafted.logprobs) == (plain.tokens, plain.logprobs)
        # A caller's own NaN ends the sequence as ever.
        (own,) = tiny.run([{"prompt": [3, 4, POISON], "prediction": expected}])
        assert own.error == "NON_FINITE_OUTPUT"
    assert speculation.drafted == 0, "nothing of those drafts counts"
    for _ in range(KV_BLOCKS):
        (after,) = tiny.run([healthy])
        assert (after.tokens, after.logprobs) == (plain.tokens, plain.logprobs)


def test_nothing_of_a_sequence_that_went_wrong_is_found_again(tiny: EngineHarness) -> None:
    """Not even the blocks from before it did."""
    good = list(range(10, 42))
    (wrong,) = tiny.run([{"prompt": [*good, POISON]}])
    assert wrong.error == "NON_FINITE_OUTPUT"
    assert tiny.scheduler.blocks.cached == 0
    first, second = (tiny.run([{"prompt": [*good, 5]}])[0] for _ in range(2))
    assert first.outputs[0].cached_tokens == 0
    assert second.outputs[0].cached_tokens == 32
