"""Outputs that wait for a slow reader are merged: in order, complete and bounded."""

from __future__ import annotations

import asyncio

import pytest
from veneer_registry.errors import Aborted, EngineFailed
from veneer_server.engine_client.streams import MAX_BUFFERED_BYTES, OutputStream
from veneer_server.wire.messages import SequenceOutput

from tests.refused import refused


def first() -> SequenceOutput:
    """A fresh one each time: a stream owns what it is given."""
    return SequenceOutput(
        1, [5], [-1.0], prompt_logprobs=[-9.0], tier="host", load_seconds=2.0, cached_tokens=3
    )


async def test_outputs_come_one_by_one_to_a_reader_that_keeps_up() -> None:
    stream = OutputStream()
    waiting = asyncio.ensure_future(stream.get())
    await asyncio.sleep(0)
    stream.put(first())
    assert await waiting == first()
    stream.put(SequenceOutput(1, [6]))
    assert await stream.get() == SequenceOutput(1, [6])


async def test_waiting_outputs_are_joined() -> None:
    stream = OutputStream()
    stream.put(SequenceOutput(1, [6], [-2.0], top_logprobs=[[(6, -2.0)]]))
    stream.put(
        SequenceOutput(1, [7, 8], [-3.0, -4.0], top_logprobs=[[(7, -3.0)], []], finish="stop")
    )
    assert await stream.get() == SequenceOutput(
        1,
        [6, 7, 8],
        [-2.0, -3.0, -4.0],
        top_logprobs=[[(6, -2.0)], [(7, -3.0)], []],
        finish="stop",
    )


async def test_the_first_output_keeps_what_only_it_has() -> None:
    stream = OutputStream()
    stream.put(first())
    stream.put(SequenceOutput(1, [6], [-2.0], finish="length"))
    joined = await stream.get()
    assert (joined.tokens, joined.tier, joined.load_seconds) == ([5, 6], "host", 2.0)
    assert (joined.prompt_logprobs, joined.finish) == ([-9.0], "length")
    assert joined.cached_tokens == 3


async def test_an_error_comes_after_what_was_there_before_it() -> None:
    stream = OutputStream()
    stream.put(SequenceOutput(1, [6], [-2.0]))
    stream.fail(EngineFailed("gone: retry"))
    stream.put(SequenceOutput(1, [7], [-2.0]))  # after its end: nobody's
    assert (await stream.get()).tokens == [6]
    for _ in range(2):
        with pytest.raises(EngineFailed):
            await stream.get()


async def test_what_waits_for_a_reader_is_bounded() -> None:
    stream = OutputStream()
    tops = [(token, -1.0) for token in range(20)]
    most = MAX_BUFFERED_BYTES // (20 * 100)
    for _ in range(most):
        stream.put(SequenceOutput(1, [1], [-1.0], top_logprobs=[list(tops)]))
    assert 0 < len((await stream.get()).tokens) < most
    with refused(Aborted, cause="slow_reader"):
        await stream.get()
