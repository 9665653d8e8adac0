"""Places among the running and waiting sequences: a queue per tenant, with a shared limit.

A request takes one place when it is let in, for its first sample, so that it is refused either
before its first token or not at all. Its further samples wait here, without a place, until they
can run: while fewer sequences have places than may run at once, and a few more in advance
(`_AHEAD`), so that the engine has a choice. Flows (a tenant, or one of the users that a gateway
calls for) take turns at that: the flow with the fewest places for its weight is next.

Any tenant may use all free places. When there are none, a request is let in at the expense of
the flow that has most places for its weight, if that has more than the newcomer would have: one
of its further samples that has no token yet gives its place back and waits again; if there is
none, its newest request without a token is refused. A sample that has had a token keeps its
place until its last token, and a request that has had a token is never refused. So a flow with
less than its share by weight gets in, no matter how much others queue, unless all that could
make room is already running.

A sample whose last token has arrived has no place, whether or not its caller reads it. While a
request has such unread samples, its further samples wait, since unread output takes memory.

Refusals are made here, without asking the engine, and say when to retry.
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
"""Why a request was refused. In this order: there is no place; its place went to a tenant that
had fewer for its weight; it would wait or has waited longer than `--max-queue-wait`; it would
wait past its deadline."""

REFUSALS: Final[tuple[Refusal, ...]] = get_args(Refusal)

SAMPLES: Final = 8
"""Samples that requests may have here, with a place or without, per place. Samples only take
memory; beyond this limit only flows with less than their share are let in."""

_AHEAD: Final = 4
"""The number of sequences that may run at once, divided by this, is how many further samples
may have a place in advance. Beyond that, each tenant may still have one such sample, so that it
gets its turn in the engine beside the tenants that queue there."""

_UNKNOWN_RETRY_S: Final = 1.0
_LEAST_RETRY_S: Final = 0.1
_MOST_RETRY_S: Final = 60.0


class Fails(Protocol):
    """A stream of outputs that can be ended."""

    def fail(self, error: VeneerError) -> None: ...


class Place:
    """A request's places, and its samples that wait for a place.

    Attributes:
        count: number of places that it has now.
        since: when it was let in, in monotonic seconds.
        priority: priority of its samples within its flow; lower is earlier.
        work: work of its sequences, as `WaitEstimate` counts it.
        started: whether one of its samples has had an output.
    """

    def __init__(self, flow: _Flow, samples: int, count: int) -> None:
        """Args:
        samples: number of samples that it asks for.
        count: number of places that it takes at once.
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
        """Number of its places that no sample has used yet."""
        self.seats: dict[Seat, None] = {}
        self.backlog: list[tuple[bool, int, asyncio.Future[Seat]]] = []
        """A heap of its waiting samples, beginning with samples of prompts already computed."""
        self.unread = 0
        """Number of samples that the engine has ended, but whose end is not read yet."""
        self._error: VeneerError | None = None

    @property
    def refused(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Raise the error with which the request was refused, if it was."""
        if self._error is not None:
            raise self._error

    def refuse(self, error: VeneerError) -> None:
        """End the request's streams with an error, and let `check` raise it from now on."""
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
        turn: the sample's order among the request's waiting samples; None if the place was
            the request's from the start.
        started: whether the sample has had an output.
        returned: whether the sample must wait again, because another request needed the place.
        unread: whether the engine has ended the sample and its caller has not read the end.
        stream: the sample's stream.
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
    """The requests and places of one fairness key.

    Attributes:
        held: number of places.
        samples: number of its requests' samples, with a place or without.
        requests: number of requests.
        waiting: requests without an output.
        ahead: further samples that have a place and no output.
        backlog: requests with samples that wait for a place.
        work: total work of `waiting`.
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
    """Gives places to requests, or refuses them. Belongs to one asyncio event loop.

    Attributes:
        capacity: most sequences running and waiting at once.
        taken: number of places taken; samples that wait for a place have none.
        samples: number of all requests' samples, with a place or without.
        estimate: estimates waiting times.
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
        """Per tenant, the number of its further samples that have a place and no output."""
        self._backlog: dict[_Flow, None] = {}
        self._unread: dict[Place, None] = {}
        """Requests whose samples wait until ended samples are read; these are in no backlog."""
        self._turns = itertools.count()
        self._max_wait_s = max_wait_s
        self._on_refused = on_refused
        self._flows: dict[tuple[str, str], _Flow] = {}
        self._ids: Counter[str] = Counter()
        """Per tenant, the number of its flows, which share its weight."""

    def waiting(self) -> dict[str, int]:
        """Places of sequences without a first token, counted for each tenant with any. May be
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
        """Hold a request's places while the block runs.

        Args:
            count: number of samples that it asks for, over all its prompts.
            whose: the request's fairness key and weight; None for the server itself.
            within_s: seconds within which the first token is due.
            at_once: number of places that it must have from the start.

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
        """Take one of the request's places that no sample has used yet; None if there is
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
            sibling: whether the prompt's first sample has been computed. Such a sample goes
                before samples of other prompts, while the prefix is likely to be in the cache.
            after: the place that the sample had to give back, if any.

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
        """Record that a sequence of the place is about to be submitted."""
        place.priority = request.priority
        if place in place.flow.waiting:
            each = token_work(request.adapter, base_parameters)
            work = self.estimate.work(len(request.prompt), request.max_tokens, each)
            place.work += work
            place.flow.work += work

    def started(self, seat: Seat) -> None:
        """Record that a sequence has had an output and no longer waits."""
        if seat.started or seat.returned:  # the output of a returned one is dropped
            return
        seat.started = True
        if not seat.place.started:
            self._begin(seat.place)
        if self._settle(seat):
            self._hand_out()

    def ended(self, seat: Seat) -> None:
        """Free the place of a sample that the engine has ended, even if its caller has not read
        the output. Idempotent."""
        if self._give_back(seat):
            seat.unread = True
            seat.place.unread += 1
            self._wait(seat.place)
            self._hand_out()

    def leave(self, seat: Seat) -> None:
        """Free the place of a sample whose caller has read its end, or does not want it.
        Idempotent."""
        if self._give_back(seat) or seat.unread:
            place = seat.place
            if seat.unread:
                seat.unread = False
                place.unread -= 1
                self._wait(place)
            if place.samples > 1:  # the last sample counts until the request ends
                place.samples -= 1
                place.flow.samples -= 1
                self.samples -= 1
            self._hand_out()

    def fail(self, error: VeneerError) -> None:
        """Fail the samples that wait for a place, because the engine has ended."""
        wait = [place for flow in self._backlog for place in flow.backlog]
        for place in (*wait, *self._unread):
            for _, _, waits in place.backlog:
                if not waits.done():
                    waits.set_exception(error)
            self._drop_backlog(place)

    def expected_wait(self, whose: Fairness) -> float:
        """Estimate the seconds that a new request would wait for its turn; 0 if unknown."""
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
        """Return the flow whose sample is next: of the flows that may get a place, the one with
        the fewest for its weight."""
        flows: Iterable[_Flow] = self._backlog
        if self.taken >= self._running and self._ahead.total() >= self._most_ahead:
            flows = (flow for flow in flows if not self._ahead[flow.key[0]])
        weighed = ((flow.held / self._weight(flow, new=False), flow) for flow in flows)
        return min(weighed, key=lambda each: each[0], default=(0.0, None))[1]

    def _wait(self, place: Place) -> None:
        """Let the request's waiting samples, if any, wait for a place or, while it has unread
        ended samples, for its caller."""
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
            waits.cancel()  # no-op if the caller has left, or was told already
        place.backlog.clear()
        self._leave_backlog(place)

    def _leave_backlog(self, place: Place) -> None:
        flow = place.flow
        self._unread.pop(place, None)
        flow.backlog.pop(place, None)
        if not flow.backlog:
            self._backlog.pop(flow, None)

    def _begin(self, place: Place) -> None:
        """Mark a request as started: it can no longer be refused, but its samples without an
        output can be sent back to wait."""
        place.started = True
        self._stop_waiting(place)
        for seat in place.seats:
            if not seat.started and seat not in place.flow.ahead:
                place.flow.ahead[seat] = None
                self._ahead[place.flow.key[0]] += 1

    def _settle(self, seat: Seat) -> bool:
        """Stop counting a place as one in advance; return whether it was."""
        flow = seat.place.flow
        if seat not in flow.ahead:
            return False
        del flow.ahead[seat]
        self._ahead[flow.key[0]] -= 1
        if not self._ahead[flow.key[0]]:
            del self._ahead[flow.key[0]]
        return True

    def _give_back(self, seat: Seat) -> bool:
        """Free a sample's place; return whether the sample still had it."""
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
        """Raise QueueFull if there would be too many samples, and the flow's would exceed its
        share of them."""
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
        """Make room for ``count`` more places, if need be at the expense of others. Raises
        QueueFull if that is not possible, and then has changed nothing."""
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
        """Choose as many requests and samples as must make room; None if there are too few.

        First come further samples of the flow itself, all but one, which would wait for ever
        otherwise. Then come those of the flows that have more than ``most`` places for their
        weight, always from the one that has most: its further samples, and when there are
        none, its newest waiting requests."""
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
            if victim is None:  # everything it has is running
                del held[worst[2]]
                continue
            count = 1 if isinstance(victim, Seat) else _besides(victim)
            found.append(victim)
            held[worst[2]] -= count
            lacking -= count
        return found

    def _retry_s(self, flow: _Flow, *, new: bool = False) -> float:
        """Estimate the seconds until a place of the flow, or its turn for one, is likely to
        come."""
        rate, mean = self.estimate.rate, self.estimate.mean_work
        if not rate or not mean:
            return _UNKNOWN_RETRY_S
        return _clamped(mean / (rate * self._part(flow, new=new)))

    def _part(self, flow: _Flow, *, new: bool) -> float:
        """The flow's share by weight, as a fraction."""
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
        """Give back everything that a request has. Idempotent."""
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
    """Sort key of requests whose samples wait; the same order as in the engine's queue."""
    return place.since + PRIORITY_SECONDS * place.priority


def _newest(flow: _Flow) -> Iterator[Place | Seat]:
    """Yield a flow's waiting samples and requests, in the order in which they make room."""
    yield from reversed(flow.ahead)
    yield from filter(_besides, reversed(flow.waiting))


def _besides(place: Place) -> int:
    """Number of a request's places, without those that its further samples have in advance."""
    return place.count - sum(seat in place.flow.ahead for seat in place.seats)


def _clamped(seconds: float) -> float:
    return min(max(seconds, _LEAST_RETRY_S), _MOST_RETRY_S)
