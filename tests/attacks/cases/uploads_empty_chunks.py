"""Uploads that send no data; eight of them could block all other uploads forever."""

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

TITLE = "eight uploads with an empty chunk every 5 s"

_SIZE: Final = 100_000_000
_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
_REFUSED: Final = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED)


async def attack(target: Target) -> list[str]:
    """A normal client (here: one whose files are refused at once) gets a place within a minute,
    however many uploads hold one."""
    async with grpc.aio.insecure_channel(target.grpc) as channel:
        stub: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        holders = [asyncio.create_task(_hold(stub, n, target)) for n in range(8)]
        await asyncio.sleep(1)
        wrong = await _honest(stub)
        for holder in holders:
            holder.cancel()
        await asyncio.gather(*holders, return_exceptions=True)
    return wrong


async def _hold(stub: Any, n: int, target: Target) -> None:
    async def messages() -> AsyncIterator[pb.UploadAdapterRequest]:
        yield _announce(f"held-{n}", _SIZE, f"{n:064x}")
        until = asyncio.get_running_loop().time() + target.seconds
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(target.rng.uniform(3, 5))
            chunk = pb.UploadChunk(file=_FILES[1], offset=0)
            yield pb.UploadAdapterRequest(chunk=chunk)

    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.UploadAdapter(messages())
        await asyncio.sleep(0.5)


async def _honest(stub: Any) -> list[str]:
    sha256 = hashlib.sha256(b"{}").hexdigest()

    def messages() -> list[pb.UploadAdapterRequest]:
        return [
            _announce("honest", 2, sha256),
            *(
                pb.UploadAdapterRequest(chunk=pb.UploadChunk(file=name, data=b"{}"))
                for name in _FILES
            ),
        ]

    until = asyncio.get_running_loop().time() + 60
    while asyncio.get_running_loop().time() < until:
        try:
            await stub.UploadAdapter(messages())
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                return []  # it got a place: its files are not an adapter
            if error.code() not in _REFUSED:
                return [f"an honest upload: {error.code().name} {error.details()}"]
        await asyncio.sleep(0.5)
    return ["an honest upload got no place within a minute"]


def _announce(name: str, size: int, sha256: str) -> pb.UploadAdapterRequest:
    files = [
        pb.UploadFile(name=_FILES[0], size=2, sha256=hashlib.sha256(b"{}").hexdigest()),
        pb.UploadFile(name=_FILES[1], size=size, sha256=sha256),
    ]
    return pb.UploadAdapterRequest(spec=pb.UploadSpec(name=name, files=files))
