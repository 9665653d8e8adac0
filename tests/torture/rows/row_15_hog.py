"""Row 15: one tenant requests ten times as much as the others, who are served as before.

It runs on the real base, over gRPC with keys. Light tenants send a request, and then pause for
twice as long as it took. They do so alone, and while a hog keeps ten times as many requests
open, in turns, so that a change of the machine's speed affects both. The figure is their TTFT.
The bound of fairness is checked by counts, in histories of the scheduler
(`tests.unit.server.engine.test_fair_histories`).

A server that takes all callers for one tenant must fail this bar.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from veneer_proto.v1 import inference_pb2 as pb

from tests.places import cache_dir
from tests.server_harness import Server, running_server
from tests.torture.row import Control, Outcome, Scale
from tests.torture.tenants import Call, call, edited_server, make_keys
from tests.unit.server.engine.test_fair_histories import histories

ROW = 15
TITLE = "a hog at 10 x"
MOST: Final = 2.0
BAR = f"light tenants' p95 first token <= {MOST:g} x alone; the bound never exceeded"

LIGHT: Final = ("light-1", "light-2", "light-3")
HOG: Final = 10 * len(LIGHT)
"""Requests that the hog keeps open; each light tenant keeps one."""
LIGHT_TOKENS, HOG_TOKENS = (192, 8), (48, 32)
"""Numbers of tokens of a prompt and of its answer."""
PAUSE = 2.0

ONE_TENANT: Final = (
    "from veneer_server.access import authenticate\nfrom veneer_server.queues import fairness\n"
    "authenticate.fairness_of = lambda *given: fairness.Fairness()"
)


@dataclass(frozen=True, slots=True)
class Measured:
    """TTFT of the light tenants' requests, in seconds."""

    alone: list[float]
    beside: list[float]
    hog: int
    failures: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return float(np.percentile(self.beside, 95) / np.percentile(self.alone, 95))


def run(scale: Scale) -> Outcome:
    """Measure, and check the bound in histories."""
    measured = asyncio.run(_measure(scale, scale.folder("hog"), *scale.pick((2, 4), (8, 25))))
    failures = list(measured.failures)
    if measured.ratio > MOST:
        failures.append(f"p95 beside the hog is {measured.ratio:.2f} x that alone")
    count = scale.pick(100, 2000)
    try:
        seen = histories(count, scale.seed)
    except AssertionError as error:
        failures.append(str(error))
        seen = None
    alone, beside = measured.alone, measured.beside
    return Outcome(
        figure=(
            f"p95 {np.percentile(beside, 95) * 1e3:.0f} ms beside {HOG} open requests of the "
            f"hog, {np.percentile(alone, 95) * 1e3:.0f} ms alone: {measured.ratio:.2f} x "
            f"(median {np.median(beside) * 1e3:.0f} and {np.median(alone) * 1e3:.0f} ms; "
            f"{len(beside)} requests of {len(LIGHT)} light tenants, {measured.hog} of the "
            f"hog); {count} histories within the bound"
            + (f", {seen['backlogged']:,} moments of two backlogged tenants" if seen else "")
        ),
        bar=BAR,
        failures=tuple(failures),
    )


def controls(scale: Scale) -> Iterator[Control]:
    """Plant that all callers are one tenant, so that light tenants wait behind the hog."""
    folder = scale.folder("one tenant")
    with edited_server(ONE_TENANT, folder / "bin"):
        measured = asyncio.run(_measure(scale, folder, 1, 3))
    caught = f"p95 is {measured.ratio:.2f} x" if measured.ratio > MOST else ""
    yield Control("all callers are one tenant", caught)


async def _measure(scale: Scale, folder: Path, rounds: int, each: int) -> Measured:
    keys = make_keys(folder / "keys.toml", "hog", *LIGHT)
    flags = ("--keys-file", str(folder / "keys.toml"), "--max-running", "8")
    generator = scale.random(folder.name)
    async with running_server(folder / "data", cache_dir(), *flags) as server:
        await _light(server, keys, generator, 1)  # warms up
        alone, beside, hog = list[Call](), list[Call](), list[Call]()
        for _ in range(rounds):
            alone += await _light(server, keys, generator, each)
            before, stop = len(hog), asyncio.Event()
            hogs = [
                asyncio.create_task(_keep_asking(server, keys["hog"], generator, stop, hog))
                for _ in range(HOG)
            ]
            while len(hog) == before:  # noqa: ASYNC110 - its queue is full then
                await asyncio.sleep(0.05)
            beside += await _light(server, keys, generator, each)
            stop.set()
            await asyncio.gather(*hogs)
        await server.stop()
    failures = [each.failed for each in (*alone, *beside, *hog) if each.failed]
    failures += [each.refused.message for each in (*alone, *beside, *hog) if each.refused]
    return Measured(
        [each.first_s for each in alone if each.first_s is not None],
        [each.first_s for each in beside if each.first_s is not None],
        len(hog),
        tuple(failures),
    )


async def _light(
    server: Server, keys: dict[str, object], generator: random.Random, each: int
) -> list[Call]:
    async def one(name: str) -> list[Call]:
        calls = list[Call]()
        for _ in range(each):
            asked = _request(generator, *LIGHT_TOKENS)
            calls.append(await call(server.inference, keys[name], asked))
            await asyncio.sleep(PAUSE * calls[-1].total_s)
        return calls

    return [found for calls in await asyncio.gather(*map(one, LIGHT)) for found in calls]


async def _keep_asking(
    server: Server,
    key: object,
    generator: random.Random,
    stop: asyncio.Event,
    found: list[Call],
) -> None:
    while not stop.is_set():
        asked = _request(generator, *HOG_TOKENS)
        found.append(await call(server.inference, key, asked))


def _request(generator: random.Random, prompt: int, new: int) -> pb.GenerateRequest:
    ids = [generator.randrange(1000, 40_000) for _ in range(prompt)]
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingOptions(temperature=0),
        stopping=pb.StoppingOptions(max_tokens=new, ignore_eos=True),
    )
