"""Completions of many prompts with many samples, which took all places of the queue until they
ended."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp

from tests.attacks.case import Bug, Target

TITLE = "completions of many prompts with many samples each"
FLAGS = ("--max-running", "6", "--max-queue", "26")
KEYS = True
WAITS = 10
"""Somebody else's answer starts when one of six running sequences ends: none is preempted, and
each gets at most ten tokens."""
BUG = Bug(
    "veneer_server.engine_client.places",
    'whose = whose or Fairness("")',
    'whose, at_once = whose or Fairness(""), count',
)

PLACES = 32
"""Places that the flags allow."""


async def attack(target: Target) -> list[str]:
    """One tenant's completions are all answered in full, and another tenant's requests are
    never refused."""
    wrong: list[str] = []
    ends = time.monotonic() + target.seconds
    url = f"http://{target.openai}/v1/completions"
    asking = asyncio.Event()

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:

        async def post(key: str, **body: Any) -> tuple[int, Any]:
            headers = dict(target.metadata(key))
            body |= {"model": "smollm2-135m", "ignore_eos": True}
            async with session.post(url, json=body, headers=headers) as answer:
                return answer.status, await answer.json()

        async def hog() -> None:
            while time.monotonic() < ends:
                # Often such that one call alone would take every place.
                n = target.rng.choice((2, 4, 8, 16, target.rng.randint(2, 16)))
                total = target.rng.choice((PLACES, target.rng.randint(20, PLACES)))
                prompts = [
                    [
                        target.rng.randrange(1000, 40_000)
                        for _ in range(target.rng.randint(1, 8))
                    ]
                    for _ in range(max(2, total // n))
                ]
                asking.set()
                new = target.rng.randint(4, 10)
                status, said = await post("inference-a", prompt=prompts, n=n, max_tokens=new)
                if status == 429:  # another of its own runs; it may wait for its share
                    await asyncio.sleep(0.1)
                    continue
                indexes = [choice["index"] for choice in said.get("choices", ())]
                if status != 200 or indexes != list(range(len(prompts) * n)):
                    wrong.append(f"{len(prompts)} prompts x {n}: {status} {str(said)[:200]}")
                elif said["usage"]["completion_tokens"] != new * len(indexes):
                    wrong.append(f"{len(prompts)} prompts x {n}: {said['usage']}")

        async def light() -> None:
            await asking.wait()
            while time.monotonic() < ends:
                status, said = await post("inference-b", prompt="Hello", max_tokens=2)
                if status != 200:
                    wrong.append(f"another tenant: {status} {str(said)[:200]}")
                await asyncio.sleep(0.05)

        await asyncio.gather(hog(), hog(), light())
    return wrong
