"""Requests that are never sent completely, on few connections; they would hold 1.4 GB."""

from __future__ import annotations

import asyncio
from typing import Final

from tests.attacks.case import Target
from tests.attacks.http2 import Connection, grpc_message

TITLE = "half-sent gRPC messages of 4 MB on six connections"
FLAGS = ("--reader-limit", "5")

_METHODS: Final = (
    "/veneer.v1.InferenceService/Generate",
    "/veneer.v1.InferenceService/GenerateStream",
    "/veneer.v1.AdapterService/ListAdapters",
    "/grpc.health.v1.Health/Check",
)
_SIZE: Final = (4 << 20) - 64


async def attack(target: Target) -> list[str]:
    """The server must end each stream, and answer none as if it were complete."""
    until = asyncio.get_running_loop().time() + target.seconds
    connections = [await Connection.open(target.grpc) for _ in range(6)]
    streams = 60 if target.full else 10
    body, wrong = grpc_message(_SIZE), []

    async def one(connection: Connection) -> None:
        while asyncio.get_running_loop().time() < until and not connection.lost.is_set():
            stream = connection.call(target.rng.choice(_METHODS))
            await connection.send(stream, body, patience_s=1)
            try:
                async with asyncio.timeout(60):
                    await connection.until_ended(stream)
            except TimeoutError:
                wrong.append(f"stream {stream} was open after 60 s")
                return

    await asyncio.gather(*(one(each) for each in connections for _ in range(streams)))
    for connection in connections:
        connection.close()
    return wrong
