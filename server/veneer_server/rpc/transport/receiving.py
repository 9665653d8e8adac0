"""Receiving requests: a bound on what requests may hold that have not arrived whole.

gRPC buffers a message until its last byte is there, and lets its sender take as long as
it likes. Only a stream that is being read may send more than its flow-control window
(`WINDOW`), so that the number of streams being read bounds the total. A read cannot be
paused. Who may be read is decided here: each request has a place while its message arrives.

Most messages have arrived whole before they are read, and need a place for a millisecond.
One that is not whole after `BRIEF_S` is slow. Slow messages must not keep others waiting:

* While another connection waits, slow messages keep at most `SLOW` places. Beyond that one is
  refused: on a late connection first, then on the one that has the most places.
* The other slow messages keep their places for `PATIENCE_S` or `GREEDY_PATIENCE_S` while
  anybody waits, and up to the time limit while nobody does.
* A connection whose message lost its place is late (see `standings`): for some seconds it is
  read after those that are not, a message at a time, and loses its place first.

Connections take turns. Every other free place goes to one that is not late, whose last
message was whole when it was read, and that has few requests waiting.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from veneer_registry.errors import Aborted, QueueFull

from veneer_server.queues.fair_queue import FairQueue
from veneer_server.rpc.transport.standings import Standings

__all__ = ["MAX_MESSAGE", "PLACES", "WAITING", "WINDOW", "Receiving"]

MAX_MESSAGE: Final = 4 << 20
"""Bytes of a message."""

PLACES: Final = 8
"""Requests that are being read at once; each may hold `MAX_MESSAGE` bytes."""

SLOW: Final = 4
"""Places that slow messages may keep while another connection waits."""

WAITING: Final = 512
"""Requests that wait to be read; each may hold `WINDOW` bytes."""

WINDOW: Final = 16 << 10
"""Bytes that a client may send on a stream before it is read."""

LIMIT_S: Final = 30.0
"""Longest time from a request's first byte to its last; the default of ``--reader-limit``."""

BRIEF_S: Final = 0.010
"""After this long a message that is being read counts as slow."""

PATIENCE_S: Final = 5.0
"""How long a message may take to arrive while others wait for its place."""

GREEDY_PATIENCE_S: Final = 1.0
"""The same where its connection has, or waits for, more than one place."""

FEW: Final = 8
"""Requests of a connection that is served before those with more, every other time."""

_LOOK_S: Final = 0.005
"""Between two looks at who is slow, while anybody waits."""

_SPREAD: Final = 0.1
"""Jitter of the time that a call waits for a place, as a share of the limit."""

_RETRY_S: Final = 1.0

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Place:
    """``looks``: how often it was seen to be slow."""

    peer: str
    since: float
    timeout: asyncio.Timeout | None = None
    looks: int = 0
    displaced: bool = False


