"""Row 14: under twice the load that it can serve, for an hour, a server does as much as before.

The load is on the real base, over gRPC, from two tenants. First as many requests as can run at
once are kept open: the completed tokens per second are the capacity. Then requests come at
twice that rate, whether earlier ones have ended or not. Each must end once; as much must be
completed as before; refusals must be quick and say when to retry; memory must not grow.

Servers whose refusals lack RetryInfo, or take a tenth of a second, must fail this bar.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from veneer_proto.v1 import inference_pb2 as pb

from tests.places import cache_dir
from tests.server_harness import Server, running_server
from tests.torture.row import Control, Outcome, Scale
from tests.torture.tenants import Call, at_rate, call, edited_server, make_keys

ROW = 14
TITLE = "overload at 2 x"
BAR = (
    "one terminal status for each call; goodput >= 90 % of 1 x; refusals (p99) < 50 ms with "
    "RetryInfo; memory growth <= 5 %"
)
GOODPUT, REFUSED_S, GROWTH = 0.9, 0.05, 0.05
RUNNING, QUEUE = 4, 8
PROMPT, NEW = 64, 16
TENANTS: Final = ("one", "two")

PLANTED: Final = {
    "refusals say nothing of when to come back": (
        "from veneer_server.engine_client.places import Places\n"
        "Places._retry_s = lambda *given, **named: None"
    ),
    "refusals take a tenth of a second": (
        "import time\n"
        "from veneer_server.engine_client.places import Places\n"
        "right = Places._make_room\n"
        "def slow(self, *given):\n"
        "    try:\n"
        "        right(self, *given)\n"
        "    except Exception:\n"
        "        time.sleep(0.1)\n"
        "        raise\n"
        "Places._make_room = slow"
    ),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of a run.

    Attributes:
        capacity: completed tokens per second at 1 x.
        goodput: completed tokens per second at 2 x.
        growth: growth of the memory of front and engine, from the first tenth of the run to its
            end.
    """

    capacity: float
    goodput: float
    calls: list[Call]
    growth: float
    seconds: float


def run(scale: Scale) -> Outcome:
    """Run both loads, and check the bars."""
    seconds = scale.pick(30.0, 3600.0)
    found = asyncio.run(_measure(scale, scale.folder("overload"), seconds, scale.pick(15, 60)))
    refused = [each for each in found.calls if each.refused is not None]
    slowest = _p99(refused)
    causes = Counter(each.refused.metadata.get("cause") for each in refused if each.refused)
    return Outcome(
        figure=(
            f"{len(found.calls):,} calls in {found.seconds:.0f} s, {len(refused):,} refused "
            f"({', '.join(f'{n:,} {cause}' for cause, n in causes.items())}), p99 "
            f"{slowest * 1e3:.0f} ms; goodput {found.goodput:.0f} tokens/s, at 1 x "
            f"{found.capacity:.0f}: {found.goodput / found.capacity:.0%}; memory "
            f"{found.growth:+.1%}"
        ),
        bar=BAR,
        failures=tuple(_failures(found)),
    )


def controls(scale: Scale) -> Iterator[Control]:
    """Do a shorter run with each planted bug."""
    for number, (name, edit) in enumerate(PLANTED.items()):
        folder = scale.folder(f"planted {number}")
        with edited_server(edit, folder / "bin"):
            found = asyncio.run(_measure(scale, folder, 8.0, 5))
        wanted = "RetryInfo" if "come back" in name else "refusals"
        caught = [line for line in _failures(found) if wanted in line]
        yield Control(name, caught[0] if caught else "")


def _p99(refused: list[Call]) -> float:
    """Return the p99 time of requests refused on arrival; a request that lost its place later
    had waited."""
    at_once = [
        each.total_s
        for each in refused
        if each.refused is not None and each.refused.metadata.get("cause") != "displaced"
    ]
    return float(np.percentile(at_once, 99)) if at_once else 0.0


def _failures(found: Measured) -> Iterator[str]:
    wrong = [each.ends for each in found.calls if each.ends != 1]
    if wrong:
        yield f"{len(wrong)} calls did not end once"
    failed = Counter(each.failed for each in found.calls if each.failed)
    for what, count in failed.items():
        yield f"{count} calls ended with {what}"
    refused = [each for each in found.calls if each.refused is not None]
    if not refused:
        yield "nothing was refused: it was no overload"
    silent = [each for each in refused if each.refused and not each.refused.retry_after_s]
    if silent:
        yield f"{len(silent)} refusals without RetryInfo"
    if (slowest := _p99(refused)) > REFUSED_S:
        yield f"refusals take {slowest * 1e3:.0f} ms (p99)"
    if found.goodput < GOODPUT * found.capacity:
        yield f"goodput is {found.goodput / found.capacity:.0%} of that at 1 x"
    if found.growth > GROWTH:
        yield f"memory grew by {found.growth:.1%}"


async def _measure(scale: Scale, folder: Path, seconds: float, alone_s: float) -> Measured:
    keys = make_keys(folder / "keys.toml", *TENANTS)
    flags = ["--keys-file", str(folder / "keys.toml")]
    flags += ["--max-running", str(RUNNING), "--max-queue", str(QUEUE)]
    # The KV cache grows as it is first written: small enough to be full soon.
    flags += ["--kv-cache-bytes", "64MiB"]
    generator = scale.random(folder.name)
    async with running_server(folder / "data", cache_dir(), *flags) as server:

        async def one(number: int) -> Call:
            key = keys[TENANTS[number % len(TENANTS)]]
            return await call(server.inference, key, _request(generator))

        for number in range(RUNNING):
            await one(number)  # warms up
        capacity, rate = await _at_capacity(one, alone_s)
        done, going = list[Call](), set[asyncio.Task[Any]]()
        early = asyncio.create_task(_memory_after(server, seconds / 10))
        clock = asyncio.get_running_loop().time
        began = clock()
        await at_rate(2 * rate, seconds, one, done, going)
        tokens, took = sum(each.tokens for each in done), clock() - began
        late = _memory(server)
        if going:
            await asyncio.wait(going)
        await asyncio.sleep(0)
        before = await early
        await server.stop()
    return Measured(capacity, tokens / took, done, late / before - 1, took)


async def _at_capacity(one: Any, seconds: float) -> tuple[float, float]:
    """Return completed tokens and requests per second with `RUNNING` requests open."""
    clock = asyncio.get_running_loop().time
    end, found = clock() + seconds, list[Call]()

    async def keep() -> None:
        number = 0
        while clock() < end:
            found.append(await one(number))
            number += 1

    began = clock()
    await asyncio.gather(*(keep() for _ in range(RUNNING)))
    took = clock() - began
    return sum(each.tokens for each in found) / took, len(found) / took


async def _memory_after(server: Server, seconds: float) -> int:
    await asyncio.sleep(seconds)
    return _memory(server)


def _memory(server: Server) -> int:
    """Return the private bytes of front and engine process."""
    front = psutil.Process(server.process.pid)
    processes = [front, *front.children(recursive=True)]
    return sum(process.memory_full_info().uss for process in processes)


def _request(generator: random.Random) -> pb.GenerateRequest:
    ids = [generator.randrange(1000, 40_000) for _ in range(PROMPT)]
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingOptions(temperature=0),
        stopping=pb.StoppingOptions(max_tokens=NEW, ignore_eos=True),
    )
