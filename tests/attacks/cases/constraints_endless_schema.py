"""A 40-byte schema whose compilation takes unbounded memory, and similar ones."""

from __future__ import annotations

import asyncio

from tests.attacks.case import Target
from tests.attacks.constraint_calls import caller, until_the_end
from tests.attacks.hostile_constraints import Hostile

TITLE = "schemas whose automata have a hundred million states"


async def attack(target: Target) -> list[str]:
    """Send several at once, each new, since a known schema is refused without compiling it."""
    async with caller(target.grpc) as bad:

        async def work() -> list[str]:
            numbers = [target.rng.randrange(50_000_001, 99_999_989, 2) for _ in range(4)]
            schemas = [f'{{"type":"integer","multipleOf":{n}}}' for n in numbers]
            return await asyncio.gather(*(bad.ask(Hostile("json_schema", s)) for s in schemas))

        return await until_the_end(target.seconds, work)
