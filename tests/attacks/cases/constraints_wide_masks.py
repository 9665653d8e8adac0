"""Constraints within all limits that still cost several milliseconds per token."""

from __future__ import annotations

import asyncio
import json

from tests.attacks.case import Target
from tests.attacks.constraint_calls import caller, until_the_end
from tests.attacks.hostile_constraints import Hostile

TITLE = "long answers whose masks take milliseconds each, within every limit"


def _wide(mark: int) -> Hostile:
    options = [
        {"type": "object", "properties": {f"a{i}x{mark}": {"type": "string"}, "b": {}}}
        for i in range(120)
    ]
    return Hostile("json_schema", json.dumps({"anyOf": options}, separators=(",", ":")))


async def attack(target: Target) -> list[str]:
    """Send four at a time: more would slow the streams as any requests would."""
    async with caller(target.grpc) as bad:

        async def work() -> list[str]:
            few = [_wide(target.rng.randrange(10**4)) for _ in range(4)]
            rounds = 5 if target.full else 1
            problems = []
            for seed in range(rounds):
                problems += await asyncio.gather(
                    *(bad.ask(one, tokens=30, seed=seed) for one in few)
                )
            return problems

        return await until_the_end(target.seconds, work)
