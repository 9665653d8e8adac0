"""Places among the running and waiting sequences: a queue per tenant, in one number of places.

A request takes one place when it is let in, for its first sample, so that it is refused before
its first token or not at all. Its further samples wait here, without a place, until they can
run: while fewer sequences than may run at once have places, and beside that a few in advance
(`_AHEAD`), so that the engine has somebody to choose. Flows (a tenant, or one of those that a
gateway calls for) take turns at that: who has least for its weight is next.

Any tenant may use all places that are free. When none is, a request is let in at the expense of
the flow that has most for its weight, if that has more than the newcomer would have. A further
sample without a token gives its place back, and waits again; if the flow has none, its newest
request without a token is refused. A sample that has had a token keeps its place until its last
one, and a request that has had one is never refused. So whoever has less than a share by weight
gets in, whatever others queue, unless what has places is running.

A sample whose last token has come has no place, whether or not its caller reads. While a
request has such samples unread, its further ones wait: what nobody reads takes memory.

Refusals are made here, without asking the engine, and say when to come back.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, get_args

from veneer_registry.errors import DeadlineTooShort, InvalidField, QueueFull, VeneerError

from veneer_server.engine_client.wait_estimate import WaitEstimate
from veneer_server.queues.fairness import Fairness
from veneer_server.wire.messages import PRIORITY_SECONDS, SequenceRequest, token_work

Refusal = Literal["queue_full", "displaced", "queue_wait", "deadline"]
"""Why a request was refused: there is no place, its place went to a tenant that had fewer, it
would wait or has waited longer than `--max-queue-wait`, it would wait past its deadline."""

REFUSALS: Final[tuple[Refusal, ...]] = get_args(Refusal)

SAMPLES: Final = 8
"""Samples that requests may have here, with a place or without, for each place. They take
memory alone; beyond that only those with less than their share are let in."""

_AHEAD: Final = 4
"""One further sample may have a place in advance for so many sequences that may run at once;
and one of each tenant, so that it has its turn in the engine beside those who queue."""

_UNKNOWN_RETRY_S: Final = 1.0
_LEAST_RETRY_S: Final = 0.1
_MOST_RETRY_S: Final = 60.0


class Fails(Protocol):
    """A stream of outputs that can be ended."""

    def fail(self, error: VeneerError) -> None: ...


class Place:
    """What a request has: its places, and its samples that wait for one.

    Attributes:
        count: places that it has now.
        since: when it was let in, in monotonic seconds.
        priority: of its samples, within its flow; lower is earlier.
        work: of its sequences, as `WaitEstimate` counts it.
        started: whether one of them has had an output.
    """

    def __init__(self, flow: _Flow, samples: int, count: int) -> None:
        """Args:
        samples: all that it asks for.
        count: places that it takes at once.
        """
        self.flow = flow
        self.count = count
        self.since = time.monotonic()
        self.priority = 0
        self.work = 0.0
        self.started = False
        self.timer: asyncio.TimerHandle | None = None
        self.samples = samples
        self.unused = count
        """Of its places, those that no sample has had yet."""
        self.seats: dict[Seat, None] = {}
        self.backlog: list[tuple[bool, int, asyncio.Future[Seat]]] = []
        """Its samples that wait, as a heap: those of prompts that are computed first."""
        self.unread = 0
        """Samples that the engine has ended, and whose end its caller has not read."""
        self._error: VeneerError | None = None

    @property
    def refused(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Raises QueueFull if the place was taken away."""
        if self._error is not None:
            raise self._error

    def refuse(self, error: VeneerError) -> None:
        """End its streams, and those that it gets later."""
        self._error = error
        for seat in list(self.seats):
            seat.end(error)
        for _, _, waits in self.backlog:
            if not waits.done():
                waits.set_exception(error)


@dataclass(slots=True, eq=False)
class Seat:
    """The place of one sample.

    Attributes:
        turn: the order among the request's samples that wait; None if it was the request's
            from the start.
        started: whether the sample has had an output.
        returned: the sample must wait again: another request needed the place.
        unread: the engine has ended the sample, and its caller has not read the end.
        stream: of the sample.
    """

    place: Place
    turn: tuple[bool, int] | None = None
    started: bool = False
    returned: bool = False
    unread: bool = False
    stream: Fails | None = None

    def end(self, error: VeneerError) -> None:
        """End the sample's stream."""
        if self.stream is not None:
            self.stream.fail(error)


@dataclass(slots=True, eq=False)
class _Flow:
    """What one fairness key has.

    Attributes:
        held: places.
        samples: of its requests, with a place or without.
        requests: how many there are.
        waiting: requests without an output.
        ahead: further samples that have a place and no output.
        backlog: requests with samples that wait for a place.
        work: of `waiting`.
    """

    key: tuple[str, str]
    tenant_weight: float = 1.0
    held: int = 0
    samples: int = 0
    requests: int = 0
    waiting: dict[Place, None] = field(default_factory=dict)
    ahead: dict[Seat, None] = field(default_factory=dict)
    backlog: dict[Place, None] = field(default_factory=dict)
    work: float = 0.0


