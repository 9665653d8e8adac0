"""Delays refusals of invalid requests to hosts that send many of them.

Receiving, parsing and refusing a request costs CPU time, and a client that ignores errors
retries at once. Only these refusals are delayed: not valid requests from the same host, nor
refusals because the server is busy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from veneer_server.queues.recent import Recent

RATE: Final = 100
"""Refusals per second and host that are not delayed; the default of ``--refusal-rate``."""

BURST: Final = 32
"""Refusals in a row that are not delayed, after a time without any."""

PIECE: Final = 64 << 10
"""Bytes of a request that count as much as one more refusal."""

LONGEST_S: Final = 3.0
"""Longest delay of a refusal."""

MOST: Final = 512
"""Refusals that are delayed at the same time; more are sent at once."""

_KNOWN: Final = 4096
"""Maximum number of hosts that are remembered."""


class RefusalPace:
    """Delays refusals. Belongs to one event loop."""

    def __init__(
        self, rate: float = RATE, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args:
        rate: refusals per second and host that are not delayed; 0 delays none.
        clock: seconds.
        """
        self._rate = rate
        self._clock = clock
        self._due: Recent[str, float] = Recent(_KNOWN)
        """By host: the time until which its refusals so far use up ``rate`` per second."""
        self._delayed: dict[str, int] = {}
        """Callers in order of arrival, and how many of their refusals are being delayed."""
        self._count = 0
        self._stopped = asyncio.Event()

    def charge(self, caller: str, size: int = 0) -> float:
        """Count a refusal; return the seconds to delay it by.

        Args:
            caller: ``host:port``; the port is ignored, since a new connection costs nothing.
            size: bytes of the request.
        """
        if not self._rate:
            return 0.0
        host = caller.rpartition(":")[0]
        now = self._clock()
        due = max(now, self._due.get(host, now)) + (1 + size / PIECE) / self._rate
        free = now + BURST / self._rate
        self._due[host] = min(due, free + LONGEST_S)
        return min(max(0.0, due - free), LONGEST_S)

    async def wait(self, caller: str, size: int = 0) -> None:
        """Count a refusal, and delay it by sleeping."""
        seconds = self.charge(caller, size)
        if not seconds or self._count >= MOST:
            return
        self._count += 1
        self._delayed[caller] = self._delayed.get(caller, 0) + 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stopped.wait()
        finally:
            self._count -= 1
            self._delayed[caller] -= 1
            if not self._delayed[caller]:
                del self._delayed[caller]

    def delayed(self) -> Iterator[str]:
        """Callers (``host:port``) to whom a refusal is being delayed, in order of arrival."""
        return iter(self._delayed)

    def stop(self) -> None:
        """Stop delaying; refusals that are being delayed are sent now."""
        self._stopped.set()
