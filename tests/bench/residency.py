"""Compare eviction with LRU, and measure planning: ``python -m tests.bench.residency``.

Streams with one request at a time each use four times as many adapters as fit in DEVICE, and
twice as many as fit in HOST: in turn (LRU's worst case), by Zipf's law and uniformly. The
product's scheduler and residency decide; a FAKE runner and FAKE load workers take the times in
`Costs` on a simulated clock, so that the figures depend only on the seed. This also measures
the step thread's CPU time for planning once, and for a message to an idle loop (``--idle``:
only the latter).
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import queue
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from veneer_server.engine.loop import StepLoop
from veneer_server.engine.residency.eviction import EvictionOrder, Key
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.residency.tiers import Action, Drop, LedgerEntry, Load, MemoryTier
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.engine.scheduling.step_limits import SchedulerLimits
from veneer_server.step.inbox import Arrived, Inbox
from veneer_server.step.plan import SequenceResult, StepPlan
from veneer_server.wire.messages import (
    Activate,
    AdapterSource,
    FromEngine,
    OperationDone,
    Ping,
    Pong,
    Reference,
    SamplingParams,
    SequenceRequest,
    Stop,
)

SIZE: Final = 10_000_000
"""Size of an adapter in bytes."""
PROMPT: Final = 32
TOKENS: Final = (8, 56)
"""Minimum and maximum number of new tokens of a request."""
WORKLOADS: Final = ("round robin", "zipf", "uniform")


class LeastRecentlyUsed(EvictionOrder):
    """Plain LRU order, with everything else as in the product."""

    def key(self, entry: LedgerEntry, cost: float) -> Key:
        return float(entry.used), 0.0, 0


@dataclass(frozen=True)
class Costs:
    """Durations in seconds, roughly as on two CPU cores with SmolLM2-135M."""

    step: float = 2.5e-3
    row: float = 0.7e-3
    adapter: float = 0.3e-3
    prompt_token: float = 0.1e-3
    read: float = 25e-3
    copy: float = 1e-3

    def of_step(self, plan: StepPlan) -> float:
        rows = plan.rows - plan.prefill_tokens
        return (
            self.step
            + rows * self.row
            + plan.prefill_tokens * self.prompt_token
            + len(plan.adapters) * self.adapter
        )


@dataclass
class Simulation:
    """One server under one load.

    Attributes:
        order: eviction order; None for the product's.
        device, host: number of adapters that fit in each tier.
        streams: requests in flight, each with an adapter from ``wanted``.
    """

    order: Callable[[MemoryTier], EvictionOrder] | None
    device: int
    host: int
    streams: int
    wanted: Iterator[str]
    requests: int
    seed: int
    shared: bool = False
    costs: Costs = field(default_factory=Costs)
    now: float = 0.0
    steps: int = 0
    found: Counter[str] = field(default_factory=Counter)
    evictions: Counter[str] = field(default_factory=Counter)
    longest_wait: int = 0
    """Longest wait from a request to its first token, in steps."""
    waits: list[float] = field(default_factory=list)
    """Waits from a request to its first token, in seconds."""
    done: int = 0
    failures: int = 0

    def __post_init__(self) -> None:
        self.residency = Residency(
            self.host * SIZE,
            self.device * SIZE,
            1,
            shared=self.shared,
            order=self.order or EvictionOrder,
        )
        self.scheduler = Scheduler(
            SchedulerLimits(512, max_running=64, context_length=128),
            BlockManager(64 * 128 // 16 + 1, 16, prefix_cache=False),
            self.residency,
            frozenset({0}),
        )
        self._numbers = itertools.count(1)
        self._random = random.Random(self.seed)
        self._asked_at: dict[int, tuple[int, float]] = {}
        self._worker_free = 0.0
        self._coming: list[tuple[float, int, str, MemoryTier]] = []

    def run(self) -> Simulation:
        for _ in range(self.streams):
            self._submit()
        while self.done < self.requests:
            self._arrivals()
            actions, impossible = self.scheduler.plan_adapters(self.now)
            self._carry_out(actions)
            self.failures += len(impossible)
            plan = self.scheduler.schedule(self.now)
            if plan is not None:
                self._step(plan)
            else:
                self.now = self._coming[0][0]  # fails if nothing can proceed
        self.scheduler.check_integrity()
        return self

    def _submit(self) -> None:
        name, number = next(self.wanted), next(self._numbers)
        source = AdapterSource(weights_digest=name, folder="", parameters=SIZE, name=name)
        new = self._random.randint(*TOKENS)
        request = SequenceRequest([1] * PROMPT, new, SamplingParams(), source)
        found = self.residency.lease(source)
        self.found[found] += 1
        self._asked_at[number] = self.steps, self.now
        self.scheduler.add(Sequence(number, request, self.now, found))

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Drop():
                    self.evictions[action.tier] += 1
                case Load():
                    self._begin(action.source.weights_digest, "host", self.costs.read)
                case _:
                    self._begin(action.weights_digest, "device", self.costs.copy)

    def _begin(self, digest: str, tier: MemoryTier, seconds: float) -> None:
        self._worker_free = max(self.now, self._worker_free) + seconds
        item = (self._worker_free, next(self._numbers), digest, tier)
        heapq.heappush(self._coming, item)

    def _arrivals(self) -> None:
        while self._coming and self._coming[0][0] <= self.now:
            _, _, digest, tier = heapq.heappop(self._coming)
            if tier == "host":
                self.residency.loaded(digest, self.costs.read)
            else:
                self.residency.moved(digest, self.costs.copy)
            self._carry_out(self.residency.settle(digest))

    def _step(self, plan: StepPlan) -> None:
        self.steps += 1
        self.now += self.costs.of_step(plan)
        results = tuple(SequenceResult(token=5 if p.samples else None) for p in plan.sequences)
        updates, actions = self.scheduler.update(plan, results)
        self._carry_out(actions)
        for update in updates:
            if update.first:
                step, now = self._asked_at.pop(update.sequence.id)
                self.longest_wait = max(self.longest_wait, self.steps - step)
                self.waits.append(self.now - now)
            if update.finish is not None:
                self.done += 1
                self._submit()


def wanted(workload: str, count: int, seed: int) -> Iterator[str]:
    """Yield the adapter of each request."""
    if workload == "round robin":
        yield from (f"{i % count}" for i in itertools.count())
    random_ = random.Random(seed)
    weights = [1 / (i + 1) if workload == "zipf" else 1.0 for i in range(count)]
    cumulated = list(itertools.accumulate(weights))
    while True:
        yield str(random_.choices(range(count), cum_weights=cumulated)[0])


def compare(
    workload: str, *, device: int, streams: int, requests: int, seed: int, shared: bool
) -> None:
    runs = {
        name: Simulation(
            order,
            device=device,
            host=2 * device,
            streams=streams,
            wanted=wanted(workload, 4 * device, seed),
            requests=requests,
            seed=seed,
            shared=shared,
        ).run()
        for name, order in (("new", None), ("LRU", LeastRecentlyUsed))
    }
    for name, run in runs.items():
        total = sum(run.found.values())
        hits = ", ".join(
            f"{tier} {run.found[tier] / total:.3f}" for tier in ("device", "host", "disk")
        )
        print(
            f"  {workload:11} {name}: {run.done} requests, {run.failures} failures, longest "
            f"wait {run.longest_wait} steps, {max(run.waits):.2f} s (half of them "
            f"{median(run.waits):.3f} s), found in {hits}, {run.done / run.now:.1f} a second"
        )
    ratio = runs["LRU"].now / runs["new"].now * runs["new"].done / runs["LRU"].done
    print(f"  {workload:11} throughput new/LRU {ratio:.3f}")


def time_planning(adapters: int, waiting: int) -> None:
    """Time planning with ``adapters`` resident adapters, a full DEVICE and ``waiting`` others
    waiting: the first planning, which evicts for them, and later ones while nothing is
    freed."""
    first, then = [], []
    for seed in range(20):
        random_ = random.Random(seed)
        residency = Residency(adapters * SIZE, adapters * SIZE, 1, shared=True)
        names = [f"resident {i}" for i in range(adapters)]
        for name in names:
            source = AdapterSource(weights_digest=name, folder="", parameters=SIZE, name=name)
            residency.lease(source)
            residency.plan([name])
            residency.loaded(name)
            residency.plan([name])
            residency.moved(name)
            residency.release(name)
        for _ in range(adapters):
            name = random_.choice(names)
            residency.lease(AdapterSource(name, "", SIZE, name))
            residency.release(name)
        wants = [f"new {i}" for i in range(waiting)]
        for name in wants:
            residency.lease(AdapterSource(name, "", SIZE, name))
        for times in (first, then):
            began = time.thread_time()
            residency.plan(wants, None, 64)
            times.append(time.thread_time() - began)
    print(
        f"  {adapters} resident, {waiting} waiting: {median(first) * 1e3:.3f} ms when it "
        f"evicts ({max(first) * 1e3:.3f} at most), {median(then) * 1e3:.3f} ms after that"
    )


class NoMemory:
    """FAKE adapter memory: holds nothing, and completes loads and moves at once."""

    room: int | None = None

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def load(self, source: AdapterSource) -> None:
        self._inbox.put(Arrived(source.weights_digest, "host", {}))

    def move(self, weights_digest: str) -> None:
        self._inbox.put(Arrived(weights_digest, "device", {}))

    def admit(self, arrived: Arrived) -> None:
        pass

    def drop(self, weights_digest: str, tier: str) -> None:
        pass

    def reference(self, wanted: Reference) -> None:
        pass


class NoRunner:
    """FAKE runner: no sequence is ever submitted."""

    def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        raise NotImplementedError


def time_idle(adapters: int, pings: int) -> None:
    """Measure the loop thread's CPU time from the handling of one message to the next, in an
    idle step loop with ``adapters`` adapters. Also time the full check."""
    inbox: Inbox = queue.SimpleQueue()
    residency = Residency(adapters * SIZE, adapters * SIZE, 1, shared=True)
    limits = SchedulerLimits(512, max_running=64, context_length=8192)
    blocks = BlockManager(64 * 8192 // 16 + 1, 16)
    scheduler = Scheduler(limits, blocks, residency, frozenset({0}))
    numbers, times, activated = iter(range(pings)), [], 0

    def send(messages: list[FromEngine]) -> None:
        nonlocal activated
        activated += sum(isinstance(message, OperationDone) for message in messages)
        if activated < adapters:
            return
        if not times or any(isinstance(message, Pong) for message in messages):
            times.append(time.thread_time())
            number = next(numbers, None)
            inbox.put(Stop() if number is None else Ping(number))

    loop = StepLoop(
        inbox=inbox,
        scheduler=scheduler,
        residency=residency,
        runner=NoRunner(),
        memory=NoMemory(inbox),
        send=send,
    )
    for number in range(adapters):
        source = AdapterSource(weights_digest=f"{number}", folder="", parameters=SIZE, name="")
        inbox.put(Activate(number, source))
    loop.run()
    took = [after - before for before, after in itertools.pairwise(times)][1:]
    ends = [time.thread_time(), *(time.thread_time() for _ in scheduler.integrity())]
    slices = [after - before for before, after in itertools.pairwise(ends)]
    print(
        f"  {adapters} resident: {median(took) * 1e3:.3f} ms a message, {max(took) * 1e3:.3f} "
        f"at most; the full check takes {sum(slices) * 1e3:.1f} ms, its longest slice "
        f"{max(slices) * 1e3:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--idle", action="store_true", help="only what an idle loop costs")
    arguments = parser.parse_args()
    print("a message to an idle loop")
    for adapters in (100, 1000, 10_000):
        time_idle(adapters, 50)
    if arguments.idle:
        return
    print(f"seed {arguments.seed}")
    for device, streams in ((8, 2), (8, 4), (8, 16), (32, 8), (32, 64)):
        for shared in (False, True):
            print(
                f"{device} adapters in DEVICE, {2 * device} in HOST, {4 * device} in all, "
                f"{streams} streams{', one memory' if shared else ''}"
            )
            for workload in WORKLOADS:
                compare(
                    workload,
                    device=device,
                    streams=streams,
                    requests=arguments.requests,
                    seed=arguments.seed,
                    shared=shared,
                )
    print("one planning")
    for adapters, waiting in ((2000, 0), (2000, 256), (5000, 256)):
        time_planning(adapters, waiting)


if __name__ == "__main__":
    main()
