"""After the engine dies or the server stops, resident adapters are restored; no call hangs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from veneer_proto.v1 import adapters_pb2, inference_pb2, server_pb2

from tests.server_harness import (
    Server,
    read_files,
    refusal,
    running_server,
    upload_messages,
)

pytestmark = [pytest.mark.push, pytest.mark.real_base, pytest.mark.asyncio(loop_scope="module")]

ENDLESS = {"max_tokens": 7000, "ignore_eos": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lone") / "data"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lone(base_folder: Path, cache_dir: Path, data: Path) -> AsyncIterator[Server]:
    """One place in the batch, a short grace; the last test of this module stops it."""
    async with running_server(data, cache_dir, "--max-running", "1", "--grace", "0.5") as lone:
        yield lone


async def test_a_new_engine_gets_back_what_the_dead_one_held(
    lone: Server, real_adapters: dict[str, Path]
) -> None:
    """The pinned one first, then by last use; one that was deleted meanwhile is not."""
    for name in ("rank-4", "mlp", "attention", "gone", "disk"):
        path = real_adapters[
            "rslora" if name == "gone" else "rank-1" if name == "disk" else name
        ]
        await lone.push(path, name)
    await lone.adapters.ActivateAdapter(
        adapters_pb2.ActivateAdapterRequest(name="rank-4", pin=True)
    )
    for name in ("attention", "gone", "mlp"):
        await lone.generate(prompt="Hello", adapter=name)

    engine = lone.engine
    watch = aiter(lone.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest()))
    while (await anext(watch)).event != adapters_pb2.ADAPTER_EVENT_SYNCED:
        pass
    engine.kill()
    await lone.wait_for_health(False, seconds=30)
    await lone.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="gone"))
    back: list[str] = []
    while len(back) < 3:
        message = await anext(watch)
        if message.event == adapters_pb2.ADAPTER_EVENT_ACTIVATED:
            back.append(message.adapter.name)
    assert back == ["rank-4", "mlp", "attention"]
    listed = await lone.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
    found = {a.name: (a.tier, a.pinned) for a in listed.adapters}
    assert found == {
        "rank-4": (inference_pb2.TIER_DEVICE, True),
        "mlp": (inference_pb2.TIER_DEVICE, False),
        "attention": (inference_pb2.TIER_DEVICE, False),
        "disk": (inference_pb2.TIER_DISK, False),
    }
    answer = await lone.generate(prompt="Hello", adapter="mlp")
    assert answer.provenance.tier == inference_pb2.TIER_DEVICE
    info = await lone.about.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert info.engine_starts == 2


async def test_a_drain_ends_streams_waiting_requests_and_uploads(
    lone: Server, data: Path, real_adapters: dict[str, Path]
) -> None:
    running = lone.stream(prompt="Go", stopping=ENDLESS)
    await running.first()
    waiting = asyncio.create_task(lone.generate(prompt="Go"))
    while not (await lone.metric("veneer_num_requests_waiting"))[""]:
        assert not waiting.done()
    messages = upload_messages(read_files(real_adapters["rank-64"]), "half")
    sent = asyncio.Event()

    async def half() -> AsyncIterator[Any]:
        for message in messages[: len(messages) // 2]:
            yield message
        sent.set()
        await asyncio.Event().wait()

    upload = lone.adapters.UploadAdapter(half())
    await sent.wait()
    lone.process.send_signal(signal.SIGTERM)
    for call in (running.rest(), waiting, upload):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        ended = refusal(caught.value)
        assert (ended.code, ended.reason) == ("UNAVAILABLE", "DRAINING")
        assert ended.retry_after_s is not None
    assert await asyncio.wait_for(lone.process.wait(), 30) == 0
    assert list((data / "store" / "staging").iterdir()) == [], "half an upload is left"
