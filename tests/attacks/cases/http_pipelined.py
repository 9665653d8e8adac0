"""Pipelined requests on a connection whose responses nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import time

from tests.attacks.case import Target

TITLE = "pipelined requests, without reading an answer"
CONNECTIONS = 4
REQUESTS = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000


async def attack(target: Target) -> list[str]:
    """The server must not generate responses that it cannot send."""
    ends = time.monotonic() + target.seconds

    async def one() -> None:
        host, port = target.openai.rsplit(":", 1)
        # Read as little as possible: only what fits in the socket's buffers.
        _, writer = await asyncio.open_connection(host, int(port), limit=1)
        writer.transport.pause_reading()
        with contextlib.suppress(ConnectionError, TimeoutError):
            while (left := ends - time.monotonic()) > 0:
                writer.write(REQUESTS)
                async with asyncio.timeout(left):
                    await writer.drain()
        writer.transport.abort()

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
    return []
