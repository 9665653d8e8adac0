"""Requests that end early, callers that do not read, deadlines that cannot be met."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from veneer_proto.v1 import inference_pb2, server_pb2

from tests.server_harness import Server, Stream, refusal, running_server
from tests.torture import cancels, readers

pytestmark = [pytest.mark.real_base, pytest.mark.asyncio(loop_scope="module")]

NAMES = ("rank-4", "mlp", "attention", "rslora")
ENDLESS = {"max_tokens": 7000, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def crowded(
    base_folder: Path,
    cache_dir: Path,
    real_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Server]:
    """Few places, room for few adapters, little patience with callers that do not read."""
    flags = ("--max-running", "8", "--device-adapter-bytes", "12MiB", "--reader-limit", "1")
    folder = tmp_path_factory.mktemp("crowded") / "data"
    async with running_server(folder, cache_dir, *flags) as server:
        for name in NAMES:
            await server.push(real_adapters[name], name)
        yield server


async def test_whatever_ends_a_request_nothing_of_it_is_left(crowded: Server) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    attempts = [cancels.Attempt.random(generator, list(NAMES)) for _ in range(60)]
    ends = await cancels.end_early(crowded, attempts)
    assert sum(ends.values()) == len(attempts)
    assert set(ends) <= {"ended by the caller", "DEADLINE_EXCEEDED"}, ends
    await cancels.all_free(crowded)
    answer = await crowded.generate(prompt="Hello", adapter="mlp")
    assert len(answer.token_ids) == 8


async def test_a_deadline_that_passes_frees_the_work(crowded: Server) -> None:
    call = crowded.inference.GenerateStream(
        inference_pb2.GenerateRequest(
            prompt="Go", stopping=inference_pb2.StoppingOptions(**ENDLESS)
        ),
        timeout=1.0,
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Stream(call).rest()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await cancels.all_free(crowded)


async def test_a_deadline_that_a_long_prompt_cannot_meet_is_refused(crowded: Server) -> None:
    generator = random.Random(3)

    def prompt(length: int) -> list[int]:
        return [generator.randrange(100, 40_000) for _ in range(length)]

    # The server has to have seen a full step before it can know.
    known = prompt(600)
    await crowded.generate(token_ids=known, stopping={"max_tokens": 1})
    began = await crowded.metric("veneer_generation_tokens_total")
    # Longer than the fastest rate of any CPU, so that it holds where steps are fast too.
    asked = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt(7000)),
        stopping=inference_pb2.StoppingOptions(max_tokens=1),
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await crowded.inference.Generate(asked, timeout=0.5)
    refused = refusal(caught.value)
    assert (refused.code, refused.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_TOO_SHORT")
    assert refused.retry_after_s is None, "it would never fit: waiting does not help"
    assert await crowded.metric("veneer_generation_tokens_total") == began
    # What the prefix cache holds takes no time: the same deadline, and it is met.
    cached = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=known),
        stopping=inference_pb2.StoppingOptions(max_tokens=1),
    )
    assert (await crowded.inference.Generate(cached, timeout=20)).token_ids


@pytest.mark.push
async def test_callers_that_do_not_read_are_closed_and_harm_nobody(crowded: Server) -> None:
    already = await readers.closed(crowded)
    async with readers.streams(crowded, 4, new_tokens=8) as stuck:
        await readers.gaps(crowded, 16)
        while await readers.closed(crowded) - already < len(stuck):
            assert not any(call.done() for call in stuck), "a client sees it when it reads"
        await cancels.all_free(crowded)


async def test_the_memory_plan_holds_and_capacity_is_planned(crowded: Server) -> None:
    info = await crowded.about.GetServerInfo(server_pb2.GetServerInfoRequest())
    (pool,) = info.memory.pools
    uses = {use.name: use.bytes for use in pool.uses}
    assert pool.total_bytes == sum(uses.values()) <= pool.limit_bytes
    assert uses["base"] >= info.base_model.bytes
    # Adapters fill up with use; the rest of the plan must cover what was measured.
    measured = info.memory.front_peak_bytes + info.memory.engine_peak_bytes
    assert 0 < measured <= pool.total_bytes - uses["adapters"] + (64 << 20)

    ask = server_pb2.PlanCapacityRequest
    like = await crowded.about.PlanCapacity(ask(like="mlp", adapters=3, context_length=512))
    same = await crowded.about.PlanCapacity(
        ask(
            shape=server_pb2.AdapterShape(rank=8, modules=["gate_proj", "up_proj", "down_proj"])
        )
    )
    assert like.adapters.parameters == same.adapters.parameters
    assert like.adapters.on_device == (12 << 20) // like.adapters.bytes
    assert like.sequences.running == 8
    assert like.sequences.limited_by == server_pb2.LIMIT_MAX_RUNNING
    many = await crowded.about.PlanCapacity(ask(adapters=1000, concurrency=9))
    assert not many.fits
    assert {short.flag for short in many.shortfalls} >= {
        "--device-adapter-bytes",
        "--max-running",
    }
    unknown = await crowded.refused(crowded.about.PlanCapacity(ask(like="mpl")))
    assert (unknown.reason, unknown.metadata["did_you_mean"]) == ("ADAPTER_NOT_FOUND", "mlp")
    for bad in (
        ask(shape=server_pb2.AdapterShape(rank=0)),
        ask(shape=server_pb2.AdapterShape(rank=4, modules=["lm_head"])),
        ask(context_length=1 << 20),
    ):
        assert (
            await crowded.refused(crowded.about.PlanCapacity(bad))
        ).reason == "INVALID_FIELD"
