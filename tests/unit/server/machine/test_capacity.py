"""Capacity: whole blocks, true bytes, and the flag that would do."""

from __future__ import annotations

from typing import Any

import pytest
from veneer_server.capacity import Budgets, Capacity, Limit, plan_capacity

BUDGETS = Budgets(
    host_adapters=1000,
    device_adapters=500,
    itemsize=4,
    kv_tokens=320,
    kv_token_bytes=10,
    block_tokens=16,
    max_running=8,
)


def capacity(**wanted: int) -> Capacity:
    asked: dict[str, Any] = {
        "adapter_parameters": 25,
        "adapters": 0,
        "context_length": 33,
        "concurrency": 0,
    }
    return plan_capacity(BUDGETS, **asked | wanted)


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
        Limit.KV_CACHE: 9 * 480,
        Limit.MAX_RUNNING: 9,
    }
    for short in found.shortfalls:
        assert f"{short.limit.value} {short.needed}" in short.message
    more = Budgets(
        host_adapters=needed[Limit.HOST_ADAPTERS],
        device_adapters=needed[Limit.DEVICE_ADAPTERS],
        itemsize=4,
        kv_tokens=needed[Limit.KV_CACHE] // 10,
        kv_token_bytes=10,
        block_tokens=16,
        max_running=9,
    )
    asked = {"adapter_parameters": 25, "context_length": 33}
    assert plan_capacity(more, adapters=11, concurrency=9, **asked).shortfalls == ()


@pytest.mark.parametrize("tokens", [15, 16, 17])
def test_a_sequence_takes_whole_blocks(tokens: int) -> None:
    assert capacity(context_length=tokens).sequence_bytes == (160 if tokens <= 16 else 320)
