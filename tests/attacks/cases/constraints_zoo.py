"""All known hostile constraints, concurrently and in random order."""

from __future__ import annotations

import asyncio

from tests.attacks.case import Target
from tests.attacks.constraint_calls import caller, until_the_end
from tests.attacks.hostile_constraints import HOSTILE

TITLE = "nested quantifiers, recursive references, unicode classes, a megabyte and 20 more"


async def attack(target: Target) -> list[str]:
    """Send them over four connections; some answers are long, to compute masks too."""
    async with (
        caller(target.grpc) as first,
        caller(target.grpc) as second,
        caller(target.grpc) as third,
        caller(target.grpc) as fourth,
    ):
        callers = [first, second, third, fourth]

        async def work() -> list[str]:
            chosen = list(HOSTILE.values())
            target.rng.shuffle(chosen)
            return await asyncio.gather(
                *(
                    callers[at % 4].ask(one, tokens=40 if target.full else 8, seed=at)
                    for at, one in enumerate(chosen)
                )
            )

        return await until_the_end(target.seconds, work)
