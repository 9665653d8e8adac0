"""The memory plan adds up, shrinks what may shrink, and refuses with the numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from veneer_server import startup
from veneer_server.config import ConfigInvalid, ServerConfig, load_config
from veneer_server.engine.execution.sampler import sample
from veneer_server.models.config import DecoderConfig, read_decoder_config
from veneer_server.sizing.memory_plan import (
    AUTO_KV_SHARE,
    BLOCK_TOKENS,
    USUAL_KV_BYTES,
    MemoryPlan,
    MemoryTooSmall,
    base_bytes,
    plan_memory,
    token_bytes,
)
from veneer_server.step.choice import TokenChoice
from veneer_server.system.gpu import DeviceChoice as GpuChoice
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
    assert uses(planned)["kv_cache"] == planned.kv_cache_bytes
    (pool,) = planned.pools
    assert pool.total == sum(uses(planned).values())
    assert not planned.kv_cache.short
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
    eight_bits = base_bytes(model, config(quantization="fp8", backend="cuda", device="cuda"))
    linears = model.num_layers * sum(o * i for o, i in model.shapes.values())
    assert dense - eight_bits == linears


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
        sample(logits, [TokenChoice(params, 1)] * rows)
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


def left_for_kv(plan: MemoryPlan) -> int:
    (pool,) = plan.pools
    return pool.limit - pool.total + plan.kv_cache_bytes


def contexts(model: DecoderConfig, count: int) -> int:
    """Bytes of so many sequences of the whole context, and of the padding block."""
    block = token_bytes(model, "bfloat16") * BLOCK_TOKENS
    return (count * -(-model.context_length // BLOCK_TOKENS) + 1) * block


def test_an_auto_cache_shrinks_to_what_is_left(model: DecoderConfig) -> None:
    roomy = plan(model, 24)
    short = roomy.pools[0].limit - left_for_kv(roomy) + GIB // 2
    planned = plan(model, short / GIB)
    assert planned.kv_cache.short
    assert planned.kv_cache_bytes == pytest.approx(GIB // 2, abs=1 << 20)
    assert planned.pools[0].fits


SHAPES = {
    # Llama 3.1 8B: the context is 128k, and K and V of a token take 128 KiB.
    "8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    # Qwen2.5 7B: 32k, 56 KiB.
    "7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
    },
}


SHAPES["window"] = {
    # Mistral 7B, the first: the context is 32k, of which each layer attends to 4k.
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}


def shape(name: str, base_folder: Path, tmp_path: Path) -> DecoderConfig:
    if name == "135M":
        return read_decoder_config(base_folder)
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name]))
    return read_decoder_config(tmp_path)


@pytest.mark.parametrize(
    ("base", "gib", "adapters", "rule"),
    [
        # A container of 2 GB has no room for the usual budgets of adapters.
        ("135M", 2, 2.0, "refused"),
        ("135M", 2, 0.25, "left"),
        ("135M", 4, 2.0, "left"),
        ("135M", 6, 2.0, "usual"),
        ("135M", 8, 2.0, "share"),
        ("135M", 23, 2.0, "share"),
        ("135M", 256, 2.0, "contexts of all"),
        ("7B", 8, 0.25, "left"),
        ("7B", 8, 2.0, "refused"),
        ("7B", 23, 2.0, "share"),
        ("7B", 12, 2.0, "one context"),
        ("7B", 256, 2.0, "share"),
        ("8B", 8, 2.0, "refused"),
        ("8B", 23, 2.0, "share"),
        ("8B", 36, 2.0, "one context"),
        ("8B", 256, 2.0, "share"),
    ],
)
def test_what_auto_takes_of_machines_and_containers(
    base: str, gib: int, adapters: float, rule: str, base_folder: Path, tmp_path: Path
) -> None:
    """Never more than is left beside all else that is counted, whose budgets stay whole."""
    model = shape(base, base_folder, tmp_path)
    flags = {
        "host_cache_bytes": str(int(adapters * GIB)),
        "device_adapter_bytes": str(int(min(adapters, 1) * GIB)),
    }
    if rule == "refused":
        with refused(MemoryTooSmall, pool="host"):
            plan(model, gib, **flags)
        return
    planned = plan(model, gib, **flags)
    assert planned.pools[0].fits
    assert uses(planned)["adapters"] == adapters * GIB, "the adapters' budget is not starved"
    left, kv = left_for_kv(planned), planned.kv_cache_bytes
    expected = {
        "left": left,
        "usual": USUAL_KV_BYTES,
        "share": left // AUTO_KV_SHARE,
        "one context": contexts(model, 1),
        "contexts of all": contexts(model, 64),
    }
    assert kv == expected[rule]
    assert contexts(model, 1) <= kv or contexts(model, 1) > left, "one sequence fits"
    assert kv <= contexts(model, 64)
    whole = contexts(model, 1) <= left and left >= USUAL_KV_BYTES
    assert planned.kv_cache.short == (not whole)
    assert planned.kv_cache.tokens == (kv // 16 // planned.kv_token_bytes - 1) * 16


def test_other_programs_leave_auto_less_but_not_less_than_usual(
    base_folder: Path, tmp_path: Path
) -> None:
    model = shape("7B", base_folder, tmp_path)

    def with_free(gib: float) -> MemoryPlan:
        here = HostMemory(64 * GIB, int(gib * GIB), contained=False)
        return plan_memory(model, load_config({}, {}), here, None)

    roomy, busy, full = with_free(64), with_free(20), with_free(1)
    free = left_for_kv(busy) - 44 * GIB
    assert busy.kv_cache_bytes == free // AUTO_KV_SHARE < roomy.kv_cache_bytes
    assert full.kv_cache_bytes == USUAL_KV_BYTES
    assert full.kv_cache.short, "a whole context does not fit into what is free"
    # What a container is allowed counts, not what its machine has.
    here = HostMemory(16 * GIB, 16 * GIB, contained=True)
    inside = plan_memory(model, load_config({}, {}), here, None)
    assert inside.pools[0].total <= 16 * GIB


@settings(max_examples=300, deadline=None)
@given(
    limit=st.integers(1, 512 * GIB),
    available=st.floats(0, 1),
    name=st.sampled_from(["135M", "7B", "8B"]),
    running=st.integers(1, 4096),
    adapters=st.integers(1, 8 * GIB),
)
def test_any_machine_is_planned_for_or_refused(
    limit: int, available: float, name: str, running: int, adapters: int, base_folder: Path
) -> None:
    with TemporaryDirectory() as folder:
        model = shape(name, base_folder, Path(folder))
    flags = {"max_running": str(running), "host_cache_bytes": str(adapters)}
    here = HostMemory(limit, int(available * limit), contained=False)
    try:
        planned = plan_memory(model, load_config(flags, {}), here, None)
    except MemoryTooSmall:
        return
    kv = planned.kv_cache_bytes
    assert planned.pools[0].total <= limit
    assert kv <= contexts(model, running)
    free = int(available * limit) - (planned.pools[0].total - kv)
    usual, one = min(USUAL_KV_BYTES, left_for_kv(planned)), contexts(model, 1)
    bounds = [usual, free // AUTO_KV_SHARE, one if one <= free else 0]
    smallest = (2048 + BLOCK_TOKENS) * token_bytes(model, "bfloat16")
    assert kv == max(smallest, min(max(bounds), contexts(model, running)))
    assert planned.kv_cache.tokens >= min(model.context_length, 2048)


def test_with_windows_a_whole_context_takes_the_window_and_a_steps_tokens(
    base_folder: Path, tmp_path: Path
) -> None:
    model = shape("window", base_folder, tmp_path)
    each = token_bytes(model, "bfloat16")
    planned = plan(model, 256, max_running="2")
    assert planned.kv_cache_bytes == contexts(model, 2), "what is given back is cached"
    # The window, a step's tokens, and what is left of the blocks at both ends.
    assert planned.kv_cache.held <= 4096 + 512 + 16
    # In full it would not fit.
    small = plan(model, 9, host_cache_bytes="1GiB")
    assert 32768 * each > small.pools[0].limit - small.pools[0].total + small.kv_cache_bytes
    assert not small.kv_cache.short


def test_the_plan_says_what_auto_went_by(model: DecoderConfig) -> None:
    assert "auto: 1/4 of" in str(plan(model, 23))
    assert "auto: 64 sequences of the full context" in str(plan(model, 256))
    assert "auto" not in str(plan(model, 23, kv_cache_bytes="1GiB"))


def test_a_chosen_cache_does_not_shrink(model: DecoderConfig) -> None:
    roomy = plan(model, 24)
    short = roomy.pools[0].limit - left_for_kv(roomy) + GIB // 2
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
    planned = plan(model, 1.6, host_cache_bytes="64MiB", device_adapter_bytes="64MiB")
    assert planned.kv_cache.short


def test_with_several_cards_the_plan_is_of_one(
    model: DecoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings are whole on each."""
    choice = GpuChoice(Gpu("fake", 4 * GIB, 4 * GIB))
    monkeypatch.setattr(startup, "choose_gpu", lambda _device: choice)
    whole, part = (
        startup.memory_for(model, config(device="cuda", backend="cuda", tensor_parallel=count))
        for count in ("1", "3")
    )
    assert whole.kv_token_bytes == 3 * part.kv_token_bytes
    embedding = model.vocab_size * model.hidden_size * 2
    bases = [uses(each, "device")["base"] - embedding for each in (whole, part)]
    assert bases[0] == pytest.approx(3 * bases[1], abs=3)


