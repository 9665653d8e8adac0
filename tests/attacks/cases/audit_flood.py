"""Endless refused calls, to make the audit log forget what others did."""

from __future__ import annotations

import asyncio
from typing import Final

import aiohttp
import grpc

from tests.attacks.case import Bug, Target
from tests.hostile.callers import grpc_outcome

TITLE = "calls without a key, each of which could be a line of the audit log"
KEYS = True
BUG = Bug(
    "veneer_server.access.audit",
    "return _History.REFUSED if taken else None",
    "return _History.REFUSED",
)

_LINES: Final = 300
"""Limit on written lines: more than two hosts' share at once, and other lines meanwhile."""
_METHODS: Final = (
    "/veneer.v1.InferenceService/Generate",
    "/veneer.v1.AdapterService/DeleteAdapter",
    "/veneer.v1.AdapterService/ListAdapters",
    "/veneer.v1.ServerService/GetServerInfo",
)
_PATHS: Final = (
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/v1/load_lora_adapter",
)


async def attack(target: Target) -> list[str]:
    """Every call is refused; few are written to the log, and the others are counted."""
    wrong: list[str] = []
    sent = 0
    ends = asyncio.get_running_loop().time() + target.seconds
    operator = dict(target.metadata("operator"))
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        grpc.aio.insecure_channel(target.grpc) as channel,
    ):

        async def lines(kind: str) -> int:
            url = f"http://{target.metrics}/metrics"
            async with session.get(url, headers=operator) as answer:
                page = await answer.text()
            name = f"veneer_audit_lines_{kind}_total "
            (line,) = [each for each in page.splitlines() if each.startswith(name)]
            return int(float(line.removeprefix(name)))

        async def over_grpc() -> None:
            nonlocal sent
            while asyncio.get_running_loop().time() < ends:
                said = await grpc_outcome(channel, target.rng.choice(_METHODS), [b""])
                sent += 1
                if not said.startswith("UNAUTHENTICATED"):
                    wrong.append(f"gRPC: {said}")

        async def over_http() -> None:
            nonlocal sent
            headers = {"authorization": f"Bearer vn_{target.rng.randrange(10**8)}_x"}
            while asyncio.get_running_loop().time() < ends:
                url = f"http://{target.openai}{target.rng.choice(_PATHS)}"
                async with session.post(url, json={}, headers=headers) as answer:
                    sent += 1
                    if answer.status != 401:
                        wrong.append(f"HTTP: {answer.status}")

        before = await lines("written"), await lines("left_out")
        await asyncio.gather(*(each() for _ in range(150) for each in (over_grpc, over_http)))
        for _ in range(50):  # a separate thread writes them
            written = await lines("written") - before[0]
            left_out = await lines("left_out") - before[1]
            if written + left_out >= sent:
                break
            await asyncio.sleep(0.1)
    if written > _LINES:
        wrong.append(f"{written} lines for {sent} refusals")
    if written + left_out < sent:
        wrong.append(f"{sent} refusals, {written} written and {left_out} counted")
    return wrong[:20]
