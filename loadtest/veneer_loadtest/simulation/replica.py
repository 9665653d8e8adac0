"""One simulated server: the real step loop on a virtual clock."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from dataclasses import dataclass

from veneer_server.engine.loop import StepLoop, Turn
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.step_limits import SchedulerLimits, StepCost
from veneer_server.step.inbox import Arrived, Inbox
from veneer_server.step.plan import SequenceResult, StepPlan
from veneer_server.wire.messages import (
    AdapterSource,
    Cancel,
    FromEngine,
    Reference,
    SequenceRequest,
    Submit,
)

from veneer_loadtest.simulation.costs import Costs
from veneer_loadtest.simulation.events import Events
from veneer_loadtest.simulation.loader import SimulatedLoader

ITEMSIZE = 2
"""Bytes of one number of a resident adapter."""
_TOKEN = SequenceResult(token=5)
_NO_TOKEN = SequenceResult()


@dataclass(frozen=True, slots=True)
class ReplicaSize:
    """Settings of a server; the defaults are the server's own.

    Attributes:
        adapter_bytes: bytes of memory for adapters.
        kv_tokens: size of the KV cache, in tokens.
        load_workers: number of loader processes, which limits the loads planned at once.
    """

    adapter_bytes: int
    kv_tokens: int = 16_384
    max_running: int = 64
    max_batch_tokens: int = 512
    prefill_beside_decode: int = 128
    context_length: int = 2048
    block_size: int = 16
    prefix_cache: bool = True
    load_workers: int = 1


class Replica:
    """One simulated server; belongs to the simulation's thread.

    Args:
        told: called with the engine's messages, at the time at which it sends them.
        seed: seed for choosing from `Costs.noise`.

    Attributes:
        lost: set when the replica is lost or removed; it then does nothing any more.
    """

    def __init__(
        self,
        name: str,
        size: ReplicaSize,
        costs: Costs,
        events: Events,
        told: Callable[[Replica, list[FromEngine]], None],
        seed: int = 0,
    ) -> None:
        self.name = name
        self.lost = False
        self.loader = SimulatedLoader()
        self.residency = Residency(
            size.adapter_bytes,
            size.adapter_bytes,
            ITEMSIZE,
            shared=True,
            most_loads=4 * size.load_workers,
        )
        cost = StepCost(costs.step_s, costs.prompt_token_s, costs.attention_s)
        limits = SchedulerLimits(
            size.max_batch_tokens,
            max_running=size.max_running,
            context_length=size.context_length,
            prefill_beside_decode=size.prefill_beside_decode,
            prefill_beside_decode_s=cost.prefill_beside_decode_s,
            cost=cost,
            base_parameters=costs.base_parameters,
        )
        self.blocks = BlockManager(
            size.kv_tokens // size.block_size + 1,
            size.block_size,
            prefix_cache=size.prefix_cache,
            chunk=limits.chunk,
        )
        self.scheduler = Scheduler(limits, self.blocks, self.residency, frozenset())
        self._costs = costs
        self._random = random.Random(f"{seed} {name}")  # nosec B311 # not for secrets
        self._events = events
        self._told = told
        self._inbox: Inbox = queue.SimpleQueue()
        self._now = 0.0
        """The engine's time: ahead of `events.now` by the step under way."""
        self._loaded_until = 0.0
        self.room: int | None = None
        self._busy = False
        self._awake = False
        self._wakes = 0
        self._sent: list[FromEngine] = []
        self.loop = StepLoop(
            inbox=self._inbox,
            scheduler=self.scheduler,
            residency=self.residency,
            runner=self,
            memory=self,
            send=self._send,
            clock=lambda: self._now,
        )

    # ------------------------------------------------------------------ requests

    def submit(self, number: int, request: SequenceRequest) -> None:
        """Send a request to the engine now."""
        self._inbox.put(Submit(number, request))
        self._wake()

    def cancel(self, number: int) -> None:
        """Cancel a request; its last output says so."""
        self._inbox.put(Cancel(number))
        self._wake()

    @property
    def kv_used(self) -> float:
        """Used share of the KV cache, 0 to 1."""
        return self.blocks.used / self.blocks.total

    def resident(self) -> frozenset[str]:
        """Return the weights digests of adapters in memory or being loaded."""
        return frozenset(self.residency.ledger.there["host"] | self.loader.digests)

    # ------------------------------------------------------------------ the clock

    def _wake(self) -> None:
        if not (self._busy or self._awake):
            self._awake = True
            self._events.at(self._events.now, self._turn)

    def _turn(self) -> None:
        if self.lost:
            return
        self._awake = False
        self._now = self._events.now
        self._load(self._now - self._loaded_until)
        while True:
            if self.loop.turn() is Turn.STEPPED:
                self._busy = True
                self._events.at(self._now, self._stepped)
                return
            if self._inbox.empty():
                break
        self._rest()

    def _rest(self) -> None:
        """Rest until a message arrives or a load is complete, since nothing can run before."""
        self._wakes += 1
        if self.loader:
            number = self._wakes
            self._events.after(self.loader.left_s, lambda: self._loaded(number))

    def _loaded(self, number: int) -> None:
        """Handle the end of a load that was under way when the engine became idle."""
        if number == self._wakes and not (self._busy or self._awake):
            self._turn()

    def _stepped(self) -> None:
        self._busy = False
        if self.lost:
            return
        sent, self._sent = self._sent, []
        self._told(self, sent)
        if self.scheduler.has_work() or not self._inbox.empty():
            self._turn()
        else:  # a turn would find nothing to do
            self._now = self._events.now
            self._rest()

    def _send(self, messages: list[FromEngine]) -> None:
        if self._now > self._events.now:
            self._sent += messages  # sent at the end of the step
        else:
            self._told(self, messages)

    # ------------------------------------------------------------------ runner and memory

    def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        """Run a step; see `Runner`."""
        seconds = self._costs.of_step(plan) * self._noise()
        if self.loader:
            seconds *= 1 + self._costs.busy_slowdown
        self._now += seconds
        self._load(seconds * self._costs.busy_rate)
        return tuple([_TOKEN if planned.samples else _NO_TOKEN for planned in plan.sequences])

    def _noise(self) -> float:
        noise = self._costs.noise
        return self._random.choice(noise) if noise else 1.0

    def _load(self, seconds: float) -> None:
        self._loaded_until = self._now
        if self.loader:
            for digest in self.loader.work(seconds):
                self._inbox.put(Arrived(digest, "host", {}))

    def load(self, source: AdapterSource) -> None:
        """See `AdapterMemory`."""
        size = source.parameters * ITEMSIZE
        self.loader.add(source.weights_digest, size, self._costs.of_load(size) * self._noise())

    def move(self, weights_digest: str) -> None:
        """Report the move at once: the device's copy is the copy in host memory."""
        self._inbox.put(Arrived(weights_digest, "device", {}))

    def admit(self, arrived: Arrived) -> None:
        """Nothing to do."""

    def drop(self, weights_digest: str, tier: str) -> None:
        """Nothing to do."""

    def reference(self, wanted: Reference) -> None:
        """Not simulated."""
        raise NotImplementedError