def test_a_gpu_is_a_pool_of_its_own(model: DecoderConfig) -> None:
    planned = plan(model, 8, Gpu("fake", 4 * GIB, 4 * GIB))
    assert uses(planned, "host")["host_adapters"] == 2 * GIB
    assert uses(planned, "device")["device_adapters"] == GIB
    assert "base" in uses(planned, "device")
    with refused(MemoryTooSmall, pool="device"):
        plan(model, 8, Gpu("fake", 4 * GIB, 4 * GIB), device_adapter_bytes="4GiB")
    with refused(MemoryTooSmall, pool="host"):
        plan(model, 2, Gpu("fake", 4 * GIB, 4 * GIB))


@pytest.mark.parametrize("size", ["1", "16KiB", "1MiB"])
def test_a_cache_without_room_for_a_request_is_refused(model: DecoderConfig, size: str) -> None:
    with refused(MemoryTooSmall, key="kv_cache_bytes") as caught:
        plan(model, 23, kv_cache_bytes=size)
    (least,) = re.findall(r"at least (\w+)", str(caught.value))
    assert 128 <= plan(model, 23, kv_cache_bytes=least).kv_cache.tokens < 256


@pytest.mark.parametrize("size", ["0", "1KiB"])
def test_a_budget_without_room_for_an_adapter_is_refused(
    model: DecoderConfig, size: str
) -> None:
    with refused(MemoryTooSmall, key="device_adapter_bytes") as caught:
        plan(model, 23, device_adapter_bytes=size)
    (least,) = re.findall(r"takes (\w+)", str(caught.value))
    plan(model, 23, device_adapter_bytes=least)
    # On a CPU, HOST may use the larger of both budgets; on a card it is memory of its own.
    plan(model, 23, host_cache_bytes=size)
    with refused(MemoryTooSmall, key="host_cache_bytes"):
        plan(model, 23, Gpu("a card", 23 * GIB, 23 * GIB), host_cache_bytes=size)


