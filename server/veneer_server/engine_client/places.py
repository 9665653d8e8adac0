"""Places among the running and waiting sequences: a queue per tenant, in one number of places.

A request takes the places of all its samples at once, so that it is refused before its first
token or not at all. Any tenant may use all places that are free. When none is, a request is
let in at the expense of the flow (a tenant, or one of those that a gateway calls for) that has
most for its weight, if that has more than the newcomer would have: its newest request that
waits is refused. So whoever has less than a share by weight gets in, whatever others queue.

Refusals are made here, without asking the engine, and say when to come back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal, Protocol, get_args

from veneer_registry.errors import DeadlineTooShort, InvalidField, QueueFull, VeneerError

from veneer_server.engine_client.wait_estimate import WaitEstimate
from veneer_server.queues.fairness import Fairness
from veneer_server.wire.messages import SequenceRequest

__all__ = ["REFUSALS", "Place", "Places", "Refusal"]

Refusal = Literal["queue_full", "displaced", "queue_wait", "deadline"]
"""Why a request was refused: there is no place, its place went to a tenant that had fewer, it
would wait or has waited longer than `--max-queue-wait`, it would wait past its deadline."""

REFUSALS: Final[tuple[Refusal, ...]] = get_args(Refusal)

_UNKNOWN_RETRY_S: Final = 1.0
_LEAST_RETRY_S: Final = 0.1
_MOST_RETRY_S: Final = 60.0


class Fails(Protocol):
    """A stream of outputs that can be ended."""

    def fail(self, error: VeneerError) -> None: ...


class Place:
    """The places of a request.

    Attributes:
        work: of its sequences, as `WaitEstimate` counts it.
        started: whether one of them has had an output.
    """

    def __init__(self, flow: _Flow, count: int) -> None:
        self.flow = flow
        self.count = count
        self.work = 0.0
        self.started = False
        self.timer: asyncio.TimerHandle | None = None
        self._error: VeneerError | None = None
        self._streams: list[Fails] = []

    @property
    def refused(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Raises QueueFull if the place was taken away."""
        if self._error is not None:
            raise self._error

    def add(self, stream: Fails) -> None:
        """A stream that ends if the place is taken away."""
        self._streams.append(stream)

    def refuse(self, error: VeneerError) -> None:
        """End its streams, and those that it gets later."""
        self._error = error
        for stream in self._streams:
            stream.fail(error)


class _Flow:
    """What one fairness key has."""

    def __init__(self, key: tuple[str, str]) -> None:
        self.key = key
        self.tenant_weight = 1.0
        self.held = 0
        self.waiting: dict[Place, None] = {}
        self.work = 0.0


