"""As many watchers as possible during changes: each event could stall the loop for 2 s."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import grpc
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import adapters_pb2_grpc

from tests.attacks.case import Target

TITLE = "5,000 watchers, and changes for them to hear of"

_CHANNELS: Final = 20


async def attack(target: Target) -> list[str]:
    """Watchers beyond the limit are refused with RESOURCE_EXHAUSTED; all others get each
    change."""
    wrong: list[str] = []
    heard: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        stubs: list[Any] = []
        for n in range(_CHANNELS):
            options = (("grpc.use_local_subchannel_pool", 1), ("attack.channel", n))
            channel = grpc.aio.insecure_channel(target.grpc, options=options)
            stubs.append(
                adapters_pb2_grpc.AdapterServiceStub(await stack.enter_async_context(channel))
            )
        count = 5000 if target.full else 400
        watches = [
            asyncio.create_task(_watch(stubs[n % _CHANNELS], heard, wrong))
            for n in range(count)
        ]
        loop = asyncio.get_running_loop()
        until, latest = loop.time() + target.seconds, loop.time() + 60
        # This process has the lowest priority, and may need longer.
        while loop.time() < until or (not heard and loop.time() < latest):
            for pin in (True, False):
                request = pb.UpdateAdapterRequest(name=target.adapter, pinned=pin)
                await stubs[0].UpdateAdapter(request)
            await asyncio.sleep(0.1)
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
    if not heard:
        wrong.append("no watcher was told of anything")
    return wrong


async def _watch(stub: Any, heard: list[float], wrong: list[str]) -> None:
    """Record when an event arrived."""
    call = stub.WatchAdapters(pb.WatchAdaptersRequest())
    try:
        while (await call.read()) is not grpc.aio.EOF:
            heard.append(asyncio.get_running_loop().time())
    except grpc.aio.AioRpcError as error:
        if error.code() not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED):
            wrong.append(f"a watcher: {error.code().name} {error.details()}")
    except asyncio.CancelledError:
        call.cancel()
