"""Long texts to tokenize, from a hundred connections with one key: they were tokenized one
after the other, and another tenant's text waited for all of them."""

from __future__ import annotations

import asyncio
import json
from typing import Final

from tests.attacks.case import Bug, Target
from tests.attacks.cases.templates_of_base import post
from tests.hostile.callers import http_answer

TITLE = "long texts to tokenize, from a hundred connections of one key"
KEYS = True
FLAGS = ("--max-connections", "512")
LOADS = 100 * 450_000
"""Bytes of the bodies that wait for their turn."""
BUG = Bug(
    "veneer_server.access.caller",
    'return Sender(principal.tenant, key, user, "" if user else self.peer)',
    'return Sender("", "", "", "")',
)

_CONNECTIONS: Final = 100
_OVERTAKEN: Final = 85
"""Maximum number of them tokenized while another tenant's text waits; without turns, all are.
The attacker has the lowest priority, so a while passes before that text is sent."""


async def attack(target: Target) -> list[str]:
    """Another tenant's long text is tokenized after only a few of them."""
    wrong: list[str] = []
    ended = 0

    async def tokenize(key: str, size: int) -> None:
        words = " ".join(target.rng.choices(["some", "words", "more", "\n"], k=500))
        text = (words * (size // len(words) + 1))[:size]
        body = json.dumps({"model": "smollm2-135m", "prompt": text}).encode()
        request = post(body, "/tokenize", dict(target.metadata(key)))
        status, answer = await http_answer(target.openai, request)
        if status not in (200, 400, 429):  # longer than the context: 400
            wrong.append(f"{status} {answer[-200:]!r}")

    async def bad() -> None:
        nonlocal ended
        await tokenize("team-a", target.rng.randint(300_000, 600_000))
        ended += 1

    until = asyncio.get_running_loop().time() + target.seconds
    while True:
        tasks = [asyncio.create_task(bad()) for _ in range(_CONNECTIONS)]
        before = ended
        while ended < before + 3 and not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=0.02)  # until they are waiting
        before = ended
        await tokenize("team-b", target.rng.randint(80_000, 200_000))
        if ended - before > _OVERTAKEN:
            wrong.append(f"{ended - before} texts were tokenized before another tenant's")
        await asyncio.gather(*tasks)
        if asyncio.get_running_loop().time() >= until:
            return wrong[:20]
