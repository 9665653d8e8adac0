"""How many calls of each kind may be open at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from veneer_registry.errors import QueueFull, QuotaExceeded, VeneerError

from veneer_server.access.methods import GENERATES

WATCH: Final = "/veneer.v1.AdapterService/WatchAdapters"
MAX_WATCHERS: Final = 256
"""Default of ``--max-watchers``."""

MAX_HEALTH_WATCHES: Final = 256
"""Most open ``Watch`` calls of the health service."""

MAX_REFLECTIONS: Final = 4
"""Most open reflection calls; each may hold a message."""

MAX_OTHER_CALLS: Final = 256
"""Most open calls per Veneer service, not counting generate and watch calls."""

_OURS: Final = "/veneer.v1."
HEALTH_WATCH: Final = "/grpc.health.v1.Health/Watch"
_REFLECTION: Final = "/grpc.reflection."


@dataclass(frozen=True, slots=True)
class _Kind:
    """Calls that are counted together. ``fix``: what a refused caller can do."""

    name: str
    most: int
    error: type[VeneerError]
    fix: str
    retry_s: float


class OpenCalls:
    """Counts open calls whose request has arrived. Belongs to one event loop.

    Each kind has its own limit, so calls of one kind never crowd out another. Generate calls
    are not counted here, since the engine's capacity bounds them. Calls whose request is
    still arriving are bounded by `Receiving`.

    Once a second tenant has called, no tenant may hold more than half of a kind's places: open
    calls do not give way to others, so one tenant's calls must not take them all.
    """

    def __init__(self, *, watchers: int = MAX_WATCHERS) -> None:
        """Args: watchers: maximum number of open `WatchAdapters` calls."""
        self._watchers = watchers
        self._count: Counter[str] = Counter()
        self._held: Counter[tuple[str, str]] = Counter()
        """Open calls by kind and tenant; without entries of zero."""
        self._tenants: set[str] = set()
        """Tenants that have called."""

    @contextmanager
    def one(self, method: str, tenant: str) -> Iterator[None]:
        """Count a tenant's call while the block runs.

        Raises:
            QuotaExceeded, QueueFull: the limit for calls of this kind is reached.
        """
        kind = self._kind(method)
        if kind is None:
            yield
            return
        key = kind.name, tenant
        self._tenants.add(tenant)
        share = kind.most if len(self._tenants) == 1 else kind.most // 2
        if self._held[key] >= share or self._count[kind.name] >= kind.most:
            most, whose = (
                (share, "a tenant") if self._held[key] >= share else (kind.most, "this server")
            )
            raise kind.error(
                f"{most} {kind.name} are open, the maximum for {whose}: {kind.fix}",
                metadata={"limit": str(most)},
                retry_after_s=kind.retry_s,
            )
        self._count[kind.name] += 1
        self._held[key] += 1
        try:
            yield
        finally:
            self._count[kind.name] -= 1
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]

    def _kind(self, method: str) -> _Kind | None:
        """The kind of a method's calls; None if they are not counted."""
        if method in GENERATES:
            return None
        if method == WATCH:
            fix = (
                "close one, share its events, or start the server with a larger --max-watchers"
            )
            return _Kind("watchers", self._watchers, QuotaExceeded, fix, 5.0)
        if method == HEALTH_WATCH:
            fix = "close one, or poll with Check"
            return _Kind("health watches", MAX_HEALTH_WATCHES, QuotaExceeded, fix, 5.0)
        if method.startswith(_REFLECTION):
            return _Kind("reflection calls", MAX_REFLECTIONS, QuotaExceeded, "close one", 5.0)
        if method.startswith(_OURS):
            service = method.removeprefix(_OURS).partition("/")[0]
            name = f"{service} calls"
            return _Kind(name, MAX_OTHER_CALLS, QueueFull, "retry later", 1.0)
        return None
