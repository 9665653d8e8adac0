"""Interrupted uploads, forty of which could hold 800 MB of disk for a day."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import adapters_pb2_grpc

from tests.attacks.case import Target

TITLE = "forty uploads of 20 MB that break off"
FLAGS = ("--max-broken-uploads", "4")

_MIB: Final = 1 << 20
_CONFIG: Final = b"{}"


async def attack(target: Target) -> list[str]:
    """Break off uploads; afterwards at most four of them can be resumed."""
    count, chunks = (40, 20) if target.full else (10, 2)
    async with grpc.aio.insecure_channel(target.grpc) as channel:
        stub: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        for n in range(count):
            await _break_off(stub, _spec(n, chunks), chunks)
        for _ in range(100):
            kept = [n for n in range(count) if await _received(stub, _spec(n, chunks))]
            if len(kept) <= 4:
                return []
            await asyncio.sleep(0.1)
    return [f"{len(kept)} broken uploads are kept, not 4"]


async def _break_off(stub: Any, spec: pb.UploadSpec, chunks: int) -> None:
    sent = asyncio.Event()

    async def messages() -> AsyncIterator[pb.UploadAdapterRequest]:
        yield pb.UploadAdapterRequest(spec=spec)
        chunk = pb.UploadChunk(file="adapter_config.json", data=_CONFIG)
        yield pb.UploadAdapterRequest(chunk=chunk)
        for at in range(chunks):
            chunk = pb.UploadChunk(
                file="adapter_model.safetensors", offset=at * _MIB, data=bytes(_MIB)
            )
            yield pb.UploadAdapterRequest(chunk=chunk)
        sent.set()
        await asyncio.Event().wait()

    call = stub.UploadAdapter(messages())
    await sent.wait()
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        await call


async def _received(stub: Any, spec: pb.UploadSpec) -> int:
    answer = await stub.GetUpload(pb.GetUploadRequest(spec=spec))
    return sum(answer.committed.values())


def _spec(n: int, chunks: int) -> pb.UploadSpec:
    return pb.UploadSpec(
        name=f"broken-{n}",
        resume=True,
        files=[
            pb.UploadFile(
                name="adapter_config.json",
                size=len(_CONFIG),
                sha256=hashlib.sha256(_CONFIG).hexdigest(),
            ),
            pb.UploadFile(
                name="adapter_model.safetensors", size=(chunks + 1) * _MIB, sha256=f"{n:064x}"
            ),
        ],
    )
