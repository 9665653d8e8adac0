"""``--resolve``: an adapter that nobody has published is fetched when it is first asked for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import Final

from veneer_registry.adapter import check_name
from veneer_registry.errors import (
    InvalidField,
    QueueFull,
    QuotaExceeded,
    Unavailable,
    VeneerError,
)
from veneer_registry.rows import Who

from veneer_server.adapters.fetching.uris import parse_uri
from veneer_server.logs import get_logger
from veneer_server.serving.tenants.tenant import Tenant
from veneer_server.serving.transfer.registering import Registering, Registration

__all__ = ["Resolving"]

PLACE: Final = "{name}"
FORGET_S: Final = 30.0
"""How long a name that could not be fetched is not tried again."""
MOST_A_MINUTE: Final = 30
"""Names that a tenant's calls may have tried in a minute: each costs a process."""
MOST_WAITING: Final = 256
"""Requests that wait for fetches: they have no place in the queue yet."""
_MOST_FAILED: Final = 1000

_FINAL: Final = frozenset({"INVALID_ARGUMENT", "FAILED_PRECONDITION", "UNIMPLEMENTED"})
"""Codes of errors that mean: there is no such adapter."""

_log = get_logger(__name__)


class Resolving:
    """Fetches unknown names, each once for all who ask meanwhile. Belongs to one event loop."""

    def __init__(self, template: str, registering: Registering) -> None:
        """Args:
        template: a URI with ``{name}``; empty for none.

        Raises:
            InvalidField: it is malformed, or --fetch-allow does not have it.
        """
        self._template = template
        self._registering = registering
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._failed: OrderedDict[tuple[str, str], tuple[float, VeneerError]] = OrderedDict()
        self._waiting = 0
        self._tried: dict[str, deque[float]] = {}
        if template:
            try:
                if PLACE not in template:
                    raise InvalidField(f"it has no {PLACE}")
                registering.check(parse_uri(self._uri("name")))
            except InvalidField as error:
                raise InvalidField(
                    f"--resolve {template[:200]!r} is not allowed: {error.message}",
                    metadata={"key": "resolve"},
                ) from error

    def _uri(self, name: str) -> str:
        return self._template.replace(PLACE, name)

    async def fetch(self, home: Tenant, name: str) -> None:
        """Fetch and publish ``name``, if it is a plain name that the template may mean. The
        caller then looks it up, and finds it or not.

        Raises:
            Unavailable: it could not be fetched now.
            QuotaExceeded, QueueFull: too much is being fetched, or waits for it.
        """
        if not self._template:
            return
        try:
            check_name(name)
        except InvalidField:
            return
        key, now = (home.name, name), asyncio.get_running_loop().time()
        task = self._running.get(key)
        if task is None:
            if (failed := self._failed.get(key)) is not None and now < failed[0]:
                self._answer(failed[1])
                return
            self._count(home.name, now)
            task = asyncio.get_running_loop().create_task(self._fetch(home, name))
            self._running[key] = task
            task.add_done_callback(lambda done: self._ended(key, done))
        if self._waiting >= MOST_WAITING:
            raise QueueFull(
                f"{MOST_WAITING} requests are waiting for adapters to be fetched: retry",
                metadata={"limit": str(MOST_WAITING)},
                retry_after_s=1.0,
            )
        self._waiting += 1
        try:
            # A caller that leaves takes it from nobody else.
            await asyncio.shield(task)
        except VeneerError as error:
            self._answer(error)
        finally:
            self._waiting -= 1

    async def _fetch(self, home: Tenant, name: str) -> None:
        wanted = Registration(name=name, uri=parse_uri(self._uri(name)))
        published = await self._registering.register(home, wanted, Who("resolve", "server"))
        _log.info("name resolved", name=published.record.ref.short)

    def _ended(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._running[key]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, VeneerError):
            _log.info("name not resolved", name=key[1], why=str(error))
            until = asyncio.get_running_loop().time() + FORGET_S
            self._failed[key] = (until, error)
            self._failed.move_to_end(key)
            while len(self._failed) > _MOST_FAILED:
                self._failed.popitem(last=False)

    def _answer(self, error: VeneerError) -> None:
        """Raise what a caller gets for a failure; nothing if there is no such adapter."""
        if isinstance(error, QuotaExceeded):
            raise error
        if error.code not in _FINAL:
            raise Unavailable(
                "the adapter is not registered and could not be fetched: try again",
                metadata={"cause": "resolve"},
                retry_after_s=5.0,
            ) from None

    def _count(self, tenant: str, now: float) -> None:
        tried = self._tried.setdefault(tenant, deque())
        while tried and tried[0] < now - 60.0:
            tried.popleft()
        if len(tried) >= MOST_A_MINUTE:
            raise QuotaExceeded(
                f"{MOST_A_MINUTE} unknown adapters were looked up within a minute: retry "
                "later, or publish them",
                metadata={"limit": str(MOST_A_MINUTE), "cause": "resolve"},
                retry_after_s=tried[0] + 60.0 - now,
            )
        tried.append(now)