class Places:
    """Belongs to one asyncio event loop.

    Attributes:
        capacity: most sequences running and waiting at once.
        taken: how many there are; samples that wait for a place are not among them.
        samples: of all requests, with a place or without.
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
        self.taken = self.samples = 0
        self.estimate = WaitEstimate()
        self._running = running
        self._most_ahead = max(1, running // _AHEAD)
        self._ahead: Counter[str] = Counter()
        """By tenant: its further samples that have a place and no output."""
        self._backlog: dict[_Flow, None] = {}
        self._unread: dict[Place, None] = {}
        """Requests whose samples wait until what has ended is read; in no backlog."""
        self._turns = itertools.count()
        self._max_wait_s = max_wait_s
        self._on_refused = on_refused
        self._flows: dict[tuple[str, str], _Flow] = {}
        self._ids: Counter[str] = Counter()
        """By tenant: its flows. They share its weight."""

    def waiting(self) -> dict[str, int]:
        """Places of sequences without a first token by tenant, where there are any. May be
        called from another thread."""
        found: Counter[str] = Counter()
        for flow in list(self._flows.values()):
            places = [place.count for place in list(flow.waiting)]
            begun = [seat for seat in list(flow.ahead) if seat.place.started]
            found[flow.key[0]] += sum(places) + len(begun)
        return {tenant: count for tenant, count in found.items() if count}

    @contextmanager
    def hold(
        self,
        count: int,
        whose: Fairness | None = None,
        *,
        within_s: float | None = None,
        at_once: int = 1,
    ) -> Iterator[Place]:
        """A request's places while the block runs.

        Args:
            count: samples that it asks for, of all its prompts.
            whose: None for the server itself.
            within_s: seconds in which the first token is due.
            at_once: places that it must have from the start.

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
        self._check_samples(flow, new, count)
        self._make_room(flow, new, at_once)
        if new:
            self._flows[key] = flow
            self._ids[flow.key[0]] += 1
        place = Place(flow, count, at_once)
        flow.requests += 1
        flow.held += at_once
        flow.samples += count
        flow.waiting[place] = None
        self.taken += at_once
        self.samples += count
        if self._max_wait_s:
            loop = asyncio.get_running_loop()
            place.timer = loop.call_later(self._max_wait_s, self._waited_too_long, place)
        try:
            yield place
        finally:
            self._release(place)
            self._hand_out()

    def take(self, place: Place) -> Seat | None:
        """A place that the request has and none of its samples has had; None if there is
        none. Raises QueueFull if the request was refused meanwhile."""
        place.check()
        if not place.unused:
            return None
        place.unused -= 1
        seat = Seat(place)
        place.seats[seat] = None
        return seat

    async def turn(
        self, place: Place, *, sibling: bool = False, after: Seat | None = None
    ) -> Seat:
        """Wait until a further sample of the request can run, and take a place for it.

        Args:
            sibling: the prompt's first sample has been computed: while its prefix is likely to
                be in the cache, this one goes before samples of other prompts.
            after: the place that the sample had to give back.

        Raises:
            QueueFull: the request was refused meanwhile.
            EngineFailed: the engine has ended, see `fail`.
        """
        place.check()
        order = (not sibling, next(self._turns))
        if after is not None and after.turn is not None:
            order = after.turn
        waits: asyncio.Future[Seat] = asyncio.get_running_loop().create_future()
        heapq.heappush(place.backlog, (*order, waits))
        self._wait(place)
        self._hand_out()
        try:
            return await waits
        except asyncio.CancelledError:
            if waits.done() and not waits.cancelled() and waits.exception() is None:
                self.leave(waits.result())
            raise

    def resolved(
        self, place: Place, request: SequenceRequest, base_parameters: int = 0
    ) -> None:
        """A sequence of the place is about to be submitted."""
        place.priority = request.priority
        if place in place.flow.waiting:
            each = token_work(request.adapter, base_parameters)
            work = self.estimate.work(len(request.prompt), request.max_tokens, each)
            place.work += work
            place.flow.work += work

    def started(self, seat: Seat) -> None:
        """A sequence has had an output: it no longer waits."""
        if seat.started or seat.returned:  # then the output is dropped
            return
        seat.started = True
        if not seat.place.started:
            self._begin(seat.place)
        if self._settle(seat):
            self._hand_out()

    def ended(self, seat: Seat) -> None:
        """The engine has ended the sample: its place is free, even if its caller does not read
        what has come. Idempotent."""
        if self._give_back(seat):
            seat.unread = True
            seat.place.unread += 1
            self._wait(seat.place)
            self._hand_out()

    def leave(self, seat: Seat) -> None:
        """The sample's caller has read its end, or does not want it: its place is free.
        Idempotent."""
        if self._give_back(seat) or seat.unread:
            place = seat.place
            if seat.unread:
                seat.unread = False
                place.unread -= 1
                self._wait(place)
            if place.samples > 1:  # the last one's is the request's, until it ends
                place.samples -= 1
                place.flow.samples -= 1
                self.samples -= 1
            self._hand_out()

    def fail(self, error: VeneerError) -> None:
        """The engine has ended: so do samples that wait for a place."""
        wait = [place for flow in self._backlog for place in flow.backlog]
        for place in (*wait, *self._unread):
            for _, _, waits in place.backlog:
                if not waits.done():
                    waits.set_exception(error)
            self._drop_backlog(place)

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
                f"the deadline leaves {max(0.0, within_s):.2f} s, but the queue takes about "
                f"{wait:.1f} s now: allow more time, or retry later",
                metadata={"cause": "deadline", "wait_s": f"{wait:.3f}"},
                retry_after_s=_clamped(wait - within_s),
            )
        if self._max_wait_s and wait > self._max_wait_s:
            self._on_refused(flow.key[0], "queue_wait")
            raise QueueFull(
                f"the queue takes about {wait:.1f} s now, and this server's limit is "
                f"{self._max_wait_s:g} s (--max-queue-wait): retry later",
                metadata={"cause": "queue_wait", "wait_s": f"{wait:.3f}"},
                retry_after_s=_clamped(wait - self._max_wait_s),
            )

    def _waited_too_long(self, place: Place) -> None:
        place.timer = None
        error = QueueFull(
            f"the request has waited for {self._max_wait_s:g} s, this server's limit "
            "(--max-queue-wait): retry later",
            metadata={"cause": "queue_wait"},
            retry_after_s=self._retry_s(place.flow),
        )
        self._on_refused(place.flow.key[0], "queue_wait")
        self._take_away(place, error)
        self._hand_out()

    # ------------------------------------------------------------- further samples

    def _hand_out(self) -> None:
        """Give places to further samples that can run."""
        while self.taken < self.capacity and self._backlog:
            flow = self._next_flow()
            if flow is None:
                return
            place = min(flow.backlog, key=_order)
            later, number, waits = heapq.heappop(place.backlog)
            if not place.backlog:
                self._drop_backlog(place)
            if waits.done():  # its caller has left
                continue
            seat = Seat(place, (later, number))
            place.seats[seat] = None
            place.count += 1
            flow.held += 1
            self.taken += 1
            flow.ahead[seat] = None
            self._ahead[flow.key[0]] += 1
            waits.set_result(seat)

    def _next_flow(self) -> _Flow | None:
        """Whose sample is next: of those that may have one, who has least for its weight."""
        flows: Iterable[_Flow] = self._backlog
        if self.taken >= self._running and self._ahead.total() >= self._most_ahead:
            flows = (flow for flow in flows if not self._ahead[flow.key[0]])
        weighed = ((flow.held / self._weight(flow, new=False), flow) for flow in flows)
        return min(weighed, key=lambda each: each[0], default=(0.0, None))[1]

    def _wait(self, place: Place) -> None:
        """Have the request's samples that wait, if any, wait for a place, or for its caller."""
        flow = place.flow
        if place.backlog and not place.unread:
            self._unread.pop(place, None)
            flow.backlog[place] = None
            self._backlog[flow] = None
            return
        self._leave_backlog(place)
        if place.backlog:
            self._unread[place] = None

    def _drop_backlog(self, place: Place) -> None:
        for _, _, waits in place.backlog:
            waits.cancel()  # no-op if its caller has left, or was told
        place.backlog.clear()
        self._leave_backlog(place)

    def _leave_backlog(self, place: Place) -> None:
        flow = place.flow
        self._unread.pop(place, None)
        flow.backlog.pop(place, None)
        if not flow.backlog:
            self._backlog.pop(flow, None)

    def _begin(self, place: Place) -> None:
        """The request is not refused any more; those of its samples that have had no output can
        wait again."""
        place.started = True
        self._stop_waiting(place)
        for seat in place.seats:
            if not seat.started and seat not in place.flow.ahead:
                place.flow.ahead[seat] = None
                self._ahead[place.flow.key[0]] += 1

    def _settle(self, seat: Seat) -> bool:
        """It is no longer a place in advance. Returns whether it was."""
        flow = seat.place.flow
        if seat not in flow.ahead:
            return False
        del flow.ahead[seat]
        self._ahead[flow.key[0]] -= 1
        if not self._ahead[flow.key[0]]:
            del self._ahead[flow.key[0]]
        return True

    def _give_back(self, seat: Seat) -> bool:
        """The place is nobody's. Returns whether it was the sample's."""
        place = seat.place
        if seat not in place.seats:
            return False
        del place.seats[seat]
        self._settle(seat)
        place.count -= 1
        place.flow.held -= 1
        self.taken -= 1
        return True

    # --------------------------------------------------------------------- refusals

    def _check_samples(self, flow: _Flow, new: bool, count: int) -> None:
        """Raises QueueFull if there are too many samples, and not too few of the flow's."""
        most = SAMPLES * self.capacity
        if self.samples + count <= most:
            return
        if flow.samples + count <= most * self._part(flow, new=new):
            return
        self._on_refused(flow.key[0], "queue_full")
        raise QueueFull(
            f"{self.samples} samples are unfinished, {flow.samples} of them yours, and this "
            f"server's limit is {most}; ask for fewer samples, retry later, or start the "
            "server with a larger --max-queue",
            metadata={"cause": "queue_full"},
            retry_after_s=self._retry_s(flow, new=new),
        )

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
            if isinstance(place, Seat):
                self._give_back(place)
                place.returned = True
                place.end(QueueFull("its place went to another request; it is queued again"))
                continue
            error = QueueFull(
                "the queue is full, and this request's place went to a tenant with fewer "
                "requests for its weight: retry later, or start the server with a larger "
                "--max-queue",
                metadata={"cause": "displaced"},
                retry_after_s=self._retry_s(place.flow),
            )
            self._on_refused(place.flow.key[0], "displaced")
            self._take_away(place, error)

    def _victims(self, flow: _Flow, most: float, lacking: int) -> list[Place | Seat] | None:
        """Those who make room: further samples of the flow itself, all but one, which would
        wait for ever otherwise; then of those flows that have more than ``most`` places for
        their weight further samples, and when there is none the newest waiting requests. As
        many as it takes; None if they do not do."""
        own = list(flow.ahead)[1:]
        found: list[Place | Seat] = []
        found += [*reversed(own)][:lacking]
        lacking -= len(found)
        held = {other: other.held for other in self._flows.values() if other is not flow}
        queues = {other: _newest(other) for other in held}
        while lacking > 0:
            over = [
                (count / self._weight(other, new=False), at, other)
                for at, (other, count) in enumerate(held.items())
            ]
            worst = max(over, default=None)
            if worst is None or worst[0] <= most:
                return None
            victim = next(queues[worst[2]], None)
            if victim is None:  # all it has is running
                del held[worst[2]]
                continue
            count = 1 if isinstance(victim, Seat) else _besides(victim)
            found.append(victim)
            held[worst[2]] -= count
            lacking -= count
        return found

    def _retry_s(self, flow: _Flow, *, new: bool = False) -> float:
        """When a place of the flow, or its turn for one, is likely to come."""
        rate, mean = self.estimate.rate, self.estimate.mean_work
        if not rate or not mean:
            return _UNKNOWN_RETRY_S
        return _clamped(mean / (rate * self._part(flow, new=new)))

    def _part(self, flow: _Flow, *, new: bool) -> float:
        """The flow's share by weight, of 1."""
        weights = sum(self._weight(other, new=False) for other in self._flows.values())
        ours = self._weight(flow, new=new)
        return ours / (weights + ours * new)

    def _take_away(self, place: Place, error: VeneerError) -> None:
        place.refuse(error)
        self._release(place)

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
        self._drop_backlog(place)
        for seat in list(place.seats):
            self._give_back(seat)
        samples, place.samples = place.samples, 0
        if not samples:
            return
        flow = place.flow
        self.taken -= place.unused
        flow.held -= place.unused
        place.count = place.unused = 0
        self.samples -= samples
        flow.samples -= samples
        flow.requests -= 1
        if not flow.requests:
            del self._flows[flow.key]
            self._ids[flow.key[0]] -= 1
            if not self._ids[flow.key[0]]:
                del self._ids[flow.key[0]]


def _order(place: Place) -> float:
    """Which request's samples are first, as in the engine's queue."""
    return place.since + PRIORITY_SECONDS * place.priority


def _newest(flow: _Flow) -> Iterator[Place | Seat]:
    """What a flow has that waits, in the order in which it makes room."""
    yield from reversed(flow.ahead)
    yield from filter(_besides, reversed(flow.waiting))


def _besides(place: Place) -> int:
    """Places of a request beside those that its further samples have in advance."""
    return place.count - sum(seat in place.flow.ahead for seat in place.seats)


def _clamped(seconds: float) -> float:
    return min(max(seconds, _LEAST_RETRY_S), _MOST_RETRY_S)
