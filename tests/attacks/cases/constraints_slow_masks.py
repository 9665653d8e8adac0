"""Constraints that compile in a millisecond and take 100 ms to compute a token mask."""

from __future__ import annotations

import asyncio

from tests.attacks.case import Target
from tests.attacks.constraint_calls import caller, until_the_end
from tests.attacks.hostile_constraints import SLOW_MASK, Hostile

TITLE = "60 requests whose every mask takes 100 ms"


async def attack(target: Target) -> list[str]:
    """Send 60 calls with the same constraint, then 60 with different ones."""
    async with caller(target.grpc) as bad:

        async def work() -> list[str]:
            same = await asyncio.gather(*(bad.ask(SLOW_MASK) for _ in range(60)))
            other = [
                Hostile("regex", f"(({target.rng.choice('abcdefgh')}{{{n}}}){{100}}){{100}}")
                for n in target.rng.sample(range(60, 120), 60)
            ]
            chosen = other if target.full else other[:3]
            return same + await asyncio.gather(*(bad.ask(one) for one in chosen))

        return await until_the_end(target.seconds, work)
