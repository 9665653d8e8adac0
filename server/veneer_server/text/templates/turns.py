"""Whose chat a template process renders next: the sender's with the least recent CPU time.

CPU time is charged to the tenant, to its key, to the key's user, to the connection and to the
template, and compared in this order, so that a sender's share does not depend on how many
connections it opens or templates it uploads. New templates cannot be told from slow ones. So a
party's template counts as having used `NEW_S` until it has been quick once. What one party's
chats cost with a template does not count for another party's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Iterable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from veneer_registry.errors import QueueFull

from veneer_server.queues.fair_queue import FairQueue
from veneer_server.queues.fairness import Sender
from veneer_server.queues.recent import Recent

__all__ = ["Accounts", "Key", "Turns"]

MAX_WAITING: Final = 64
"""Most renderings of one template that may wait for one connection."""

NEW_S: Final = 0.25
"""CPU time charged to a template until it has been quick once."""

CREDIT_S: Final = 0.05
"""CPU time that one who comes back may have used less than those who are waiting: so nobody is
first for long."""

_HALF_LIFE_S: Final = 10.0
"""Time after which used CPU time counts half."""

_KNOWN: Final = 1000

Key = tuple[Sender, bytes]
"""Whose renderings wait for which template (a digest)."""

N = TypeVar("N", bound=Hashable)


class Accounts:
    """Recent CPU time of senders, at each level, and of their templates."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Args: clock: seconds."""
        self._clock = clock
        self._levels = [_Used[tuple[str, ...]](clock) for _ in Sender._fields]
        self._templates = _Used[tuple[tuple[str, ...], bytes]](clock)
        self._quick: Recent[tuple[tuple[str, ...], bytes], bool] = Recent(_KNOWN)

    def charge(self, key: Key, seconds: float, *, quick: bool) -> None:
        """Count a rendering's CPU time, and whether it was quick."""
        sender, template = key
        for depth, level in enumerate(self._levels, start=1):
            level.add(sender[:depth], seconds)
        self._templates.add((sender.party, template), seconds)
        if quick:
            self._quick[sender.party, template] = True

    def begin(self, key: Key, active: Iterable[Key]) -> None:
        """A sender comes: at each level it counts as having used not much less than those
        that have renderings waiting, or running."""
        mine, others = key[0], {each for each, _ in active}
        now = self._clock()
        for depth, level in enumerate(self._levels, start=1):
            others = {each for each in others if each[: depth - 1] == mine[: depth - 1]}
            names = {each[:depth] for each in others}
            if names and mine[:depth] not in names:
                least = min(level.of(name, now) for name in names)
                level.add(mine[:depth], least - CREDIT_S - level.of(mine[:depth], now))

    def ranks(self) -> Callable[[Key], tuple[float, ...]]:
        """Sort key as of now: the lowest is next. The last figure orders a connection's own
        templates."""
        now = self._clock()
        *outer, connections = self._levels
        # Hundreds of connections may wait, most of them of one party.
        parties: dict[tuple[str, ...], tuple[float, ...]] = {}
        templates: dict[tuple[tuple[str, ...], bytes], tuple[float, float]] = {}

        def rank(key: Key) -> tuple[float, ...]:
            sender, template = key
            party = sender.party
            if (levels := parties.get(party)) is None:
                levels = parties[party] = tuple(
                    level.of(sender[:depth], now) for depth, level in enumerate(outer, start=1)
                )
            if (found := templates.get((party, template))) is None:
                least = 0.0 if (party, template) in self._quick else NEW_S
                used = self._templates.of((party, template), now) + least
                found = templates[party, template] = least, used
            least, used = found
            if least:
                levels = tuple(max(least, each) for each in levels)
            return (*levels, max(least, connections.of(sender, now)), used)

        return rank


class _Used(Recent[N, tuple[float, float]]):
    """CPU seconds, and when they were counted."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(_KNOWN)
        self._clock = clock

    def add(self, name: N, seconds: float) -> None:
        if seconds > 0:
            self[name] = self.of(name) + seconds, self._clock()

    def of(self, name: N, now: float | None = None) -> float:
        if (counted := self.get(name)) is None:
            return 0.0
        seconds, at = counted
        since = (self._clock() if now is None else now) - at
        return float(seconds * 0.5 ** (since / _HALF_LIFE_S))


class Turns:
    """Lets one rendering at a time use a process. Belongs to one event loop."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._busy: Key | None = None
        self._queue: FairQueue[Key, asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def turn(self, key: Key) -> AsyncIterator[None]:
        """Hold the process exclusively. Raises QueueFull."""
        if self._busy is not None:
            await self._wait(key, self._busy)
        self._busy = key
        try:
            yield
        finally:
            self._next()

    async def _wait(self, key: Key, busy: Key) -> None:
        if self._queue.waiting(key) >= MAX_WAITING:
            raise QueueFull(
                f"{MAX_WAITING} chats of this caller are waiting for the same slow chat "
                "template: retry later, or send `prompt`",
                retry_after_s=1.0,
            )
        self._accounts.begin(key, (busy, *self._queue))
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.push(key, waiter)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._next()
            else:
                self._queue.remove(key, waiter)
            raise

    def _next(self) -> None:
        """Pass the turn to the next waiter; the process stays busy until it takes over."""
        while (waiter := self._queue.pop(self._accounts.ranks())) is not None:
            if not waiter.done():
                waiter.set_result(None)
                return
            # Its caller has left, and others perhaps with it: all at once.
            self._queue.drop(asyncio.Future.done)
        self._busy = None
