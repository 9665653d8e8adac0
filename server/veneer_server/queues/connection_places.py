"""Decides which connection is closed when more are open than allowed.

Connections that make progress keep their places. There are two kinds of connections: callers,
who have shown a valid key (on a server without keys: who have had a request answered
successfully), and strangers, as all are at first. Each kind has its own share: one place in
`NEWCOMERS` is kept for strangers, so that newcomers always get in, and no stranger takes a
caller's place.

Callers whose requests are all being answered may have all places for a while. Once they wait
again and somebody else connects, they give up the places beyond their share.

Within its kind, a connection that makes no progress (`STALLED_S`, `PROGRESS`) is closed first,
then the least recently used one of the host or tenant with the most connections. A connection
whose complete request is being answered is never closed.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

STALLED_S: Final = 2.0
"""A connection stalls if it sends fewer than `PROGRESS` bytes for this long."""

PROGRESS: Final = 8 << 10
"""Bytes in `STALLED_S` that count as progress: 4 KiB a second. Single bytes now and then do
not."""

NEWCOMERS: Final = 8
"""One place in this many is kept for connections that have shown no valid key yet."""


@dataclass(slots=True, eq=False)
class OpenConnection:
    """One open connection and its place.

    Attributes:
        host: its peer, see `host_of`.
        whose: the host or owner whose places it is counted with.
        owner: a caller's tenant, or its host if there are no keys; None for a stranger.
        since: when it last made progress.
        sent: bytes since then.
    """

    host: str
    whose: str
    since: float
    owner: str | None = None
    sent: int = 0
    queue: OrderedDict[OpenConnection, None] | None = field(default=None, repr=False)


_Queues = dict[str, OrderedDict[OpenConnection, None]]


class OpenConnections:
    """The open connections of one port; those that wait for their peer are queued. Belongs to
    one event loop."""

    def __init__(
        self, most: int, *, keyless: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args:
        most: maximum that should be open; the owner closes `victim` while there are more.
        keyless: whether callers need no key.
        clock: monotonic seconds.
        """
        self.most = most
        self.keyless = keyless
        self._clock = clock
        self._count = self._callers = 0
        self._of: Counter[str] = Counter()
        """Number of places: of strangers by host, of callers by owner."""
        # Places that wait, by host or owner, in order of their last progress. No inner queue
        # is empty.
        self._strangers: _Queues = {}
        self._watching: _Queues = {}
        self._sending: _Queues = {}
        self._resting: _Queues = {}
        self._callers_watching: _Queues = {}

    def __len__(self) -> int:
        return self._count

    def join(self, host: str, since: float | None = None) -> OpenConnection:
        """Add a connection that was opened and waits for its first request.

        Args:
            since: earliest time at which it was opened; None for now.
        """
        place = OpenConnection(host, f"host {host}", self._clock())
        self._count += 1
        self._of[place.whose] += 1
        self._wait(place, self._strangers)
        if since is not None and place.queue is not None:
            place.since = since
            later = []
            for each in reversed(place.queue):
                if each is not place and each.since <= since:
                    break
                later.append(each)
            for each in reversed(later[1:]):
                place.queue.move_to_end(each)
        return place

    def leave(self, place: OpenConnection) -> None:
        """Remove a connection that was closed, or is about to be."""
        self.busy(place)
        self._count -= 1
        self._callers -= place.owner is not None
        self._less(place.whose)

    def progressed(self, place: OpenConnection, size: int = PROGRESS) -> None:
        """Count bytes that a connection has sent or read."""
        place.sent += size
        if place.sent >= PROGRESS:
            place.sent, place.since = 0, self._clock()
            if place.queue is not None:
                place.queue.move_to_end(place)

    def busy(self, place: OpenConnection) -> None:
        """Note that a connection's request is complete and being answered."""
        if (queue := place.queue) is None:
            return
        del queue[place]
        place.queue = None
        if not queue:
            for queues in self._all:
                for name in (place.host, place.owner or ""):
                    if queues.get(name) is queue:
                        del queues[name]

    def waits(self, place: OpenConnection, *, asking: bool) -> None:
        """Note that a connection waits for its peer. Without keys, a caller with half a request
        is a stranger again until the request has been answered: anybody can send half of one.

        Args:
            asking: whether it waits for the rest of a request.
        """
        if asking and self.keyless:
            self._whose_is(place, None)
        if place.owner is None:
            self._wait(place, self._strangers)
        else:
            self._wait(place, self._sending if asking else self._resting)

    def watches(self, place: OpenConnection) -> None:
        """Note that a connection's calls only wait for news: it is closed after others of its
        kind that wait."""
        self._wait(place, self._watching if place.owner is None else self._callers_watching)

    def earns(self, place: OpenConnection, owner: str) -> OpenConnection | None:
        """Make a connection a caller's. Returns the caller's connection that must be closed in
        exchange, if any; call `leave` for it."""
        if place.owner == owner:
            return None
        waiting = place.queue is not None
        name = place.host if place.owner is None else place.owner
        watching = waiting and any(
            queues.get(name) is place.queue
            for queues in (self._watching, self._callers_watching)
        )
        self._whose_is(place, owner)
        if watching:
            self.watches(place)
        elif waiting:
            self._wait(place, self._resting if self.keyless else self._sending)
        return self._of_callers(place) if self.crowded else None

    @property
    def crowded(self) -> bool:
        """Whether callers have more places than their share."""
        return self._callers > self.most - max(1, self.most // NEWCOMERS)

    def victim(
        self, delayed: Iterable[OpenConnection] = (), before: float = float("inf")
    ) -> OpenConnection | None:
        """The connection to be closed next, if any.

        Args:
            delayed: strangers whose refusal is being delayed. They are closed after strangers
                that make no progress.
            before: do not choose a stranger that has made progress since this time.
        """
        found = self._worst(self._strangers, self._clock() - STALLED_S)
        found = found or next(iter(delayed), None)
        found = found or (self._of_callers(None) if self.crowded else None)
        if found or self._strangers:
            return found or self._worst(self._strangers, before)
        return self._worst(self._watching) or (self._of_callers(None) if self.keyless else None)

    def alone(self, place: OpenConnection) -> bool:
        """Whether no other connection waits that could be closed in favour of this stranger."""
        mine = self._strangers.get(place.host)
        others = len(self._strangers) > 1 or mine is None or len(mine) > 1 or self._watching
        callers = self._resting or self._sending or self._callers_watching
        return not others and not ((self.keyless or self.crowded) and callers)

    @property
    def _all(self) -> tuple[_Queues, ...]:
        return (
            self._strangers,
            self._watching,
            self._sending,
            self._resting,
            self._callers_watching,
        )

    def _of_callers(self, but: OpenConnection | None) -> OpenConnection | None:
        """The caller's connection to be closed next, but not ``but``."""
        late = self._clock() - STALLED_S
        if (found := self._worst(self._sending, late)) not in (None, but):
            return found
        resting = (*self._resting.values(), *self._sending.values())
        return self._of_most(resting, but=but) or self._of_most(
            self._callers_watching.values(), but=but
        )

    def _worst(self, queues: _Queues, before: float = float("inf")) -> OpenConnection | None:
        """The connection that made progress longest ago, of the host or owner with the most;
        only one without progress since ``before``."""
        return self._of_most(queues.values(), before)

    def _of_most(
        self,
        queues: Iterable[OrderedDict[OpenConnection, None]],
        before: float = float("inf"),
        but: OpenConnection | None = None,
    ) -> OpenConnection | None:
        worst, most = None, 0
        for queue in queues:
            first = next((each for each in queue if each is not but), None)
            if first is None or first.since >= before:
                continue
            if (count := self._of[first.whose]) > most:
                worst, most = first, count
        return worst

    def _whose_is(self, place: OpenConnection, owner: str | None) -> None:
        if place.owner != owner:
            self.busy(place)
            self._less(place.whose)
            self._callers += (owner is not None) - (place.owner is not None)
            place.owner = owner
            place.whose = f"host {place.host}" if owner is None else f"owner {owner}"
            self._of[place.whose] += 1

    def _wait(self, place: OpenConnection, queues: _Queues) -> None:
        name = place.owner if place.owner is not None else place.host
        if place.queue is not None and place.queue is queues.get(name):
            return
        self.busy(place)
        # Counted from now: it may have rested, or been answered, for an hour before.
        place.since, place.sent = self._clock(), 0
        queue = queues.setdefault(name, OrderedDict())
        queue[place] = None
        place.queue = queue

    def _less(self, whose: str) -> None:
        self._of[whose] -= 1
        if not self._of[whose]:
            del self._of[whose]


def host_of(caller: str) -> str:
    """The host that a caller counts as: an IPv4 address, or an IPv6 /64, since one machine may
    have a whole /64.

    Args:
        caller: ``host:port``, with or without brackets.
    """
    host = caller.rpartition(":")[0].strip("[]").partition("%")[0].removeprefix("::ffff:")
    if ":" not in host:
        return host
    try:
        return str(ipaddress.ip_network(f"{host}/64", strict=False))
    except ValueError:
        return host
