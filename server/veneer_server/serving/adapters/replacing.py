"""Loads a new revision into memory before its name moves to it.

Otherwise, after an adapter in memory is replaced, its next request would wait for the disk.
So the new revision is loaded into the old one's tier, and pinned if the old one is; then the
name moves; then the old revision is unpinned.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from weakref import WeakValueDictionary

from veneer_registry.adapter import AdapterRef
from veneer_registry.errors import VeneerError
from veneer_registry.publishing import Staged

from veneer_server.engine_client.tenant_engine import TenantEngine
from veneer_server.logs import get_logger
from veneer_server.serving.adapters.use import source_of
from veneer_server.serving.tenants.registry import AdapterRegistry
from veneer_server.serving.threads import outlast
from veneer_server.wire.messages import MemoryTier

__all__ = ["Replacing", "Warm"]

_log = get_logger(__name__)


class Replacing:
    """Warms up published revisions. Belongs to one event loop."""

    def __init__(
        self,
        registry: AdapterRegistry,
        engine: TenantEngine,
        *,
        keep_residents: Callable[[], Awaitable[None]],
    ) -> None:
        """Args: keep_residents: stores pins for the next start of the server."""
        self._registry = registry
        self._engine = engine
        self._keep_residents = keep_residents
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def warm(self, staged: Staged, *, activate: bool) -> AsyncIterator[Warm]:
        """Load staged content into the tier of the revision that it replaces. Undone when the
        block ends, unless `Warm.stays` is set: a publish that fails or is cancelled before
        the name has moved leaves no copy and no pin behind.

        Publishes of the same weights take turns, so that none undoes another's work.

        Args:
            activate: load into DEVICE; if that fails, so does the publish.
        """
        digest = staged.record.ref.weights_digest
        turn = self._turns.setdefault(digest, asyncio.Lock())
        async with turn:
            warm = Warm(self._registry, self._engine, staged, self._keep_residents)
            try:
                await warm.up(activate=activate)
                yield warm
            finally:
                if not warm.stays:
                    await outlast(warm.undo())


class Warm:
    """The warm-up of one publish.

    Attributes:
        stays: the name has moved to the new revision, so nothing is undone.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        engine: TenantEngine,
        staged: Staged,
        keep_residents: Callable[[], Awaitable[None]],
    ) -> None:
        self.stays = False
        self._registry = registry
        self._engine = engine
        self._new = staged.record.ref
        self._old = staged.current
        self._source = source_of(registry, staged.record)
        self._keep_residents = keep_residents
        self._own_pin = self._pin_of(self._new)
        """The new weights' pin, if another name already had them pinned."""
        self._passing: MemoryTier | None = None
        """The old revision's pin, if it is to be transferred."""
        self._pinned = False
        self._asked = False
        """Whether the engine may have been asked to load or pin."""

    async def up(self, *, activate: bool) -> None:
        """See `Replacing.warm`."""
        wanted: MemoryTier | None = "device" if activate else None
        old = self._old
        if old is not None and old.weights_digest != self._new.weights_digest:
            residency = self._engine.tier(old.weights_digest)
            if wanted is None and residency is not None:
                wanted = "device" if residency.tier == "device" else "host"
            if not self._means(old):
                self._passing = self._pin_of(old)
        if self._passing is not None:
            await self._pin_both(self._passing)
        if wanted is None or (self._pinned and wanted == self._passing):
            return
        self._asked = True
        try:
            await self._engine.activate(self._source, tier=wanted, pin=False)
        except VeneerError as error:
            if activate:
                raise
            # The caller did not request it; the next request loads the adapter.
            _log.warning(
                "new revision not loaded before the replace",
                adapter=self._new.short,
                reason=error.reason,
            )

    async def _pin_both(self, tier: MemoryTier) -> None:
        """Pin the new revision as well, so that even if the server is killed, the revision that
        the name then means is pinned."""
        self._asked = True
        try:
            await self._engine.activate(self._source, tier=tier, pin=True)
        except VeneerError:
            return  # no room for both: `passed` pins the new one after unpinning the old
        self._pinned = True
        await self._keep_residents()

    async def passed(self) -> tuple[str, ...]:
        """Unpin the old revision after the name has moved. Failures are returned as warnings,
        since the publish stands regardless."""
        self.stays = True
        if self._passing is None or self._old is None:
            return ()
        try:
            await self._engine.unpin(self._old.weights_digest)
            if not self._pinned:
                await self._engine.activate(self._source, tier=self._passing, pin=True)
        except VeneerError as error:
            return (
                f"{self._old.short} was pinned, and its pin could not be transferred "
                f"completely: {error.message}",
            )
        return ()

    async def undo(self) -> None:
        """Undo the requests to the engine, since the name did not move."""
        if not self._asked:
            return
        digest = self._new.weights_digest
        try:
            if not self._registry.names(digest):
                await self._engine.evict(digest, mode="forget", unpin=True)
            elif self._passing is None:
                return  # another name uses this copy
            elif self._own_pin is None:
                await self._engine.unpin(digest)
            else:
                await self._engine.activate(self._source, tier=self._own_pin, pin=True)
            await self._keep_residents()
        except VeneerError as error:
            _log.warning(
                "warm-up for a failed publish not undone",
                adapter=self._new.short,
                reason=error.reason,
            )

    def _pin_of(self, ref: AdapterRef) -> MemoryTier | None:
        """A revision's pin, even while it is still being restored after a restart."""
        for resident in self._engine.resident_set():
            if resident.source.weights_digest == ref.weights_digest:
                return resident.pin
        return None

    def _means(self, old: AdapterRef) -> bool:
        """Whether another name still means these weights, and so shares their pin."""
        for name in self._registry.names(old.weights_digest):
            with contextlib.suppress(VeneerError):
                ref = self._registry.resolve(name)
                if name != old.name and ref.weights_digest == old.weights_digest:
                    return True
        return False
