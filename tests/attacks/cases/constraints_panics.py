"""A regular expression that panics inside the library, over gRPC and HTTP."""

from __future__ import annotations

import asyncio

import aiohttp

from tests.attacks.case import Target
from tests.attacks.constraint_calls import ANSWER_S, caller, until_the_end
from tests.attacks.hostile_constraints import PANICS, Hostile

TITLE = "a regular expression that panics inside the library"


async def attack(target: Target) -> list[str]:
    """Send twenty at once, half of them new to the server."""
    timeout = aiohttp.ClientTimeout(ANSWER_S)
    async with (
        caller(target.grpc) as bad,
        aiohttp.ClientSession(f"http://{target.openai}", timeout=timeout) as session,
    ):

        async def over_http() -> str:
            body = {
                "model": "smollm2-135m",
                "prompt": "A",
                "max_tokens": 2,
                "structured_outputs": {"regex": PANICS.text},
            }
            async with session.post("/v1/completions", json=body) as answer:
                text = await answer.text()
                return "" if answer.status == 400 else f"HTTP {answer.status}: {text[:200]}"

        async def work() -> list[str]:
            new = [
                Hostile("regex", f"{PANICS.text}{target.rng.randrange(10**6)}")
                for _ in range(10 if target.full else 3)
            ]
            calls = [bad.ask(one) for one in [PANICS] * 10 + new]
            return await asyncio.gather(over_http(), *calls)

        return await until_the_end(target.seconds, work)
