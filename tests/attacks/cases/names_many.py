"""Ever new names that do not exist, each of which could become a metric series."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import grpc
from veneer_proto.v1 import inference_pb2

from tests.attacks.case import Target
from tests.hostile.callers import grpc_outcome

TITLE = "thousands of adapters, paths and methods that do not exist"
GENERATE = "/veneer.v1.InferenceService/Generate"
PAGE_GROWTH = 16 << 10


async def attack(target: Target) -> list[str]:
    """Each call is refused, and the metrics page does not grow."""
    wrong: list[str] = []
    at = 0
    async with (
        aiohttp.ClientSession() as session,
        grpc.aio.insecure_channel(target.grpc) as channel,
    ):

        async def page() -> int:
            async with session.get(f"http://{target.metrics}/metrics") as answer:
                return len(await answer.read())

        async def one(name: str) -> None:
            request = inference_pb2.GenerateRequest(prompt="a", adapter=name)
            said = [
                await grpc_outcome(channel, GENERATE, [request.SerializeToString()]),
                await grpc_outcome(channel, f"/veneer.v1.{name}/{name}", [b""]),
            ]
            if said != ["NOT_FOUND ADAPTER_NOT_FOUND", "UNIMPLEMENTED"]:
                wrong.append(f"{name}: {said}")
            async with session.get(f"http://{target.openai}/{name}") as answer:
                if answer.status != 404:
                    wrong.append(f"/{name}: {answer.status}")

        before = await page()
        ends = time.monotonic() + target.seconds
        while time.monotonic() < ends:
            await asyncio.gather(*(one(f"no-such-{at + n}") for n in range(20)))
            at += 20
        if (grown := await page() - before) > PAGE_GROWTH:
            wrong.append(f"the metrics page grew by {grown} bytes after {at} names")
    return wrong
