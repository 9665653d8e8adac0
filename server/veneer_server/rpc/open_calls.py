"""How many calls may be open at once: in all, and of methods whose calls stay open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from veneer_registry.errors import QueueFull, QuotaExceeded

__all__ = [
    "MAX_HEALTH_WATCHES",
    "MAX_OTHER_CALLS",
    "MAX_REFLECTIONS",
    "MAX_WATCHERS",
    "OpenCalls",
]

WATCH: Final = "/veneer.v1.AdapterService/WatchAdapters"
MAX_WATCHERS: Final = 256
"""Default of ``--max-watchers``."""

MAX_HEALTH_WATCHES: Final = 256
"""``Watch`` calls of the health service."""

MAX_REFLECTIONS: Final = 4
"""Reflection calls, each of which may hold a message."""

MAX_OTHER_CALLS: Final = 256
"""Calls beside those that generate and those that watch."""

_RETRY_S: Final = 5.0
_HEALTH: Final = "/grpc.health.v1.Health/Watch"
_REFLECTION: Final = "/grpc.reflection."


class OpenCalls:
    """Counts open calls. Belongs to one event loop."""

    def __init__(self, *, generations: int = 320, watchers: int = MAX_WATCHERS) -> None:
        """Args:
        generations: requests that run and wait in the engine, at most.
        watchers: `WatchAdapters` calls, at most.
        """
        self.most = generations + watchers + MAX_OTHER_CALLS
        self._watchers = watchers
        self._count = 0
        self._by_kind: Counter[str] = Counter()

    @contextmanager
    def one(self, method: str) -> Iterator[None]:
        """Count a call while the block runs.

        Raises:
            QuotaExceeded: there are as many of this method as there may be.
            QueueFull: there are as many calls as there may be.
        """
        kind, most, fix = self._kind(method)
        if kind and self._by_kind[kind] >= most:
            raise QuotaExceeded(
                f"{most} {kind} are open, the most that this server holds: {fix}",
                metadata={"limit": str(most)},
                retry_after_s=_RETRY_S,
            )
        counted = method.startswith("/veneer.v1.")
        if counted and self._count >= self.most:
            raise QueueFull(
                f"{self.most} calls are open, the most that this server holds: retry later",
                metadata={"limit": str(self.most)},
                retry_after_s=1.0,
            )
        self._by_kind[kind] += 1
        self._count += counted
        try:
            yield
        finally:
            self._by_kind[kind] -= 1
            self._count -= counted

    def _kind(self, method: str) -> tuple[str, int, str]:
        """What it is called, how many there may be, and what to do about that; the first is
        empty where only the sum counts."""
        if method == WATCH:
            return (
                "watchers",
                self._watchers,
                "close one, share its events, or start the server with a larger --max-watchers",
            )
        if method == _HEALTH:
            return "health watches", MAX_HEALTH_WATCHES, "close one, or ask with Check"
        if method.startswith(_REFLECTION):
            return "reflection calls", MAX_REFLECTIONS, "close one"
        return "", 0, ""
