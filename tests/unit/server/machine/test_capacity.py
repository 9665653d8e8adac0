"""Capacity: whole blocks, exact bytes, and the flag that would be enough."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.sizing.capacity import Budgets, Capacity, Limit, plan_capacity


def budgets(
    *,
    host: int = 1000,
    device: int = 500,
    kv: int = 3360,
    running: int = 8,
    window_blocks: int | None = None,
) -> Budgets:
    """Of a server with these values of the flags; a KV block takes 160 bytes."""
    return Budgets(
        host_adapters=host,
        device_adapters=device,
        itemsize=4,
        kv_bytes=kv,
        # The engine's first block is padding, and no sequence gets it.
        kv_tokens=BlockManager(kv // 160, 16).total * 16,
        kv_token_bytes=10,
        block_tokens=16,
        max_running=running,
        window_blocks=window_blocks,
    )


def capacity(**wanted: int) -> Capacity:
    asked: dict[str, Any] = {
        "adapter_parameters": 25,
        "adapters": 0,
        "context_length": 33,
        "concurrency": 0,
    }
    return plan_capacity(budgets(), **asked | wanted)


def test_what_fits() -> None:
    found = capacity(adapters=5, concurrency=6)
    assert (found.adapter_bytes, found.on_host, found.on_device) == (100, 10, 5)
    assert found.sequence_bytes == 48 * 10, "33 tokens take three blocks"
    assert (found.running, found.limited_by) == (6, Limit.KV_CACHE)
    assert found.shortfalls == ()


def test_max_running_may_be_the_limit() -> None:
    assert (capacity(context_length=1).running, capacity(context_length=1).limited_by) == (
        8,
        Limit.MAX_RUNNING,
    )


def test_each_shortfall_names_a_value_that_would_do() -> None:
    found = capacity(adapters=11, concurrency=9)
    needed = {short.limit: short.needed for short in found.shortfalls}
    assert needed == {
        Limit.HOST_ADAPTERS: 1100,
        Limit.DEVICE_ADAPTERS: 1100,
        Limit.KV_CACHE: 9 * 480 + 160,
        Limit.MAX_RUNNING: 9,
    }
    now = {short.limit: short.available for short in found.shortfalls}
    assert now == {
        Limit.HOST_ADAPTERS: 1000,
        Limit.DEVICE_ADAPTERS: 500,
        Limit.KV_CACHE: 3360,
        Limit.MAX_RUNNING: 8,
    }
    for short in found.shortfalls:
        assert f"{short.limit.value} {short.needed}" in short.message


@settings(max_examples=200, print_blob=True)
@given(
    adapters=st.integers(0, 40),
    concurrency=st.integers(0, 40),
    context_length=st.integers(1, 100),
)
def test_a_server_started_with_what_is_advised_has_no_shortfall_and_no_byte_too_much(
    adapters: int, concurrency: int, context_length: int
) -> None:
    asked = {
        "adapter_parameters": 25,
        "adapters": adapters,
        "concurrency": concurrency,
        "context_length": context_length,
    }
    flags = {
        Limit.HOST_ADAPTERS: "host",
        Limit.DEVICE_ADAPTERS: "device",
        Limit.KV_CACHE: "kv",
        Limit.MAX_RUNNING: "running",
    }
    found = plan_capacity(budgets(), **asked)
    advised = {flags[short.limit]: short.needed for short in found.shortfalls}
    assert plan_capacity(budgets(**advised), **asked).shortfalls == ()
    for flag, value in advised.items():
        (short,) = plan_capacity(budgets(**advised | {flag: value - 1}), **asked).shortfalls
        assert flags[short.limit] == flag
        assert short.needed == value


@pytest.mark.parametrize("tokens", [15, 16, 17])
def test_a_sequence_takes_whole_blocks(tokens: int) -> None:
    assert capacity(context_length=tokens).sequence_bytes == (160 if tokens <= 16 else 320)


def test_with_windows_a_sequence_takes_no_more_than_they_reach() -> None:
    asked = {"adapter_parameters": 25, "adapters": 0, "context_length": 1000}
    found = plan_capacity(budgets(window_blocks=4), **asked, concurrency=5)
    assert (found.sequence_bytes, found.running, found.shortfalls) == (4 * 160, 5, ())
    (short,) = plan_capacity(budgets(window_blocks=4), **asked, concurrency=6).shortfalls
    assert (short.limit, short.needed) == (Limit.KV_CACHE, 6 * 4 * 160 + 160)
