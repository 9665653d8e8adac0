"""End requests early, at random phases and in three ways, and check what they leave behind.

``python -m tests.torture.cancels --count 1000 --seed 7`` runs the full form against a
new server and prints figures; a quick form is in ``tests/integration``.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

import grpc
from veneer_proto.v1 import adapters_pb2, inference_pb2_grpc, server_pb2

from tests import seeds
from tests.places import cache_dir
from tests.server_harness import Server, request, running_server
from tests.torture.freeing import Phase, measure

AT_ONCE = 24


class How(Enum):
    """What ends a request."""

    CANCEL = "cancel"
    DEADLINE = "deadline"
    DISCONNECT = "disconnect"


class When(Enum):
    """The phase of a request when it is ended."""

    EARLY = "queued, waiting for its adapter, or prefilling"
    FIRST = "first token"
    DECODING = "decoding"
    LAST = "last token"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request and its end.

    Attributes:
        pause_s: pause before an early end; for a deadline, the whole deadline.
        tokens: number of requested new tokens.
    """

    how: How
    when: When
    adapter: str
    prompt: tuple[int, ...]
    tokens: int
    pause_s: float

    @classmethod
    def random(cls, generator: random.Random, adapters: list[str]) -> Attempt:
        long = generator.random() < 0.3
        return cls(
            how=generator.choice(list(How)),
            when=generator.choice(list(When)),
            adapter=generator.choice([*adapters, ""]),
            prompt=tuple(generator.randrange(100, 40_000) for _ in range(300 if long else 10)),
            tokens=generator.randint(2, 12),
            pause_s=generator.uniform(0.0, 0.6),
        )


async def end_early(server: Server, attempts: list[Attempt]) -> Counter[str]:
    """Run all attempts, `AT_ONCE` at a time; return how they ended for their callers."""
    places = asyncio.Semaphore(AT_ONCE)
    ends: Counter[str] = Counter()

    async def run(attempt: Attempt) -> None:
        async with places:
            ends[await _one(server, attempt)] += 1

    await asyncio.gather(*map(run, attempts))
    return ends


async def _one(server: Server, attempt: Attempt) -> str:
    asked = request(
        token_ids=attempt.prompt,
        adapter=attempt.adapter,
        stopping={"max_tokens": attempt.tokens, "ignore_eos": True},
    )
    async with AsyncExitStack() as stack:
        stub: Any = server.inference
        channel = None
        if attempt.how is How.DISCONNECT:
            # A separate connection, so that only this request loses it.
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(server.address, options)
            )
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
        deadline = attempt.pause_s if attempt.how is How.DEADLINE else None
        call = stub.GenerateStream(asked, timeout=deadline)
        try:
            await _reach(attempt, call)
            if channel is not None:
                await channel.close()
            call.cancel()
            return "ended by the caller"
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            if isinstance(error, grpc.aio.AioRpcError):
                return str(error.code().name)
            return "ended by the caller"


async def _reach(attempt: Attempt, call: Any) -> None:
    if attempt.how is not How.DEADLINE and attempt.when is When.EARLY:
        await asyncio.sleep(attempt.pause_s)
        return
    wanted = {When.FIRST: 1, When.DECODING: attempt.tokens // 2, When.LAST: attempt.tokens - 1}
    if attempt.how is How.DEADLINE:
        wanted = {}
    tokens = 0
    async for message in call:
        tokens += len(message.token_ids)
        if tokens >= wanted.get(attempt.when, attempt.tokens + 1):
            return


async def all_free(server: Server) -> None:
    """Wait until nothing runs or waits, then check that nothing is held.

    The engine checks its state whenever it is idle and ends if it is inconsistent, so a
    restart of the engine would also indicate a leak.
    """
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")
    while True:
        # Each scrape takes a while, so the server can work between two of them.
        found = await server.scrape(*(f"veneer_{name}" for name in names))
        if not any(value for samples in found for value in samples.values()):
            break
    listed = await server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
    assert not {a.name: a.leases for a in listed.adapters if a.leases}, "leases are left"
    for adapter in listed.adapters:
        if "/" in adapter.name:  # shared by another tenant
            continue
        await server.adapters.EvictAdapter(
            adapters_pb2.EvictAdapterRequest(
                name=adapter.name, mode=adapters_pb2.EVICT_MODE_FAIL_IF_BUSY, unpin=True
            )
        )
    info = await server.about.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert info.engine_starts == 1, "the engine found an error in its own books"


async def _main(count: int, seed: int, folders: list[Path], cache: Path) -> None:
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--max-running", "8", "--device-adapter-bytes", "12MiB")
        async with running_server(Path(folder) / "data", cache, *flags) as server:
            for adapter in folders:
                await server.push(adapter, adapter.name)
            names = [adapter.name for adapter in folders]
            attempts = [Attempt.random(generator, names) for _ in range(count)]
            began = time.perf_counter()
            ends = await end_early(server, attempts)
            ended = time.perf_counter()
            await all_free(server)
            print(f"seed {seed}: {count} requests in {ended - began:.1f} s: {dict(ends)}")
            print(f"all free {time.perf_counter() - ended:.3f} s after the last one ended")
            for phase, deadline in product(Phase, (False, True)):
                if phase is Phase.PREFILLING and deadline:
                    continue  # it is refused early, so there is nothing to free
                freed = await measure(
                    server, phase, deadline=deadline, probes=20, names=names[:2], seed=seed
                )
                print(freed)
            await server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=seeds.seed())
    parser.add_argument("--cache-dir", type=Path, default=cache_dir())
    parser.add_argument("adapters", type=Path, nargs="+", help="adapter folders, two or more")
    given = parser.parse_args()
    asyncio.run(_main(given.count, given.seed, given.adapters, given.cache_dir))
