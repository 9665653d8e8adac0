"""A registry's record of its followers, and waiting until they have applied a change."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from veneer_server.replication.states import LEASE_S

WaitMode = Literal["none", "quorum", "all"]


@dataclass(frozen=True, slots=True)
class Wait:
    """How many followers a change waits for, and the maximum wait in seconds."""

    mode: WaitMode = "none"
    at_most_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Reached:
    """Result of a wait: the number of live followers, how many of them have applied the change,
    and whether that was enough."""

    live: int
    applied: int
    enough: bool


@dataclass(slots=True)
class _Follower:
    sequence: int
    heard: float


class Replicas:
    """The followers and their progress. Belongs to one event loop. A follower counts until its
    lease expires: one that is cut off may be back in a moment, and serves old revisions
    meanwhile."""

    def __init__(
        self, *, lease_s: float = LEASE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lease_s = lease_s
        self._clock = clock
        self._followers: dict[str, _Follower] = {}
        self._waiting: set[asyncio.Future[None]] = set()
        self._all_known = -math.inf
        """Time from which every follower that counts is known."""

    def begin(self) -> None:
        """Let no wait succeed for the time of a lease: followers of an earlier run may not have
        reconnected yet, and serve old revisions until they do."""
        self._all_known = self._clock() + self.lease_s

    def __len__(self) -> int:
        """Number of followers whose lease has not expired."""
        return len(self._live())

    def report(self, follower: str, sequence: int) -> None:
        """Note that a follower has applied the changes up to a number."""
        self._followers[follower] = _Follower(sequence, self._clock())
        self._wake()

    def leave(self, follower: str) -> None:
        """Remove a follower that has announced that it stops."""
        self._followers.pop(follower, None)
        self._wake()

    def count(self, sequence: int, mode: WaitMode) -> Reached:
        """How many followers have applied a change now."""
        return _found(self._live(), sequence, mode, known=self._clock() >= self._all_known)

    def everywhere(self, sequence: int) -> int:
        """The last change that all live followers have applied; ``sequence`` if there are none;
        0 while that cannot be known."""
        if self._clock() < self._all_known:
            return 0
        return min((each.sequence for each in self._live().values()), default=sequence)

    async def reached(self, sequence: int, wait: Wait) -> Reached | None:
        """Wait until enough followers have applied a change; return None at once for mode
        "none"."""
        if wait.mode == "none":
            return None
        end = self._clock() + wait.at_most_s
        while True:
            live, now = self._live(), self._clock()
            known = now >= self._all_known
            found = _found(live, sequence, wait.mode, known=known)
            if found.enough or now >= end:
                return found
            # Nothing wakes this when a lease or that time expires: look again then.
            next_look = min((each.heard + self.lease_s for each in live.values()), default=end)
            if not known:
                next_look = min(next_look, self._all_known)
            await self.changed(max(0.001, min(end, next_look) - now))

    def _live(self) -> dict[str, _Follower]:
        oldest = self._clock() - self.lease_s
        self._followers = {
            name: each for name, each in self._followers.items() if each.heard > oldest
        }
        return self._followers

    async def changed(self, within_s: float) -> None:
        """Wait until a follower reports or leaves, or until the timeout."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(told)
        try:
            await asyncio.wait({told}, timeout=within_s)
        finally:
            self._waiting.discard(told)

    def _wake(self) -> None:
        for told in self._waiting:
            if not told.done():
                told.set_result(None)


def _found(
    live: Mapping[str, _Follower], sequence: int, mode: WaitMode, *, known: bool
) -> Reached:
    applied = sum(each.sequence >= sequence for each in live.values())
    return Reached(len(live), applied, known and enough(len(live), applied, mode))


def enough(live: int, applied: int, mode: WaitMode) -> bool:
    """Whether as many have applied a change as a wait asks for."""
    if mode == "none" or not live:
        return True
    return applied >= (live if mode == "all" else live // 2 + 1)
