"""Scrapers that request the metrics page and do not read it."""

from __future__ import annotations

import asyncio
import contextlib
import time

import aiohttp

from tests.attacks.case import Target

TITLE = "hundreds of scrapes whose answers nobody reads"
COUNT = 200


async def attack(target: Target) -> list[str]:
    """Prometheus itself must be answered meanwhile."""
    host, port = target.metrics.rsplit(":", 1)
    wrong: list[str] = []
    ends = time.monotonic() + target.seconds
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < ends:
            writers = []
            for _ in range(COUNT):
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection(host, int(port), limit=1)
                    writer.transport.pause_reading()
                    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    writers.append(writer)
            try:
                async with asyncio.timeout(20):
                    async with session.get(f"http://{target.metrics}/metrics") as answer:
                        page = await answer.text()
                if "veneer_" not in page:
                    wrong.append(f"the page of {len(page)} bytes has no metrics")
            except (aiohttp.ClientError, TimeoutError) as error:
                wrong.append(f"Prometheus is not answered: {error!r}")
            for writer in writers:
                writer.transport.abort()
    return wrong
