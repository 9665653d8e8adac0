"""Idle connections to every port, which could use up all file descriptors and so prevent a
restart of an engine that ended."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from veneer_server.system.descriptors import raise_limit

from tests.attacks.case import Target

TITLE = "1,100 idle connections to each port"

_IDLE: Final = 1100


async def attack(target: Target) -> list[str]:
    """Meanwhile both HTTP ports must answer, and so must an existing gRPC connection."""
    wrong: list[str] = []
    loop = asyncio.get_running_loop()
    count = min(_IDLE if target.full else 200, (raise_limit(4 * _IDLE) - 100) // 3)
    until = loop.time() + target.seconds
    async with grpc.aio.insecure_channel(target.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest())  # type: ignore[misc]
        while loop.time() < until:
            with ExitStack() as stack:
                for address in (target.metrics, target.openai, target.grpc):
                    _connect(stack, address, count)
                for address, path in ((target.metrics, "/metrics"), (target.openai, "/health")):
                    if (line := await _get(address, path)) != "HTTP/1.1 200 OK":
                        wrong.append(f"{address}{path}: {line!r}")
                try:
                    await health.Check(health_pb2.HealthCheckRequest(), timeout=10)  # type: ignore[misc]
                except grpc.aio.AioRpcError as error:
                    wrong.append(f"a call on an old connection: {error.code().name}")
                await asyncio.sleep(target.rng.uniform(0.5, 2))
    return wrong


def _connect(stack: ExitStack, address: str, count: int) -> None:
    host, port = address.rsplit(":", 1)
    for _ in range(count):
        connection = stack.enter_context(socket.socket())
        connection.setblocking(False)
        connection.connect_ex((host, int(port)))


async def _get(address: str, path: str) -> str:
    """Return the first line of a response, or why there is none."""
    host, port = address.rsplit(":", 1)
    try:
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
            line = (await reader.readline()).decode().strip()
            writer.close()
            return line
    except OSError as error:
        return type(error).__name__
