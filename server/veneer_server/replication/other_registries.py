"""A registry's part among others that share its catalog: tells them how far it and its
followers are, and waits for them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from veneer_registry.errors import VeneerError

from veneer_server.logs import get_logger
from veneer_server.replication.feed import Feed
from veneer_server.replication.replicas import Reached, Replicas, Wait, enough

if TYPE_CHECKING:
    from veneer_registry.shared.peers import Others, RegistryPeers

ANNOUNCE_S: Final = 1.0
"""Seconds between two announcements while nothing changes."""

_LOOK_S: Final = 0.05
"""Seconds between two looks at what others have announced, while a change waits for them."""

_MOST_MARKS: Final = 1000
"""Changes that are told apart while a follower is behind."""

_log = get_logger(__name__)

T = TypeVar("T")


class OtherRegistries:
    """Belongs to one event loop."""

    def __init__(self, feed: Feed, replicas: Replicas, shared: RegistryPeers) -> None:
        self._feed = feed
        self._replicas = replicas
        self._shared = shared
        self._marks: deque[tuple[int, dict[str, int]]] = deque()
        """Numbers of the feed, each with the catalogs' numbers that are all in it."""
        self._reached: dict[str, int] = {}
        self._announced: dict[str, int] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="registries")
        self._task: asyncio.Task[None] | None = None
        self._away = False

    def start(self) -> None:
        """Begin to announce."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop, and tell the others not to wait for this registry. Its followers count until
        their leases expire: cut off, they serve what they have."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if not len(self._replicas):
            try:
                await self._in_thread(self._shared.leave)
            except VeneerError as error:  # its lease ends soon
                _log.info("other registries not told of the stop", why=str(error))
        self._shared.close()
        await asyncio.to_thread(self._threads.shutdown)

    async def _in_thread(self, call: Callable[..., T], *given: object) -> T:
        """Call something that waits for the database, in threads that nothing else needs."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(call, *given))

    async def reached(self, tenant: str, number: int, sequence: int, wait: Wait) -> Reached:
        """Wait until enough of all followers and other registries have a change.

        Args:
            number: of the change in the tenant's catalog.
            sequence: of the change in this registry's feed.
        """
        end = time.monotonic() + wait.at_most_s
        others: Others | None = None
        while True:
            own = self._replicas.count(sequence, wait.mode)
            live, applied = own.live, own.applied
            with suppress(VeneerError, TimeoutError):  # what was known last counts
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    others = await self._in_thread(self._shared.others, tenant, number)
            if others is not None:
                live, applied = live + others.live, applied + others.applied
            known = own.enough and others is not None
            found = Reached(live, applied, known and enough(live, applied, wait.mode))
            left_s = end - time.monotonic()
            if found.enough or left_s <= 0:
                return found
            await self._replicas.changed(min(_LOOK_S, left_s))

    async def _run(self) -> None:
        announced = -ANNOUNCE_S
        while not self._feed.closed:
            try:
                moved = await self._look()
                if moved or time.monotonic() >= announced + ANNOUNCE_S:
                    followers, reached = len(self._replicas), dict(self._reached)
                    new = {t: n for t, n in reached.items() if self._announced.get(t) != n}
                    await self._in_thread(self._shared.announce, followers, new)
                    self._announced = reached
                    announced = time.monotonic()
                    self._away = False
            except VeneerError as error:
                self._announced = {}
                if not self._away:
                    _log.warning(
                        "other registries cannot be told what this one has: changes there will "
                        "not wait for its followers",
                        why=str(error),
                    )
                self._away = True
            except Exception as error:  # nothing may end the loop
                _log.error("announcing failed", error)
            await _first(
                self._feed.beyond(self._feed.sequence, ANNOUNCE_S / 2),
                self._replicas.changed(ANNOUNCE_S / 2),
            )

    async def _look(self) -> bool:
        """Find out what this registry and all its followers have. Return whether that is more
        than before."""
        numbers = self._feed.told_by_tenant()
        await asyncio.sleep(0)  # then the feed has all that these numbers stand for
        if not self._marks or self._marks[-1][1] != numbers:
            if len(self._marks) >= _MOST_MARKS:  # a follower is far behind
                self._marks.pop()
            self._marks.append((self._feed.sequence, numbers))
        everywhere = self._replicas.everywhere(self._feed.sequence)
        before = self._reached
        while self._marks and self._marks[0][0] <= everywhere:
            self._reached = self._marks[0][1]
            if len(self._marks) == 1:
                break
            self._marks.popleft()
        return self._reached != before


async def _first(*awaited: Awaitable[object]) -> None:
    """Wait for the first of these, and cancel the others."""
    tasks = [asyncio.ensure_future(each) for each in awaited]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
