"""Constraints that take a second to compile, from 150 connections with one key: another
tenant's constraint waited for 98 s."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import grpc

from tests.attacks.case import Bug, Target
from tests.attacks.constraint_calls import Caller
from tests.attacks.hostile_constraints import Hostile

TITLE = "slow constraints from 150 connections of one key"
KEYS = True
FLAGS = ("--max-queue", "400", "--max-connections", "512")
BUG = Bug(
    "veneer_server.access.caller",
    'return Sender(principal.tenant, key, user, "" if user else self.peer)',
    'return Sender("", "", "", self.peer)',
)

_CONNECTIONS: Final = 150
_OVERTAKEN: Final = 40
"""Maximum number of slow constraints that may be tried while another tenant's constraint waits.
If each connection had its own turn, all would be tried."""


def _slow(target: Target) -> Hostile:
    """Make a constraint that compiles to a hundred million states; no two are the same."""
    number = target.rng.randrange(90_000_000, 100_000_000)
    return Hostile("json_schema", f'{{"type": "integer", "multipleOf": {number * 2 + 1}}}')


async def attack(target: Target) -> list[str]:
    """Another tenant's constraint is compiled after only a few of the slow ones."""
    wrong: list[str] = []
    async with contextlib.AsyncExitStack() as stack:

        async def caller(key: str) -> Caller:
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = grpc.aio.insecure_channel(target.grpc, options=options)
            return Caller(await stack.enter_async_context(channel), target.metadata(key))

        bad = [await caller("inference-a") for _ in range(_CONNECTIONS)]
        good, ended = await caller("inference-b"), 0

        async def slow(each: Caller) -> None:
            nonlocal ended
            wrong.append(await each.ask(_slow(target)))
            ended += 1

        tasks = [asyncio.create_task(slow(each)) for each in bad]
        while ended < 2 and not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=0.1)  # until all of them have arrived
        until = asyncio.get_running_loop().time() + target.seconds
        while True:
            before = ended
            small = Hostile("regex", f"[a-z]{{{target.rng.randrange(1, 10_000)}}}")
            wrong.append(await good.ask(small))
            if ended - before > _OVERTAKEN:
                wrong.append(f"{ended - before} slow constraints were tried before a quick one")
            if asyncio.get_running_loop().time() >= until:
                break
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [each for each in wrong if each][:20]
