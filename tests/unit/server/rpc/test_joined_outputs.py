"""Outputs that wait for a slow reader come as one, in order and complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from veneer_registry.errors import EngineFailed
from veneer_server.engine.client import EngineClient
from veneer_server.engine.messages import EngineConfig, SamplingParams, SequenceOutput

FIRST = SequenceOutput(1, [5], [-1.0], prompt_logprobs=[-9.0], tier="host", load_seconds=2.0)


class FakeWriter:
    """FAKE: takes what would go to the engine; the test plays the engine's answers."""

    def write(self, data: bytes) -> None:
        pass


async def begun() -> tuple[EngineClient, AsyncIterator[SequenceOutput]]:
    """A client without a process, and a stream that has given its first output."""
    client = EngineClient(EngineConfig("", "", "", ""), max_queue=1)
    client._writer = FakeWriter()  # type: ignore[assignment]
    stream = aiter(client.generate([1], max_tokens=9, sampling=SamplingParams()))
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    client._dispatch(FIRST)
    assert await waiting == FIRST
    return client, stream


async def test_waiting_outputs_are_joined() -> None:
    client, stream = await begun()
    client._dispatch(SequenceOutput(1, [6], [-2.0]))
    client._dispatch(SequenceOutput(1, [7, 8], [-3.0, -4.0], finish="stop"))
    assert await anext(stream) == SequenceOutput(
        1, [6, 7, 8], [-2.0, -3.0, -4.0], finish="stop"
    )
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert client.in_flight == 0


async def test_the_first_output_keeps_what_only_it_has() -> None:
    client = EngineClient(EngineConfig("", "", "", ""), max_queue=1)
    client._writer = FakeWriter()  # type: ignore[assignment]
    stream = aiter(client.generate([1], max_tokens=9, sampling=SamplingParams()))
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    client._dispatch(FIRST)
    client._dispatch(SequenceOutput(1, [6], [-2.0], finish="length"))
    joined = await waiting
    assert (joined.tokens, joined.tier, joined.load_seconds) == ([5, 6], "host", 2.0)
    assert (joined.prompt_logprobs, joined.finish) == ([-9.0], "length")


async def test_an_error_comes_after_what_was_there_before_it() -> None:
    client, stream = await begun()
    client._dispatch(SequenceOutput(1, [6], [-2.0]))
    client._fail_everything(EngineFailed("gone: retry"))
    assert (await anext(stream)).tokens == [6]
    with pytest.raises(EngineFailed):
        await anext(stream)
    assert client.in_flight == 0
