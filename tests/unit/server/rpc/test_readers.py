"""The call of a caller that reads nothing ends in the server, though the caller never
learns."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from veneer_proto.v1 import inference_pb2_grpc
from veneer_server.wire.messages import SequenceOutput

from tests.unit.server.rpc.front_harness import Front, prompt, running, until

# Windows that one message fills, and that do not grow.
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]


@pytest_asyncio.fixture
async def front(base_folder: Path, front_cache: Path, tmp_path: Path) -> AsyncIterator[Front]:
    async with running(base_folder, front_cache, tmp_path / "server", reader_limit="0.2") as f:
        yield f


@pytest.mark.push
@pytest.mark.parametrize(
    ("readers", "tokens"),
    [
        pytest.param(1, 20_000, id="first message stuck"),
        pytest.param(5, 20_000, id="five of these"),
        pytest.param(5, 100, id="stuck after a while"),
    ],
)
async def test_its_work_ends_and_nothing_waits_for_it(
    front: Front, readers: int, tokens: int
) -> None:
    many = [SequenceOutput(1, [1000] * tokens) for _ in range(800_000 // tokens)]
    front.engine.script = [*many, SequenceOutput(1, [1001], finish="stop")]
    async with grpc.aio.insecure_channel(front.addresses["grpc"], SMALL_WINDOW) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.GenerateStream(prompt()) for _ in range(readers)]
        # First the engine's work ends, then the call, though nobody takes its status. On a busy
        # machine the first may end before the last begins.
        await until(lambda: front.engine.cancelled == readers)
        assert front.engine.in_flight == 0
        await until(lambda: front.calls == 0)
        front.engine.script = None
        assert (await front.inference.Generate(prompt())).token_ids
        # Who reads after all gets what was sent before, then the reason.
        messages = aiter(calls[0])
        taken = [await anext(messages)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _rest(messages, taken)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert len(taken) < len(many)


async def _rest(messages: AsyncIterator[Any], taken: list[Any]) -> None:
    async for message in messages:
        taken.append(message)
