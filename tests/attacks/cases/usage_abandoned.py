"""Long prompts whose caller leaves before the first token; their work was not counted."""

from __future__ import annotations

import asyncio
import time

from veneer_proto.v1 import inference_pb2, server_pb2

from tests.attacks.case import Bug, Target
from tests.server_harness import Server

TITLE = "long prompts whose caller leaves before the first token"
KEYS = True
BUG = Bug(
    "veneer_server.engine_client.client",
    "counted[0].prefilled(message.tokens, message.cached_tokens)",
    "pass",
)


async def attack(target: Target) -> list[str]:
    """The tenant's usage counts what was computed, and no more than was requested."""
    callers = [
        Server(None, target.grpc, target.metrics, key=target.keys[key])  # type: ignore[arg-type]
        for key in ("inference-a", "team-a")
    ]
    hog, admin = callers

    async def used() -> int:
        answer = await admin.about.GetUsage(server_pb2.GetUsageRequest())
        return sum(each.prompt_tokens for each in answer.tenants)

    wrong: list[str] = []
    ends = time.monotonic() + target.seconds
    while True:
        before, asked, answered = await used(), 0, False
        for _ in range(3):
            count = target.rng.randint(5500, 8000)
            ids = [target.rng.randrange(1000, 40_000) for _ in range(count)]
            call = hog.inference.Generate(
                inference_pb2.GenerateRequest(
                    token_ids=inference_pb2.TokenIds(ids=ids),
                    stopping=inference_pb2.StoppingOptions(max_tokens=1),
                )
            )
            # Long enough for one chunk of 128 tokens, but not for a dozen chunks.
            done, _ = await asyncio.wait({_ended(call)}, timeout=1 + target.rng.random())
            answered |= bool(done)
            call.cancel()
            asked += count
        grown = await used() - before
        if not answered and not 128 <= grown < asked:
            wrong.append(f"{grown} tokens counted of {asked} asked for by a caller who left")
        if time.monotonic() >= ends or wrong:
            break
    for caller in callers:
        await caller.channel.close()
    return wrong


def _ended(call: object) -> asyncio.Future[object]:
    async def wait() -> object:
        return await call.code()  # type: ignore[attr-defined]

    return asyncio.ensure_future(wait())
