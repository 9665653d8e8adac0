"""The faults of a run: planned from a seed alone, then done to a cluster, one after the other.

Faults of the object store and of clocks go on beside the others.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final

from tests.scale.cluster import ENGINES, REGISTRIES, Cluster
from tests.scale.promises import Fault
from tests.scale.proxy import Proxy


@dataclass(frozen=True, slots=True)
class Step:
    """One fault of a plan.

    Attributes:
        after_s: pause before it.
        on: a server's name, or "" for a service.
        for_s: how long it lasts.
        number: what some kinds need besides: bytes, a count, seconds of clock skew.
    """

    after_s: float
    kind: str
    on: str
    for_s: float
    number: int = 0


KINDS: Final = {
    "kill -9": (*ENGINES, *ENGINES, *REGISTRIES),
    "kill -9 of PostgreSQL": ("",),
    "SIGSTOP": (*ENGINES, *REGISTRIES),
    "SIGSTOP in a transaction": REGISTRIES,
    "SIGSTOP in an upload": REGISTRIES,
    "partition from the registry": ENGINES,
    "connection cut": ENGINES,
    "link late": ENGINES,
    "kill -9 while partitioned": ENGINES,
    "partition from PostgreSQL": REGISTRIES,
    "link to PostgreSQL late": REGISTRIES,
    "partition from S3": REGISTRIES,
    "moved": ENGINES,
    "moved to a registry that lags": ENGINES,
}
"""Kinds of faults that come one after the other, and on whom."""

_STILL_HEARD_S: Final = 1.5
"""A follower whose link is less late than this does not connect again, and keeps its lease."""

_START_S: Final = 20.0
"""An engine that has not started by then waits for its registry."""

S3_KINDS: Final = ("error", "refuse", "rot", "rot", "cut", "lose", "hang")


def plan(seed: int, rounds: int) -> list[Step]:
    """Each kind once in each round, in an order of its own."""
    rng = random.Random(f"{seed} faults")
    steps = []
    for number in range(rounds):
        kinds = list(KINDS)
        rng.shuffle(kinds)
        for kind in kinds:
            for_s = rng.uniform(1, 8)
            if kind == "SIGSTOP in a transaction":
                # Longer than PostgreSQL lets a session idle, every second time.
                for_s = rng.uniform(36, 42) if number % 2 == 0 else rng.uniform(2, 10)
            on = rng.choice(KINDS[kind])
            steps.append(Step(rng.uniform(0.5, 5), kind, on, for_s, rng.randrange(1, 50_000)))
    return steps


def store_plan(seed: int) -> Iterator[Step]:
    """Faults of the object store, without end."""
    rng = random.Random(f"{seed} store")
    while True:
        kind, for_s = rng.choice(S3_KINDS), rng.uniform(0.5, 4)
        yield Step(rng.uniform(4, 12), f"S3: {kind}", "", for_s, rng.randrange(1, 20))


def clock_plan(seed: int, servers: list[str]) -> Iterator[Step]:
    """Clocks that are set wrong, for a while or for good, without end."""
    rng = random.Random(f"{seed} clocks")
    while servers:
        skew = rng.choice((-86_400, -7_200, -30, 5, 30, 5_400, 86_400))
        yield Step(
            rng.uniform(2, 10), "clock skew", rng.choice(servers), rng.uniform(5, 30), skew
        )


class Nemesis:
    """Does what a plan says, and notes it.

    Attributes:
        faults: what was done, with the times of ``clock``.
    """

    def __init__(
        self,
        cluster: Cluster,
        clock: Callable[[], float],
        slow_push: Callable[[str, asyncio.Event, asyncio.Event], Awaitable[None]],
        acknowledged: Callable[[str], Awaitable[None]],
    ) -> None:
        """Args:
        slow_push: pushes to a registry, sets the first event in the middle of the upload, and
            goes on once the second is set.
        acknowledged: returns after the next change that was acknowledged by a registry.
        """
        self.faults: list[Fault] = []
        self._cluster = cluster
        self._clock = clock
        self._slow_push = slow_push
        self._acknowledged = acknowledged

    async def run(self, steps: list[Step]) -> None:
        """Do all steps."""
        for step in steps:
            await asyncio.sleep(step.after_s)
            began = self._clock()
            await self._do(step)
            print(f"  {began:7.1f} s  {step.kind} {step.on}".rstrip(), flush=True)

    async def run_store(self, steps: Iterator[Step]) -> None:
        """Do what a `store_plan` says, until cancelled."""
        for step in steps:
            await asyncio.sleep(step.after_s)
            began = self._clock()
            fault = {
                "kind": step.kind.removeprefix("S3: "),
                "count": step.number,
                "seconds": 1.0,
            }
            await asyncio.to_thread(self._cluster.s3.fail, **fault)
            await asyncio.sleep(step.for_s)
            await asyncio.to_thread(self._cluster.s3.fail)
            self._note(step, began)

    async def run_clocks(self, steps: Iterator[Step]) -> None:
        """Do what a `clock_plan` says, until cancelled."""
        for step in steps:
            await asyncio.sleep(step.after_s)
            began = self._clock()
            self._cluster.nodes[step.on].set_clock(step.number)
            await asyncio.sleep(step.for_s)
            self._note(step, began)

    def _note(
        self,
        step: Step,
        began: float,
        *,
        cuts: frozenset[str] = frozenset(),
        stops: frozenset[str] = frozenset(),
        paused: str = "",
    ) -> None:
        self.faults.append(Fault(step.kind, step.on, began, self._clock(), cuts, stops, paused))

    async def _do(self, step: Step) -> None:
        cluster, on, began = self._cluster, step.on, self._clock()
        if on in REGISTRIES:
            cuts, stops = cluster.followers(on), frozenset((on,))
        elif on:
            cuts, stops = frozenset((on,)), frozenset[str]()
        else:
            cuts, stops = frozenset(ENGINES), frozenset(REGISTRIES)
        paused = ""
        match step.kind:
            case "kill -9":
                await self._kill(on, step.for_s / 4)
            case "kill -9 of PostgreSQL":
                await asyncio.to_thread(cluster.postgres.kill)
                await asyncio.sleep(step.for_s / 2)
                await asyncio.to_thread(cluster.postgres.start)
            case "SIGSTOP":
                cluster.nodes[on].pause()
                await asyncio.sleep(step.for_s)
                cluster.nodes[on].resume()
                paused = on if on in REGISTRIES else ""
            case "SIGSTOP in a transaction":
                # On a slow link a change takes longer, and is met more often.
                cluster.to_postgres[on].late_s = 0.02
                if await asyncio.to_thread(cluster.pause_in_change, on, 10):
                    began, paused = self._clock(), on
                    cluster.to_postgres[on].late_s = 0.0
                    await asyncio.sleep(step.for_s)
                cluster.to_postgres[on].late_s = 0.0
                cluster.nodes[on].resume()
                if not paused:
                    return
            case "SIGSTOP in an upload":
                half, go_on = asyncio.Event(), asyncio.Event()
                push = asyncio.ensure_future(self._slow_push(on, half, go_on))
                await half.wait()
                began, paused = self._clock(), on
                cluster.nodes[on].pause()
                go_on.set()
                await asyncio.sleep(step.for_s)
                cluster.nodes[on].resume()
                await push
            case "partition from the registry":
                await self._partition(cluster.to_registry[on], step)
            case "connection cut":
                cluster.to_registry[on].cut_after(step.number)
                await asyncio.sleep(step.for_s / 4)
                cluster.to_registry[on].cut()
                cluster.to_registry[on].heal()
            case "link late":
                cluster.to_registry[on].late_s = step.for_s
                await asyncio.sleep(3 * step.for_s)
                cluster.to_registry[on].heal()
                await asyncio.sleep(step.for_s)  # what is on its way
                if step.for_s < _STILL_HEARD_S:
                    cuts = frozenset()
            case "kill -9 while partitioned":
                # Just after a change that it has acknowledged; it starts without its registry.
                await self._acknowledged(cluster.follows[on])
                began = self._clock()
                cluster.to_registry[on].refuse()
                # It may wait for its registry: it does not know how old its copy is if its
                # clock was set back.
                starting = asyncio.ensure_future(self._kill(on, 0))
                await asyncio.wait([starting], timeout=_START_S)
                await asyncio.sleep(step.for_s)  # it answers meanwhile
                cluster.to_registry[on].heal()
                await starting
            case "partition from PostgreSQL":
                await self._partition(cluster.to_postgres[on], step)
            case "link to PostgreSQL late":
                cluster.to_postgres[on].late_s = step.for_s / 40
                await asyncio.sleep(step.for_s)
                cluster.to_postgres[on].heal()
            case "partition from S3":
                await self._partition(cluster.to_s3[on], step)
                cuts = frozenset()
            case "moved":
                self._move(on)
            case "moved to a registry that lags":
                await self._move_to_laggard(on, step)
                other = cluster.follows[on]
                cuts, stops = cluster.followers(other) | {on}, frozenset((other,))
            case _:
                raise AssertionError(step.kind)
        self._note(step, began, cuts=cuts, stops=stops, paused=paused)

    async def _kill(self, name: str, away_s: float) -> None:
        await self._cluster.nodes[name].kill()
        await asyncio.sleep(away_s)
        if name in REGISTRIES:
            await self._cluster.restart(name)
        else:
            await self._cluster.nodes[name].start()

    async def _partition(self, link: Proxy, step: Step) -> None:
        """Lose everything (packets are dropped), or refuse connections."""
        if step.number % 2:
            link.freeze()
        else:
            link.refuse()
        await asyncio.sleep(step.for_s)
        link.heal()
        if step.number % 4 == 1:
            link.cut()  # what was held up arrives, or is lost

    def _move(self, engine: str) -> str:
        (other,) = set(REGISTRIES) - {self._cluster.follows[engine]}
        self._cluster.move(engine, other)
        self._cluster.to_registry[engine].cut()
        return other

    async def _move_to_laggard(self, engine: str, step: Step) -> None:
        """Cut the other registry off from PostgreSQL, let this one acknowledge changes, and
        move the engine over."""
        here = self._cluster.follows[engine]
        (other,) = set(REGISTRIES) - {here}
        self._cluster.to_postgres[other].freeze()
        for _ in range(2):
            await self._acknowledged(here)
        self._move(engine)
        await asyncio.sleep(step.for_s)
        self._cluster.to_postgres[other].heal()


def clock() -> Callable[[], float]:
    """A clock that starts now at 0."""
    began = time.monotonic()
    return lambda: time.monotonic() - began
