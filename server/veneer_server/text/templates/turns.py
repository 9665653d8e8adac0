"""Fair queueing for a template process: the key with the least recent CPU time is next.

New templates cannot be told from slow ones, and a caller may upload many. So a template
counts as having used `NEW_S` until it has been quick once, and CPU time is charged both to
the template and to the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from veneer_registry.errors import QueueFull

from veneer_server.queues.fair_queue import FairQueue
from veneer_server.queues.recent import Recent

__all__ = ["Accounts", "Turns"]

MAX_WAITING: Final = 64
"""Most renderings of one template that may wait."""

NEW_S: Final = 0.25
"""CPU time charged to a template until it has been quick once."""

_HALF_LIFE_S: Final = 10.0
"""Time after which used CPU time counts half."""

_KNOWN: Final = 1000


class Accounts:
    """Recent CPU time of templates and callers."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Args: clock: seconds."""
        self._clock = clock
        self._templates: Recent[bytes, tuple[float, float]] = Recent(_KNOWN)
        """CPU seconds, and when they were counted."""
        self._callers: Recent[str, tuple[float, float]] = Recent(_KNOWN)
        self._quick: Recent[bytes, bool] = Recent(_KNOWN)

    def charge(self, template: bytes, caller: str, seconds: float, *, quick: bool) -> None:
        """Count a rendering's CPU time, and whether it was quick."""
        now = self._clock()
        self._templates[template] = self._left(self._templates.get(template)) + seconds, now
        self._callers[caller] = self._left(self._callers.get(caller)) + seconds, now
        self._quick[template] = quick

    def rank(self, template: bytes, caller: str) -> tuple[float, float]:
        """Sort key: the lowest is next. The second figure orders a caller's own templates."""
        used = self._left(self._templates.get(template))
        if not self._quick.get(template):
            used += NEW_S
        return max(used, self._left(self._callers.get(caller))), used

    def _left(self, counted: tuple[float, float] | None) -> float:
        if counted is None:
            return 0.0
        seconds, at = counted
        return float(seconds * 0.5 ** ((self._clock() - at) / _HALF_LIFE_S))


class Turns:
    """Lets one rendering at a time use a process. Belongs to one event loop."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._busy = False
        self._queue: FairQueue[tuple[bytes, str], asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def turn(self, template: bytes, caller: str) -> AsyncIterator[None]:
        """Hold the process exclusively. Raises QueueFull."""
        if self._busy:
            await self._wait(template, caller)
        self._busy = True
        try:
            yield
        finally:
            self._next()

    async def _wait(self, template: bytes, caller: str) -> None:
        same = (key for key in self._queue if key[0] == template)
        if sum(map(self._queue.waiting, same)) >= MAX_WAITING:
            raise QueueFull(
                f"{MAX_WAITING} chats are waiting for the adapter's slow chat template: retry "
                "later, or send `prompt`",
                retry_after_s=1.0,
            )
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.push((template, caller), waiter)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._next()
            else:
                self._queue.remove((template, caller), waiter)
            raise

    def _next(self) -> None:
        """Pass the turn to the next waiter; the process stays busy until it takes over."""
        while (waiter := self._queue.pop(lambda key: self._accounts.rank(*key))) is not None:
            if not waiter.done():
                waiter.set_result(None)
                return
        self._busy = False
