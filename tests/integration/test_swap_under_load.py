"""Uploads, replaces and evictions while streams run: nothing stalls, mixes or fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from veneer_proto.v1 import adapters_pb2

from tests.server_harness import Server, Stream

pytestmark = [pytest.mark.real_base, pytest.mark.asyncio(loop_scope="session")]

STREAMS = 16
NEW_TOKENS = 120


async def run(stream: Stream) -> tuple[int, str]:
    """Tokens of a stream read to its end, and the revision it ended with."""
    messages = await stream.rest()
    tokens = sum(len(message.token_ids) for message in messages)
    return tokens, messages[-1].final.provenance.revision


async def test_streams_go_on_while_adapters_come_and_go(
    server: Server, real_adapters: dict[str, Path]
) -> None:
    folders = list(real_adapters.values())
    names = [f"live-{i}" for i in range(8)]
    current = {}
    for name, folder in zip(names, folders, strict=False):
        current[name] = (await server.push(folder, name)).adapter.revision
    streams = [
        server.stream(
            prompt=f"Tell me about {names[i % 8]}:",
            adapter=names[i % 8],
            stopping={"max_tokens": NEW_TOKENS, "ignore_eos": True},
        )
        for i in range(STREAMS)
    ]
    # Every stream is admitted before anything changes.
    first = await asyncio.gather(*(stream.first() for stream in streams))
    running = [asyncio.create_task(run(stream)) for stream in streams]
    replaced = {}
    for turn, name in enumerate(names):
        folder = folders[(turn + 3) % len(folders)]
        answer = await server.push(folder, name, allow_replace=True)
        assert answer.replaced
        replaced[name] = answer.adapter.revision
        assert replaced[name] != current[name]
        await server.push(folders[turn], f"extra-{turn}", activate=True)
        await server.adapters.EvictAdapter(
            adapters_pb2.EvictAdapterRequest(name=f"extra-{turn}")
        )
        fresh = await server.generate(prompt="y", adapter=name, stopping={"max_tokens": 2})
        assert fresh.provenance.revision == replaced[name]
    for i, task in enumerate(running):
        tokens, revision = await task
        assert revision == current[names[i % 8]], "a running stream changed its revision"
        # A message holds more than one token where its reader was slow.
        assert len(first[i].token_ids) + tokens == NEW_TOKENS
    for turn, name in enumerate(names):
        await server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=name))
        await server.adapters.DeleteAdapter(
            adapters_pb2.DeleteAdapterRequest(name=f"extra-{turn}")
        )


async def test_deleting_an_adapter_does_not_disturb_its_running_stream(
    server: Server, real_adapters: dict[str, Path]
) -> None:
    await server.push(real_adapters["mlp"], "doomed")
    stopping = {"max_tokens": 30, "ignore_eos": True}
    stream = server.stream(prompt="Go", adapter="doomed", stopping=stopping)
    assert (await stream.first()).token_ids
    await server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="doomed"))
    assert (await stream.rest())[-1].final.usage.completion_tokens == 30
    gone = await server.refused(server.generate(prompt="Go", adapter="doomed"))
    assert gone.reason == "ADAPTER_NOT_FOUND"


async def test_eviction_with_abort_ends_its_requests_and_no_others(
    server: Server, real_adapters: dict[str, Path]
) -> None:
    endless = {"max_tokens": 7000, "ignore_eos": True}
    stopping = {"max_tokens": 200, "ignore_eos": True}
    victim = server.stream(prompt="Go", adapter="rank-1", stopping=endless)
    neighbour = server.stream(prompt="Go", adapter="rank-4", stopping=stopping)
    await victim.first()
    await neighbour.first()
    answer = await server.adapters.EvictAdapter(
        adapters_pb2.EvictAdapterRequest(name="rank-1", mode=adapters_pb2.EVICT_MODE_ABORT)
    )
    assert answer.evicted
    refused = await server.refused(victim.rest())
    assert (refused.code, refused.reason) == ("ABORTED", "ADAPTER_EVICTED")
    assert (await neighbour.rest())[-1].final.usage.completion_tokens == 200
