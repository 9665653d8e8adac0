"""The memory plan adds up, shrinks what may shrink, and refuses with the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from veneer_server.config import ServerConfig, load_config
from veneer_server.engine.execution.sampler import sample
from veneer_server.models.config import DecoderConfig, read_decoder_config
from veneer_server.sizing.memory_plan import (
    LARGEST_AUTO_KV_BYTES,
    MemoryPlan,
    MemoryTooSmall,
    base_bytes,
    plan_memory,
    token_bytes,
)
from veneer_server.step.choice import Choice
from veneer_server.system.machine import Gpu, HostMemory
from veneer_server.wire.messages import SamplingParams

from tests.refused import refused

GIB = 1 << 30


@pytest.fixture(scope="module")
def model(base_folder: Path) -> DecoderConfig:
    return read_decoder_config(base_folder)


def host(gib: float) -> HostMemory:
    return HostMemory(int(gib * GIB), int(gib * GIB), contained=True)


def plan(model: DecoderConfig, gib: float, gpu: Gpu | None = None, **flags: str) -> MemoryPlan:
    return plan_memory(model, load_config(flags, {}), host(gib), gpu)


def uses(plan: MemoryPlan, pool: str = "host") -> dict[str, int]:
    (chosen,) = [p for p in plan.pools if p.name == pool]
    return {use.name: use.bytes for use in chosen.uses}


def config(**flags: str) -> ServerConfig:
    return load_config(flags, {})


def test_on_a_cpu_adapters_count_once_and_the_line_adds_up(model: DecoderConfig) -> None:
    planned = plan(model, 24)
    assert uses(planned)["adapters"] == 2 * GIB, "DEVICE shares the memory of HOST"
    assert uses(planned)["kv_cache"] == planned.kv_cache_bytes == LARGEST_AUTO_KV_BYTES
    (pool,) = planned.pools
    assert pool.total == sum(uses(planned).values())
    assert not planned.shrunk
    numbers = [int(word) for word in str(pool).split() if word.isdigit()]
    *parts, total, limit = numbers
    assert abs(sum(parts) - total) <= len(parts), "rounded up to MiB each"
    assert limit == 24 * 1024


def test_a_4_bit_base_takes_what_its_weights_take(model: DecoderConfig) -> None:
    """113,025,024 bytes is what the loaded base says of itself with torch; with the native
    kernels, which pack it otherwise and have a head in 8 bits besides, 146,423,808."""
    for backend, said in (("torch", 113_025_024), ("auto", 146_423_808)):
        estimate = base_bytes(model, config(backend=backend))
        assert 0 <= estimate - said < 0.05 * said
    dense = base_bytes(model, config(quantization="none", backend="torch"))
    assert dense == pytest.approx(134_515_008 * 2, rel=0.01)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=2000, min_p=0.01, logit_bias={5: 1.0}),
    ],
)
def test_scratch_covers_what_sampling_takes(
    model: DecoderConfig, params: SamplingParams
) -> None:
    """Measured: rows so many that nothing but they counts."""
    rows = 64
    logits = torch.randn(rows, model.vocab_size)
    with torch.profiler.profile(profile_memory=True) as profiled, torch.inference_mode():
        sample(logits, [Choice(params, 1)] * rows)
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > rows * model.vocab_size
    # What the model is given and gives beside it is in there as well.
    few, many = (scratch(model, running) for running in (16, 16 + rows))
    assert many - few >= peak


def scratch(model: DecoderConfig, running: int) -> int:
    """Of a step that has no other rows."""
    flags = {"max_running": str(running), "max_batch_tokens": "16"}
    return uses(plan(model, 1000, **flags))["scratch"]


def test_more_sequences_than_a_steps_tokens_are_planned_for(model: DecoderConfig) -> None:
    """The engine takes a row of each that runs, whatever --max-batch-tokens says."""
    assert scratch(model, 4096) > 30 * scratch(model, 128)


def test_kv_bytes_of_a_token(model: DecoderConfig) -> None:
    assert token_bytes(model, "bfloat16") == 2 * 30 * 3 * 64 * 2
    assert token_bytes(model, "float32") == 2 * token_bytes(model, "bfloat16")


def test_an_auto_cache_shrinks_to_what_is_left(model: DecoderConfig) -> None:
    roomy = plan(model, 24)
    short = roomy.pools[0].total - GIB // 2
    planned = plan(model, short / GIB)
    assert planned.shrunk
    assert planned.kv_cache_bytes == pytest.approx(GIB // 2, abs=1 << 20)
    assert planned.pools[0].fits


def test_a_chosen_cache_does_not_shrink(model: DecoderConfig) -> None:
    short = plan(model, 24).pools[0].total - GIB // 2
    with refused(MemoryTooSmall, pool="host") as caught:
        plan(model, short / GIB, kv_cache_bytes="1GiB")
    assert int(caught.value.metadata["missing_bytes"]) == pytest.approx(GIB // 2, abs=1 << 20)
    assert "--kv-cache-bytes" in caught.value.metadata["lower"].split()


def test_what_cannot_fit_names_the_largest_part_first(model: DecoderConfig) -> None:
    with pytest.raises(MemoryTooSmall) as caught:
        plan(model, 1.5)
    lower = caught.value.metadata["lower"]
    assert lower.index("--host-cache-bytes") < lower.index("--kv-cache-bytes")
    assert "1536" in caught.value.message, "what there is"
    assert plan(model, 1.5, host_cache_bytes="64MiB", device_adapter_bytes="64MiB").shrunk


def test_a_gpu_is_a_pool_of_its_own(model: DecoderConfig) -> None:
    planned = plan(model, 8, Gpu("fake", 4 * GIB, 4 * GIB))
    assert uses(planned, "host")["host_adapters"] == 2 * GIB
    assert uses(planned, "device")["device_adapters"] == GIB
    assert "base" in uses(planned, "device")
    with refused(MemoryTooSmall, pool="device"):
        plan(model, 8, Gpu("fake", 4 * GIB, 4 * GIB), device_adapter_bytes="4GiB")
    with refused(MemoryTooSmall, pool="host"):
        plan(model, 2, Gpu("fake", 4 * GIB, 4 * GIB))
