"""gRPC connections whose calls never arrive or only wait; health checks need no key."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.attacks.case import Bug, Target
from tests.attacks.http2 import Connection, grpc_message

TITLE = "half-sent and silent gRPC calls on more connections than there may be"
FLAGS = ("--max-connections", "64")
BUG = Bug(
    "veneer_server.rpc.transport.connections",
    "if known.whole > known.watching:",
    "if known.calls:",
)

_CHECK, _WATCH = (f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch"))
_HALF_HEADERS = b"\0\0\1\1\0\0\0\0\1\x83"
"""A HEADERS frame that should be followed by a CONTINUATION frame."""
_EACH = 20
_ROUNDS = 16
"""Minimum number of rounds, however slow the machine is. Half of their connections watch, and
hold a place if a watch counts as a call; and gRPC accepts 64 connections more than the limit.
Half-sent messages do not show the bug for long, because they lose their turn to be read."""
_SHAPES = (0, 1, 2, 4, 5, 6, *(3,) * 6)
_KEPT = 400


async def _half(target: Target) -> Connection | None:
    """Open a connection and send a random part of a call; return None if it was refused."""
    host, port = target.grpc.rsplit(":", 1)
    local = (f"127.0.0.{target.rng.randrange(2, 12)}", 0)
    shape = target.rng.choice(_SHAPES)
    with contextlib.suppress(OSError, TimeoutError):
        opened = await asyncio.open_connection(host, int(port), local_addr=local)
        connection = Connection(*opened)
        if shape == 0:
            return connection
        async with asyncio.timeout(5):
            await connection.begin()
        if shape == 1:
            opened[1].write(_HALF_HEADERS)
        elif shape == 2:
            connection.ping(target.rng.randrange(1, 100))
        elif shape > 2:
            stream = connection.call(_WATCH if shape == 3 else _CHECK)
            size = target.rng.randrange(1, 4 << 20)
            data = grpc_message(0, whole=True) if shape == 3 else grpc_message(size)
            if shape < 6:
                await connection.send(stream, data[:1000], patience_s=0.1)
        return connection
    return None


async def attack(target: Target) -> list[str]:
    """Open some 100 connections a second. New clients must be answered, and an open connection
    must stay open."""
    loop, wrong = asyncio.get_running_loop(), []
    until = loop.time() + target.seconds
    held: list[Connection] = []
    request = health_pb2.HealthCheckRequest()
    own = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(target.grpc, options=own) as kept:
        old = health_pb2_grpc.HealthStub(kept)
        await old.Check(request, timeout=10)  # type: ignore[misc]
        rounds = 0
        while (loop.time() < until or rounds < _ROUNDS) and len(wrong) < 3:
            rounds += 1
            found = await asyncio.gather(*(_half(target) for _ in range(_EACH)))
            held += (each for each in found if each is not None)
            for each in held[:-_KEPT]:
                each.close()
            del held[:-_KEPT]
            for name, channel in (("new", None), ("old", kept)):
                try:
                    if channel is not None:
                        await old.Check(request, timeout=20)  # type: ignore[misc]
                        continue
                    async with grpc.aio.insecure_channel(target.grpc, options=own) as new:
                        stub = health_pb2_grpc.HealthStub(new)
                        await stub.Check(request, timeout=20)  # type: ignore[misc]
                except grpc.aio.AioRpcError as error:
                    wrong.append(f"{name}: {error.code().name}: {error.details()}")
            await asyncio.sleep(target.rng.uniform(0.05, 0.2))
    for each in held:
        each.close()
    return wrong