class Receiving:
    """Who is being read. Belongs to one event loop.

    Attributes:
        limit_s: seconds from a request's first byte to its last.
    """

    def __init__(
        self,
        *,
        places: int = PLACES,
        slow: int = SLOW,
        waiting: int = WAITING,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._places = places
        self._slow = slow
        self._most_waiting = waiting
        self.limit_s = limit_s
        self._held: set[_Place] = set()
        self._queue: FairQueue[str, tuple[str, asyncio.Future[_Place]]] = FairQueue()
        """By connection."""
        self._standings = Standings(lambda: asyncio.get_running_loop().time())
        self._by_standing = True
        self._timer: asyncio.TimerHandle | None = None

    @property
    def held(self) -> int:
        """Requests that are being read now."""
        return len(self._held)

    @property
    def waiting(self) -> int:
        """Requests that wait to be read."""
        return len(self._queue)

    async def message(
        self,
        read: Callable[[], Awaitable[T]],
        peer: str,
        finish: Callable[[T], Awaitable[T]] | None = None,
    ) -> T:
        """What ``read`` gives, once this request may be read.

        Args:
            peer: the connection.
            finish: what to do with the whole message before its place is given back. It can
                no longer lose the place.

        Raises:
            QueueFull: too many requests are arriving.
            Aborted: the message was not whole within the limit.
        """
        place = await self._take(peer)
        try:
            async with asyncio.timeout(self.limit_s) as place.timeout:
                message = await read()
            place.timeout = None
            if asyncio.get_running_loop().time() - place.since < BRIEF_S:
                self._standings.was_prompt(peer)
            return message if finish is None else await finish(message)
        except TimeoutError as error:
            self._standings.was_late(peer, displaced=place.displaced)
            if place.displaced:
                raise QueueFull(
                    "the request arrived too slowly while others waited to be read: send it "
                    "again, on a connection of its own",
                    retry_after_s=_RETRY_S,
                ) from error
            raise Aborted(
                f"the request was not complete after {self.limit_s:g} s: send all of it at "
                "once, or start the server with a larger --reader-limit",
                metadata={"cause": "request_incomplete"},
            ) from error
        finally:
            self._held.discard(place)
            if self._queue:
                self._grant()

    async def _take(self, peer: str) -> _Place:
        if len(self._held) < self._places and not self._queue:
            mine = sum(peer == place.peer for place in self._held)
            if self._standings.may_be_read(peer, mine):
                return self._hold(peer)
        waiter: asyncio.Future[_Place] = asyncio.get_running_loop().create_future()
        self._join(peer, waiter)
        self._grant()
        try:
            # Not all at the same time: refusing hundreds at once stalls the event loop.
            async with asyncio.timeout(self.limit_s * (1 + random.random() * _SPREAD)):
                return await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._held.discard(waiter.result())  # granted, and the caller left
                self._grant()
            else:
                self._queue.remove(peer, (peer, waiter))
            if isinstance(error, TimeoutError):
                raise _too_many() from error
            raise

    def _hold(self, peer: str) -> _Place:
        place = _Place(peer, asyncio.get_running_loop().time())
        self._held.add(place)
        return place

    # --------------------------------------------------------------------- waiting

    def _join(self, peer: str, waiter: asyncio.Future[_Place]) -> None:
        """At the back of its connection's queue. Where too many wait, the last one of the
        longest queue is refused."""
        if len(self._queue) >= self._most_waiting:
            if self._queue.waiting(peer) >= self._queue.longest():
                raise _too_many()
            _, (_, last) = self._queue.pop_longest()
            if not last.done():
                last.set_exception(_too_many())
        self._queue.push(peer, (peer, waiter))

    def _grant(self) -> None:
        """Free places to those who wait."""
        while self._queue and len(self._held) < self._places:
            count = Counter(place.peer for place in self._held)
            found = self._queue.pop(self._rank(count))
            if found is None:
                break
            peer, waiter = found
            self._by_standing = not self._by_standing
            if not waiter.done():
                waiter.set_result(self._hold(peer))
        if self._queue and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _rank(self, held: Counter[str]) -> Callable[[str], tuple[int, ...] | None]:
        """The order of connections for the next place; None for one that is not read now."""

        def rank(peer: str) -> tuple[int, ...] | None:
            if not self._standings.may_be_read(peer, held[peer]):
                return None
            late = self._standings.late(peer)
            if not self._by_standing:
                return (late, held[peer])
            wanted = held[peer] + self._queue.waiting(peer)
            return (late, not self._standings.prompt(peer), wanted > FEW, held[peer])

        return rank

    # ---------------------------------------------------------------- displacement

    def _look(self) -> None:
        """Take places away from slow messages, and give free ones to those who wait."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        for place in self._held:
            # The second look counts: if the loop was late, it has yet to see what has
            # arrived meanwhile, and will before then.
            place.looks += now - place.since >= BRIEF_S
        while self._queue and (slow := self._to_displace(now)) is not None:
            slow.displaced = True
            assert slow.timeout is not None, "it is being read"
            slow.timeout.reschedule(now)
        self._grant()

    def _to_displace(self, now: float) -> _Place | None:
        """The place of a slow message that must go now, if any."""
        staying = [place for place in self._held if not place.displaced]
        if len(staying) < self._places:
            return None  # one is free, or becomes free
        slow = [place for place in staying if place.looks > 1 and place.timeout is not None]
        crowded = len(slow) > self._slow
        waiting = {peer for peer in self._queue if not self._standings.late(peer)}
        count = Counter(place.peer for place in staying)

        def order(place: _Place) -> tuple[float, ...] | None:
            age = now - place.since
            wanted = count[place.peer] + self._queue.waiting(place.peer)
            worn = age >= (GREEDY_PATIENCE_S if wanted > 1 else PATIENCE_S)
            if not worn and not (crowded and waiting - {place.peer}):
                return None
            late = self._standings.late(place.peer)
            return (late, count[place.peer], worn, age if worn else -age)

        orders = [(found, place) for place in slow if (found := order(place)) is not None]
        return max(orders, key=lambda each: each[0])[1] if orders else None


def _too_many() -> QueueFull:
    return QueueFull(
        "too many requests are arriving at once: retry, with fewer at a time on one connection",
        retry_after_s=_RETRY_S,
    )
