"""Watches, follows and uploads whose key is revoked, demoted or moved while they run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from veneer_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    replication_pb2,
    replication_pb2_grpc,
)
from veneer_server.access.edit_keys import add_key, revoke_key

from tests.attacks.case import Bug, Target

TITLE = "watches, follows and uploads that go on after their key was revoked"
KEYS = True
BUG = Bug(
    "veneer_server.access.lasting",
    "if call.why is None and (call.principal.until <= now or not _same(call.keys, keys))",
    "if False",
)
LIMIT_S = 10.0
"""Seconds within which a call must end."""


async def attack(target: Target) -> list[str]:
    """Each must end with UNAUTHENTICATED within seconds; calls with other keys continue."""
    wrong: list[str] = []
    until = time.monotonic() + target.seconds
    async with grpc.aio.insecure_channel(target.grpc) as channel:
        adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        replication: Any = replication_pb2_grpc.ReplicationServiceStub(channel)
        while not wrong and time.monotonic() < until:
            made = add_key(
                target.keys_file,
                name="leaver",
                tenant="default",
                roles=["operator"],
                expires=None,
            )
            leaver = (("authorization", f"Bearer {made.key}"),)
            stays = adapters.WatchAdapters(
                adapters_pb2.WatchAdaptersRequest(), metadata=target.metadata("team-b")
            )
            await stays.read()
            calls = {}
            for number in range(target.rng.randint(1, 20)):
                kind = target.rng.choice(("watch", "follow", "upload"))
                if kind == "watch":
                    call = adapters.WatchAdapters(
                        adapters_pb2.WatchAdaptersRequest(), metadata=leaver
                    )
                    await call.read()
                elif kind == "follow":
                    call = replication.Follow(metadata=leaver)
                    start = replication_pb2.FollowStart(follower=f"leaver-{number}")
                    await call.write(replication_pb2.FollowRequest(start=start))
                    await call.read()
                elif "upload" not in calls.values():  # a tenant may have only few uploads
                    written = asyncio.Event()
                    call = adapters.UploadAdapter(_begun(written), metadata=leaver)
                    # grpc.aio tells INTERNAL if a call ends before its first write did.
                    async with asyncio.timeout(LIMIT_S):
                        await written.wait()
                else:
                    continue
                calls[call] = kind
            revoke_key(target.keys_file, made.id)
            ends = asyncio.gather(*(_end(call, kind) for call, kind in calls.items()))
            wrong += [each for each in await ends if each]
            if stays.done():
                wrong.append("a watch of another key has ended too")
            stays.cancel()
    return wrong


async def _begun(written: asyncio.Event) -> AsyncIterator[Any]:
    """Begin an upload whose files never come."""
    spec = adapters_pb2.UploadSpec(name="leaver")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        spec.files.add(name=name, size=1000, sha256="0" * 64)
    yield adapters_pb2.UploadAdapterRequest(spec=spec)
    written.set()
    await asyncio.Event().wait()


async def _end(call: Any, kind: str) -> str:
    """Wait for the end of a call; return what is wrong with it, or ""."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(LIMIT_S):
            while kind != "upload" and await call.read() is not grpc.aio.EOF:
                pass
            code = await call.code()
    except grpc.aio.AioRpcError as error:
        code = error.code()
    except TimeoutError:
        call.cancel()
        return f"a {kind} goes on {time.monotonic() - began:.0f} s after its key was revoked"
    return "" if code is grpc.StatusCode.UNAUTHENTICATED else f"a {kind} ended with {code}"
