"""Requests sent a byte at a time: each byte is work for the server; no request completes."""

from __future__ import annotations

import asyncio
from typing import Final

from tests.attacks.case import Target
from tests.attacks.http2 import Connection, grpc_message

TITLE = "gRPC messages that come a byte a second, in hundreds of streams"
FLAGS = ("--reader-limit", "5")

_METHOD: Final = "/veneer.v1.InferenceService/Generate"


async def attack(target: Target) -> list[str]:
    """The server must end all streams, within its limits."""
    loop = asyncio.get_running_loop()
    until = loop.time() + target.seconds
    connections = [await Connection.open(target.grpc) for _ in range(6)]
    body, wrong = grpc_message(100_000), []

    async def one(connection: Connection) -> None:
        while loop.time() < until and not connection.lost.is_set():
            stream, began = connection.call(_METHOD), loop.time()
            await connection.send(stream, body[:5000], patience_s=1)
            for at in range(5000, len(body)):
                if stream in connection.ended or connection.lost.is_set():
                    break
                if loop.time() - began > 90:
                    wrong.append(f"stream {stream} was open after 90 s")
                    return
                await connection.send(stream, body[at : at + 1], patience_s=1)
                await asyncio.sleep(1)

    streams = 60 if target.full else 10
    await asyncio.gather(*(one(each) for each in connections for _ in range(streams)))
    for connection in connections:
        connection.close()
    return wrong
