"""Measure the limits of the load generator: ``python -m tests.bench.generator``.

It sends to the FAKE fast server, on the same cores, a thousand requests per second over gRPC
and over HTTP, counted on both sides. It also shows a one-second stall of the server as measured
by an open loop, which counts from the time a request was due, and by a closed loop.
"""

from __future__ import annotations

import asyncio

import numpy as np
from veneer_loadtest.load.generator import LoadOutcome, generate
from veneer_loadtest.load.spec import AdapterMix, Arrivals, Closed, Lengths, LoadSpec, Open
from veneer_loadtest.load.targets import OpenAiSpec, TargetSpec, VeneerSpec

from tests.fakes.fast_target import FastTarget

SECONDS = 20.0
STALL = "2:1"


def load(arrivals: Arrivals, seconds: float) -> LoadSpec:
    return LoadSpec(
        adapters=("a", "b"),
        arrivals=arrivals,
        popularity=AdapterMix("uniform"),
        prompt_tokens=Lengths(16, 64),
        tokens=Lengths(4, 4),
        duration_s=seconds,
        warmup_s=0.0,
        requests=0,
        cancel_share=0.0,
        seed=1,
        vocab=49152,
    )


async def send(spec: LoadSpec, target: TargetSpec, workers: int) -> LoadOutcome:
    return await generate(spec, target, workers=workers, timeout_s=60.0, stop=asyncio.Event())


def quantiles(values: list[float]) -> str:
    p50, p99, longest = np.quantile(values, [0.5, 0.99, 1.0]) * 1e3
    return f"p50 {p50:.1f}, p99 {p99:.1f}, longest {longest:.0f} ms"


async def thousand(api: str) -> None:
    with FastTarget() as server:
        target: TargetSpec = VeneerSpec(server.grpc)
        if api == "HTTP":
            target = OpenAiSpec(f"http://{server.http}")
        loaded = await send(load(Open(1000.0), SECONDS), target, workers=2)
    records, counts = loaded.records, server.counts
    print(f"{api}, 1,000 requests/s for {SECONDS:g} s, 2 workers")
    sent, ok = sum(loaded.sent.values()), sum(r.outcome == "ok" for r in records)
    print(f"  sent {sent}, server counted {counts['requests']}, ended well {ok}", end="")
    print(f", lost {loaded.lost}")
    print(f"  tokens {sum(r.tokens for r in records)}, server counted {counts['tokens']}")
    print(f"  sent late: {quantiles([r.sent_s - r.due_s for r in records])}")
    print(f"  generator's CPU: {loaded.cpu_s / loaded.wall_s:.2f} cores")


async def stalled(name: str, arrivals: Arrivals) -> None:
    with FastTarget(stall=STALL) as server:
        loaded = await send(load(arrivals, 10.0), VeneerSpec(server.grpc), workers=1)
    first = [r.first_token_s for r in loaded.records if r.first_token_s is not None]
    slow = sum(value > 0.1 for value in first)
    print(f"{name}: {len(first)} requests, {slow} above 100 ms; first token {quantiles(first)}")


async def main() -> None:
    for api in ("gRPC", "HTTP"):
        await thousand(api)
    print(f"a server that answers nobody for one second ({STALL})")
    await stalled("  open loop, 100 requests/s", Open(100.0))
    await stalled("  closed loop, 1 stream", Closed(1))


if __name__ == "__main__":
    asyncio.run(main())