def test_adapters_take_what_the_backend_stores_of_a_number(model: DecoderConfig) -> None:
    """With torch on a CPU, that is twice as much: half was named, and taken for enough."""
    card = Gpu("a card", 23 * GIB, 23 * GIB)

    def least(gpu: Gpu | None = None, **flags: str) -> int:
        with refused(MemoryTooSmall, key="device_adapter_bytes") as caught:
            plan(model, 23, gpu, device_adapter_bytes="1", **flags)
        (size,) = re.findall(r"takes (\d+)KiB", str(caught.value))
        return int(size)

    half = least(backend="native")
    assert abs(least(backend="torch") - 2 * half) <= 1
    assert abs(least(dtype="float32") - 2 * half) <= 1
    assert abs(least(card, backend="torch", dtype="float32") - 2 * half) <= 1
    assert least() == least(card) == least(card, backend="cuda") == half
    with refused(MemoryTooSmall, key="device_adapter_bytes"):
        plan(model, 23, backend="torch", device_adapter_bytes=f"{half}KiB")


def test_inputs_of_8_bits_need_weights_of_4_before_anything_is_loaded(
    model: DecoderConfig,
) -> None:
    with refused(ConfigInvalid, key="int8_activations"):
        startup.memory_for(model, config(int8_activations="true", quantization="none"))
    stored = replace(model, quantization="nf4")
    startup.memory_for(stored, config(int8_activations="true", quantization="none"))
