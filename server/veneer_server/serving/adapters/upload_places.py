"""Places for uploads: how many run at once, and which one gives way to another.

All tenants share the places. A tenant that has fewer than its share gets one that another
tenant has beyond its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from veneer_registry.errors import QuotaExceeded

from veneer_server.queues.upload_flow import UploadFlow

__all__ = [
    *("DEADLINE_S", "LONG_S", "MAX_AT_ONCE", "MAX_DISCARDS", "MIN_RATE", "PATIENCE_S"),
    *("TURN_S", "WINDOW_S", "UploadPace", "UploadPlaces"),
]

WINDOW_S: Final = 60.0
"""Seconds over which an upload's rate is measured; it may be silent for this long."""

MIN_RATE: Final = 16 << 10
"""Default of ``--min-upload-rate``, in bytes a second. A 1 Mbit/s line, with 125,000, is far
above it."""

PATIENCE_S: Final = 10.0
"""As `WINDOW_S`, for an upload while another one waits for its place."""

DEADLINE_S: Final = 3600.0
"""Default of ``--upload-deadline``."""

TURN_S: Final = 60.0
LONG_S: Final = 600.0
"""An upload that has had its place for `TURN_S`, and at its rate so far would need `LONG_S`
more, loses the place when another upload needs it."""

MAX_AT_ONCE: Final = 8

MAX_DISCARDS: Final = 4
"""Uploads beyond `MAX_AT_ONCE` that may finish sending; each may hold a message."""

T = TypeVar("T")


class UploadPace:
    """Whether an upload arrives fast enough: in each `WINDOW_S` of waiting for its client,
    ``min_rate`` bytes a second must arrive, or the upload's end. So the total waiting time
    is at most its size divided by the rate, plus one window. Our own processing time counts
    only towards ``deadline_s``, the limit for the whole upload.
    """

    def __init__(self, min_rate: int, deadline_s: float = DEADLINE_S) -> None:
        self._min_rate = min_rate
        self._window_s = WINDOW_S
        self._began = asyncio.get_running_loop().time()
        self._ends = self._began + deadline_s
        self._waited_s = 0.0
        """Waiting time since enough bytes last arrived."""
        self._brought = 0
        self._held_s = 0.0
        self._total = 0
        self._missing = 0
        self._waiting_since: float | None = None
        self._timeout: asyncio.Timeout | None = None
        self.displaced = False

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return asyncio.get_running_loop().time() >= self._ends

    @property
    def missing(self) -> int:
        """Bytes that are still to come; 0 if not known yet."""
        return self._missing

    @property
    def receiving(self) -> bool:
        """Whether its client still has something to send."""
        return self._missing > 0 or self._waiting_since is not None

    @property
    def slow(self) -> bool:
        """Whether its client is so slow that another upload may take its place."""
        if self._waiting_since is None:
            return False
        waited_s = self._waited_s + asyncio.get_running_loop().time() - self._waiting_since
        return (
            not self.displaced
            and waited_s >= min(PATIENCE_S, self._window_s)
            and self._brought < self._min_rate * waited_s
        )

    @property
    def remaining_s(self) -> float:
        """How long the rest will take at the rate so far; 0 if not known yet."""
        has_taken_s = asyncio.get_running_loop().time() - self._began - self._held_s
        if has_taken_s < TURN_S or self.displaced or self._waiting_since is None:
            return 0.0
        return self._missing * has_taken_s / max(1, self._total)

    def displace(self) -> None:
        """End the upload, because another one gets its place."""
        self.displaced = True
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def held(self, seconds: float) -> None:
        """Record time for which the server held the upload back; it does not count."""
        self._held_s += seconds

    def progressed(self, count: int, missing: int = 0) -> None:
        """Record ``count`` new bytes; ``missing`` are still to come."""
        self._total += count
        self._missing = missing
        self._brought += count
        if self._brought >= self._min_rate * self._window_s:
            self._brought, self._waited_s = 0, 0.0

    async def wait(self, receive: Callable[[], Awaitable[T]]) -> T:
        """The client's next message. Raises TimeoutError if the client is too slow."""
        loop = asyncio.get_running_loop()
        began = self._waiting_since = loop.time()
        if self.displaced:
            raise TimeoutError
        try:
            until = min(began + self._window_s - self._waited_s, self._ends)
            async with asyncio.timeout_at(until) as self._timeout:
                return await receive()
        finally:
            self._timeout = self._waiting_since = None
            self._waited_s += loop.time() - began


class UploadPlaces:
    """Places for uploads, and the threads that do their work. Belongs to one event loop.

    Attributes:
        discarding: refused uploads that may finish sending.
        flow: how fast uploads are received.
        workers: at normal priority: at a low one, a thread that holds the GIL may get no CPU
            time to release it, and the event loop would wait for it. What takes long, the
            check, runs in a process of its own.
    """

    def __init__(self, flow: UploadFlow | None = None) -> None:
        """Args:
        flow: None for as fast as uploads come.
        """
        self.discarding = 0
        self.flow = flow or UploadFlow(lambda: False)
        self.workers = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="upload")
        self._running: dict[UploadPace, str] = {}
        """Whose each upload is; oldest first."""

    def take(self, tenant: str, pace: UploadPace) -> None:
        """Take a place. If none is free, that of an upload that is slow or has long to go, or
        of a tenant that has more than its share. Raises QuotaExceeded."""
        if len(self._running) >= MAX_AT_ONCE:
            leaves = self._slow() or self._beyond_share(tenant)
            if leaves is None:
                raise QuotaExceeded(
                    f"{MAX_AT_ONCE} uploads are already running: retry when one has ended",
                    metadata={"limit": str(MAX_AT_ONCE)},
                    retry_after_s=2.0,
                )
            leaves.displace()
            del self._running[leaves]
        self._running[pace] = tenant

    def leave(self, pace: UploadPace) -> None:
        """Give a place back. Does nothing if another upload has it already."""
        self._running.pop(pace, None)

    def _slow(self) -> UploadPace | None:
        slow = next((pace for pace in self._running if pace.slow), None)
        if slow is not None:
            return slow
        longest = max(self._running, key=lambda pace: pace.remaining_s)
        return longest if longest.remaining_s > LONG_S else None

    def _beyond_share(self, tenant: str) -> UploadPace | None:
        """The upload with most bytes to come, of the tenant that has most places; None if that
        has no more than its share, or this tenant has its own."""
        held = Counter(self._running.values())
        share = MAX_AT_ONCE // len({*held, tenant})
        most, places = held.most_common(1)[0]
        if held[tenant] >= share or places <= share:
            return None
        running = self._running.items()
        theirs = [pace for pace, whose in running if whose == most and pace.receiving]
        return max(theirs, key=lambda pace: pace.missing, default=None)
