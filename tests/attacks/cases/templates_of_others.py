"""Chats that make a template look too slow: a chat of 4,096 system messages switched DeepSeek
V3's public template off for everybody, forever."""

from __future__ import annotations

import asyncio
import contextlib

from tests.attacks.accumulating import ACCUMULATING, Chatter, chat, hostile
from tests.attacks.case import Bug, Target

TITLE = "chats that a public template renders in quadratic time, and others' chats with it"
KEYS = True
LOADS = 60 << 20
"""Bytes: the two processes that render adapters' templates start during the attack."""
BUG = Bug("veneer_server.queues.fairness", "return self[:3]", 'return ("", "", "")')

NAME = "deepseek-like"
REFUSED = ("TEMPLATE_FAILED", "QUEUE_FULL", "RATE_LIMIT_EXCEEDED")


async def attack(target: Target) -> list[str]:
    """Other callers' chats with the template, even large ones, must be answered after slow
    chats and beside them. So must the attacker's own small chats, even after a new push."""
    wrong: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        bad, mate, other = [
            await stack.enter_async_context(Chatter.of(target, key))
            for key in ("team-a", "inference-a", "team-b")
        ]
        template = ACCUMULATING + f"{{# {target.rng.random()} #}}"
        await bad.push(NAME, template)
        await other.push(NAME, template)

        async def slow() -> None:
            if (said := await bad.says(NAME, hostile(target.rng))) not in REFUSED:
                wrong.append(f"a slow chat: {said}")

        async def good() -> None:
            small = chat(["Hi there"] * target.rng.randint(1, 20))
            # As large as a slow chat, but no system messages: too long only for the context.
            large = chat(["x" * 900] * 4096)
            for who, caller in (("its own", bad), ("its tenant's", mate), ("another", other)):
                if (said := await caller.says(NAME, small)) != "OK":
                    wrong.append(f"a small chat, {who}: {said}")
            if (said := await other.says(NAME, large)) != "CONTEXT_TOO_LONG":
                wrong.append(f"a large chat of another: {said}")

        loop = asyncio.get_running_loop()
        until = loop.time() + target.seconds
        await slow()
        await good()
        # Rendering takes long at low priority, so do not wait for these at the end.
        beside = [asyncio.create_task(slow()) for _ in range(2)]
        while True:
            await good()
            await bad.push(NAME, template)
            if loop.time() >= until:
                break
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    return wrong[:20]
