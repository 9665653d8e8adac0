"""Waiting calls do not block others: each kind of call has its own limit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import adapters_pb2_grpc, server_pb2
from veneer_registry.errors import QueueFull
from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.rpc.open_calls import MAX_OTHER_CALLS, OpenCalls
from veneer_server.serving.self_test import MAX_WAITING, SelfTest, Verdict

from tests.unit.server.rpc.front_harness import Front, failure, prompt, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SELF_TEST = "/veneer.v1.AdapterService/SelfTest"
MANY = 900
"""More than there was room for in all."""


async def test_other_calls_have_a_limit_of_their_own() -> None:
    calls = OpenCalls()
    with contextlib.ExitStack() as held:
        for _ in range(MAX_OTHER_CALLS):
            held.enter_context(calls.one(SELF_TEST, DEFAULT_TENANT))
        with pytest.raises(QueueFull) as refused, calls.one(SELF_TEST, DEFAULT_TENANT):
            pass
        assert refused.value.metadata["limit"] == str(MAX_OTHER_CALLS)
        assert refused.value.retry_after_s
        for method in (
            "InferenceService/Generate",
            "InferenceService/GenerateStream",
            "AdapterService/WatchAdapters",
            "ServerService/GetServerInfo",
        ):
            for _ in range(MAX_OTHER_CALLS):
                held.enter_context(calls.one(f"/veneer.v1.{method}", DEFAULT_TENANT))
    with calls.one(SELF_TEST, DEFAULT_TENANT):
        pass


async def test_a_tenant_does_not_fill_the_places_of_others() -> None:
    calls = OpenCalls()
    here, there = DEFAULT_TENANT, "team-b"

    def hold(tenant: str, most: int) -> int:
        """How many it gets, of so many that it tries."""
        before = len(held)
        for _ in range(most):
            call = calls.one(SELF_TEST, tenant)
            with contextlib.suppress(QueueFull):
                call.__enter__()
                held.append(call)
        return len(held) - before

    held: list[contextlib.AbstractContextManager[None]] = []

    assert hold(here, MAX_OTHER_CALLS // 2 + 10) == MAX_OTHER_CALLS // 2 + 10  # it is alone
    assert hold(there, MAX_OTHER_CALLS) == MAX_OTHER_CALLS // 2 - 10  # the rest, and waits
    assert hold(here, 10) == 0
    calls = OpenCalls()
    assert hold(there, 1) == 1
    assert hold(here, MAX_OTHER_CALLS) == MAX_OTHER_CALLS // 2


@pytest.mark.push
async def test_self_tests_that_wait_keep_nobody_else_out(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """832 of them shut out every other call."""
    free = asyncio.Event()

    async def held(test: SelfTest, subjects: Sequence[Any]) -> tuple[list[Verdict], int]:
        """FAKE: a test that takes as long as this one likes."""
        await free.wait()
        return [], 0

    # private: what a test does is left out, and its turn kept
    monkeypatch.setattr(SelfTest, "_run", held)
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [
        grpc.aio.insecure_channel(front.addresses["grpc"], options=options) for _ in range(3)
    ]
    calls = [
        adapters_pb2_grpc.AdapterServiceStub(channel).SelfTest(pb.SelfTestRequest())
        for channel in channels
        for _ in range(MANY // 3)
    ]
    # All but the one that runs and those that may wait are told at once.
    await until(lambda: sum(call.done() for call in calls) == MANY - 1 - MAX_WAITING)
    for call in calls:
        if call.done():
            refused = await failure(call)
            assert (refused.code, refused.reason) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
            )
            assert "RetryInfo" in refused.details
    assert len((await front.inference.Generate(prompt())).token_ids) == 4
    assert await front.server.GetServerInfo(server_pb2.GetServerInfoRequest())
    health: Any = health_pb2_grpc.HealthStub(front.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    free.set()
    while True:  # those that left have made room
        with contextlib.suppress(grpc.aio.AioRpcError):
            assert (await front.adapters.SelfTest(pb.SelfTestRequest())).passed
            break
    for channel in channels:
        await channel.close()
