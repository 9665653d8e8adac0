"""Measure how long a request still holds resources after its end, by its phase.

Part of ``python -m tests.torture.cancels``. One request at a time is cancelled, or runs
into its deadline, while it is queued, waits for its adapter, prefills or decodes; then
metrics and adapter list are read until they show no trace of it.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import grpc
from veneer_proto.v1 import adapters_pb2

from tests.server_harness import Server, request

ENDLESS = {"max_tokens": 7000, "ignore_eos": True}
LONG_PROMPT = 1000
"""Number of tokens that take over a second to prefill and still fit the context with the
output."""
LOOK_EVERY_S = 0.005
"""Seconds between polls; polling without a pause would take a core from the server."""


class Phase(Enum):
    """The phase of a request when it is ended."""

    QUEUED = "waiting for a place"
    WANTING = "waiting for room for its adapter"
    PREFILLING = "prefilling"
    DECODING = "decoding"


@dataclass(frozen=True, slots=True)
class Freed:
    """Seconds from each end, as seen by the caller, to the first poll without a trace of it.

    Attributes:
        step_s: mean seconds of a step meanwhile, of the slowest kind of step.
    """

    phase: Phase
    by: str
    waits_s: tuple[float, ...]
    step_s: float

    def __str__(self) -> str:
        ms = [1000 * s for s in self.waits_s]
        return (
            f"{self.by} while {self.phase.value}: free after {statistics.median(ms):.0f} ms "
            f"(median), {max(ms):.0f} ms (worst of {len(ms)}), looking included; "
            f"a step takes {1000 * self.step_s:.0f} ms"
        )


async def measure(
    server: Server, phase: Phase, *, deadline: bool, probes: int, names: list[str], seed: int
) -> Freed:
    """End ``probes`` requests in ``phase``, one after another.

    Args:
        names: two adapters, only one of which fits the device budget.
    """
    generator = random.Random(seed)
    async with _beside(server, phase, names[1]) as others:
        before = await _steps(server)
        waits = []
        for _ in range(probes):
            await _free(server, others, names[0])
            waits.append(await _probe(server, phase, others, names[0], deadline, generator))
        after = await _steps(server)
    means = []
    for kind, (total, count) in after.items():
        total_before, count_before = before.get(kind, (0.0, 0.0))
        if count > count_before:
            means.append((total - total_before) / (count - count_before))
    return Freed(phase, "deadline" if deadline else "cancel", tuple(waits), max(means))


@asynccontextmanager
async def _beside(server: Server, phase: Phase, name: str) -> AsyncIterator[int]:
    """Run streams that keep a request in its phase; yield their number."""
    wanted = {Phase.QUEUED: [""] * 8, Phase.WANTING: [name]}.get(phase, [])
    async with AsyncExitStack() as stack:
        for adapter in wanted:
            stream = server.stream(prompt="Go", adapter=adapter, stopping=ENDLESS)
            stack.callback(stream.call.cancel)
            await stream.first()
        yield len(wanted)


async def _probe(
    server: Server,
    phase: Phase,
    others: int,
    name: str,
    deadline: bool,
    generator: random.Random,
) -> float:
    length = LONG_PROMPT if phase is Phase.PREFILLING else 10
    asked = request(
        token_ids=[generator.randrange(100, 40_000) for _ in range(length)],
        adapter=name,
        stopping=ENDLESS,
    )
    limit = generator.uniform(0.2, 0.6) if deadline else None
    call = server.inference.GenerateStream(asked, timeout=limit)
    messages = aiter(call)
    if deadline:
        try:
            async for _ in messages:
                pass
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        began = time.perf_counter()
    else:
        if phase is Phase.DECODING:
            for _ in range(generator.randint(1, 8)):
                await anext(messages)
        else:
            reached = [others + 1, 0] if phase is Phase.PREFILLING else [others, 1]
            while (await _gauges(server))[:2] != reached:
                assert not call.done(), await call.details()
                await asyncio.sleep(LOOK_EVERY_S)
        began = time.perf_counter()
        call.cancel()
    await _free(server, others, name)
    return time.perf_counter() - began


async def _free(server: Server, others: int, name: str) -> None:
    """Wait until only the other streams hold places, queue entries, leases and KV blocks."""
    while True:
        running, waiting, used = await _gauges(server)
        free = running == others and not waiting and (others or not used)
        if free and not await _leases(server, name):
            return
        await asyncio.sleep(LOOK_EVERY_S)


async def _gauges(server: Server) -> list[float]:
    """Return the numbers of running and waiting requests, and the share of KV blocks in use."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")
    return [found[""] for found in await server.scrape(*(f"veneer_{name}" for name in names))]


async def _leases(server: Server, name: str) -> int:
    found: Any = await server.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=name))
    return int(found.adapter.leases)


async def _steps(server: Server) -> dict[str, tuple[float, float]]:
    """Return the seconds and number of steps so far, by kind."""
    seconds, counts = await server.scrape(
        "veneer_step_seconds_sum", "veneer_step_seconds_count"
    )
    return {kind: (seconds[kind], counts[kind]) for kind in seconds}