class Places:
    """Belongs to one asyncio event loop.

    Attributes:
        capacity: most sequences running and waiting at once.
        taken: how many there are.
        estimate: of waiting times.
    """

    def __init__(
        self,
        running: int,
        queue: int,
        *,
        max_wait_s: float = 0.0,
        on_refused: Callable[[str, Refusal], None] = lambda tenant, why: None,
    ) -> None:
        """Args:
        running, queue: how many sequences may run, and how many may wait.
        max_wait_s: longest wait for the first token; 0 for no limit.
        on_refused: called with the tenant and the cause of each refusal.
        """
        self.capacity = running + queue
        self.taken = 0
        self.estimate = WaitEstimate()
        self._running = running
        self._max_wait_s = max_wait_s
        self._on_refused = on_refused
        self._flows: dict[tuple[str, str], _Flow] = {}
        self._ids: Counter[str] = Counter()
        """By tenant: its flows. They share its weight."""

    def waiting(self) -> dict[str, int]:
        """Sequences without a first token by tenant, where there are any. May be called from
        another thread."""
        found: Counter[str] = Counter()
        for flow in list(self._flows.values()):
            found[flow.key[0]] += sum(place.count for place in list(flow.waiting))
        return {tenant: count for tenant, count in found.items() if count}

    @contextmanager
    def hold(
        self, count: int, whose: Fairness | None = None, *, within_s: float | None = None
    ) -> Iterator[Place]:
        """Hold places while the block runs.

        Args:
            whose: None for the server itself.
            within_s: seconds in which the first token is due.

        Raises:
            QueueFull: there is no place, or the wait would be longer than the limit.
            DeadlineTooShort: the wait would be longer than ``within_s``.
            InvalidField: ``count`` exceeds `capacity`.
        """
        if count > self.capacity:
            raise InvalidField(
                f"output.n is {count}, but this server runs and queues at most "
                f"{self.capacity} sequences: ask for fewer samples",
                metadata={"field": "output.n", "limit": str(self.capacity)},
            )
        whose = whose or Fairness("")
        key = whose.tenant, whose.fairness_id
        flow = self._flows.get(key) or _Flow(key)
        flow.tenant_weight = whose.weight
        new = key not in self._flows
        self._check_wait(flow, new, within_s)
        self._make_room(flow, new, count)
        if new:
            self._flows[key] = flow
            self._ids[flow.key[0]] += 1
        place = Place(flow, count)
        flow.held += count
        flow.waiting[place] = None
        self.taken += count
        if self._max_wait_s:
            loop = asyncio.get_running_loop()
            place.timer = loop.call_later(self._max_wait_s, self._waited_too_long, place)
        try:
            yield place
        finally:
            self._release(place)

    def resolved(self, place: Place, request: SequenceRequest) -> None:
        """A sequence of the place is about to be submitted."""
        if place in place.flow.waiting:
            work = self.estimate.work(len(request.prompt), request.max_tokens)
            place.work += work
            place.flow.work += work

    def started(self, place: Place) -> None:
        """A sequence of the place has had an output: it no longer waits."""
        if not place.started:
            place.started = True
            self._stop_waiting(place)

    def expected_wait(self, whose: Fairness) -> float:
        """Seconds that a new request would wait for its turn; 0 if unknown."""
        key = whose.tenant, whose.fairness_id
        flow = self._flows.get(key)
        if flow is None:
            flow = _Flow(key)
            flow.tenant_weight = whose.weight
        return self._expected(flow, new=key not in self._flows)

    # ------------------------------------------------------------------ internals

    def _weight(self, flow: _Flow, *, new: bool) -> float:
        return flow.tenant_weight / max(1, self._ids[flow.key[0]] + new)

    def _expected(self, flow: _Flow, *, new: bool) -> float:
        if self.taken < self._running:
            return 0.0
        others = (
            (other.work, self._weight(other, new=False))
            for other in self._flows.values()
            if other is not flow and other.work
        )
        return self.estimate.wait(flow.work, self._weight(flow, new=new), others)

    def _check_wait(self, flow: _Flow, new: bool, within_s: float | None) -> None:
        if within_s is None and not self._max_wait_s:
            return
        wait = self._expected(flow, new=new)
        if within_s is not None and wait > within_s:
            self._on_refused(flow.key[0], "deadline")
            raise DeadlineTooShort(
                f"the deadline leaves {max(0.0, within_s):.2f} s, but requests wait for about "
                f"{wait:.1f} s now: allow more time, or retry later",
                metadata={"cause": "deadline", "wait_s": f"{wait:.3f}"},
                retry_after_s=_clamped(wait - within_s),
            )
        if self._max_wait_s and wait > self._max_wait_s:
            self._on_refused(flow.key[0], "queue_wait")
            raise QueueFull(
                f"a request would wait for about {wait:.1f} s, and this server lets none wait "
                f"longer than {self._max_wait_s:g} s: retry later",
                metadata={"cause": "queue_wait", "wait_s": f"{wait:.3f}"},
                retry_after_s=_clamped(wait - self._max_wait_s),
            )

    def _waited_too_long(self, place: Place) -> None:
        place.timer = None
        error = QueueFull(
            f"the request has waited for {self._max_wait_s:g} s, longer than this server lets "
            "any wait: retry later",
            metadata={"cause": "queue_wait"},
            retry_after_s=self._retry_s(place.flow),
        )
        self._on_refused(place.flow.key[0], "queue_wait")
        self._take_away(place, error)

    def _make_room(self, flow: _Flow, new: bool, count: int) -> None:
        """Raises QueueFull, and has changed nothing then."""
        lacking = self.taken + count - self.capacity
        if lacking <= 0:
            return
        most = (flow.held + count) / self._weight(flow, new=new)
        victims = self._victims(flow, most, lacking)
        if victims is None:
            self._on_refused(flow.key[0], "queue_full")
            raise QueueFull(
                f"{self.taken} of {self.capacity} sequences are running or waiting, "
                f"{flow.held} of them yours; retry later, or start the server with a larger "
                "--max-queue",
                metadata={"cause": "queue_full"},
                retry_after_s=self._retry_s(flow, new=new),
            )
        for place in victims:
            error = QueueFull(
                "all places are taken, and this request's went to a tenant that had fewer "
                "for its weight: retry later, or start the server with a larger --max-queue",
                metadata={"cause": "displaced"},
                retry_after_s=self._retry_s(place.flow),
            )
            self._on_refused(place.flow.key[0], "displaced")
            self._take_away(place, error)

    def _victims(self, flow: _Flow, most: float, lacking: int) -> list[Place] | None:
        """The newest waiting requests of those flows that have more than ``most`` places for
        their weight, as many as it takes; None if they do not do."""
        found: list[Place] = []
        held = {other: other.held for other in self._flows.values() if other is not flow}
        queues = {other: reversed(other.waiting) for other in held}
        while lacking > 0:
            over = [
                (count / self._weight(other, new=False), at, other)
                for at, (other, count) in enumerate(held.items())
            ]
            worst = max(over, default=None)
            if worst is None or worst[0] <= most:
                return None
            place = next(queues[worst[2]], None)
            if place is None:  # all it has is running
                del held[worst[2]]
                continue
            found.append(place)
            held[worst[2]] -= place.count
            lacking -= place.count
        return found

    def _retry_s(self, flow: _Flow, *, new: bool = False) -> float:
        """When a place of the flow, or its turn for one, is likely to come."""
        rate, mean = self.estimate.rate, self.estimate.mean_work
        if not rate or not mean:
            return _UNKNOWN_RETRY_S
        weights = sum(self._weight(other, new=False) for other in self._flows.values())
        ours = self._weight(flow, new=new)
        share = ours / (weights + ours * new)
        return _clamped(mean / (rate * share))

    def _take_away(self, place: Place, error: VeneerError) -> None:
        self._release(place)
        place.refuse(error)

    def _stop_waiting(self, place: Place) -> None:
        flow = place.flow
        if place in flow.waiting:
            del flow.waiting[place]
            flow.work = flow.work - place.work if flow.waiting else 0.0
        if place.timer is not None:
            place.timer.cancel()
            place.timer = None

    def _release(self, place: Place) -> None:
        """Idempotent."""
        self._stop_waiting(place)
        count, place.count = place.count, 0
        if not count:
            return
        flow = place.flow
        self.taken -= count
        flow.held -= count
        if not flow.held:
            del self._flows[flow.key]
            self._ids[flow.key[0]] -= 1
            if not self._ids[flow.key[0]]:
                del self._ids[flow.key[0]]


def _clamped(seconds: float) -> float:
    return min(max(seconds, _LEAST_RETRY_S), _MOST_RETRY_S)
