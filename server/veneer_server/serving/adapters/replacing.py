"""What is brought into memory before a name moves to a new revision.

A replace of an adapter that is in memory would otherwise make its next request wait for
the disk. So the new revision is brought to where the old one is, and pinned if that is;
then the name moves; then the old one's pin ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from weakref import WeakValueDictionary

from veneer_registry.adapter import AdapterRef
from veneer_registry.errors import VeneerError
from veneer_registry.publishing import Staged
from veneer_registry.registry import Registry

from veneer_server.engine_client.client import EngineClient
from veneer_server.logs import get_logger
from veneer_server.serving.adapters.use import source_of
from veneer_server.serving.threads import outlast
from veneer_server.wire.messages import MemoryTier

__all__ = ["Replacing", "Warm"]

_log = get_logger(__name__)


class Replacing:
    """Warms what is published. Belongs to one event loop."""

    def __init__(
        self,
        registry: Registry,
        engine: EngineClient,
        *,
        keep_residents: Callable[[], Awaitable[None]],
    ) -> None:
        """Args: keep_residents: writes pins down for the next start of the server."""
        self._registry = registry
        self._engine = engine
        self._keep_residents = keep_residents
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def warm(self, staged: Staged, *, activate: bool) -> AsyncIterator[Warm]:
        """Bring staged content to where the revision is that it replaces. Unless
        `Warm.passed` was called by the end of the block, that is taken back: so whoever
        leaves before the name has moved, by an error or since its caller has gone, leaves
        no copy and no pin behind.

        Publishes of the same weights take turns, so that none takes back what is another's.

        Args:
            activate: DEVICE is asked for; where that fails, so does the publish.
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
        stays: the name means the new revision: nothing is to be taken back.
    """

    def __init__(
        self,
        registry: Registry,
        engine: EngineClient,
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
        """Of the new weights, which another name may have had before."""
        self._passing: MemoryTier | None = None
        """The old revision's pin, which passes on."""
        self._pinned = False
        self._asked = False
        """The engine may have been told something."""

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
            # Nobody asked for it: the next request brings it in.
            _log.warning(
                "new revision not brought into memory before the replace",
                adapter=self._new.short,
                reason=error.reason,
            )

    async def _pin_both(self, tier: MemoryTier) -> None:
        """A server that is killed finds a pin on whichever the name means then."""
        self._asked = True
        try:
            await self._engine.activate(self._source, tier=tier, pin=True)
        except VeneerError:
            return  # there is no room for both: `passed` tries again with the one
        self._pinned = True
        await self._keep_residents()

    async def passed(self) -> tuple[str, ...]:
        """The name has moved: the old one's pin ends. Returns warnings, since the publish
        stands whatever becomes of it."""
        self.stays = True
        if self._passing is None or self._old is None:
            return ()
        try:
            await self._engine.unpin(self._old.weights_digest)
            if not self._pinned:
                await self._engine.activate(self._source, tier=self._passing, pin=True)
        except VeneerError as error:
            return (
                f"{self._old.short} was pinned, and its pin could not be passed on whole: "
                f"{error.message}",
            )
        return ()

    async def undo(self) -> None:
        """The name did not move: what was asked of the engine is taken back."""
        if not self._asked:
            return
        digest = self._new.weights_digest
        try:
            if not self._registry.names(digest):
                await self._engine.evict(digest, mode="forget", unpin=True)
            elif self._passing is None:
                return  # a copy of what another name has is no waste
            elif self._own_pin is None:
                await self._engine.unpin(digest)
            else:
                await self._engine.activate(self._source, tier=self._own_pin, pin=True)
            await self._keep_residents()
        except VeneerError as error:
            _log.warning(
                "what was brought into memory for a publish is not taken back",
                adapter=self._new.short,
                reason=error.reason,
            )

    def _pin_of(self, ref: AdapterRef) -> MemoryTier | None:
        """Also of one that is still being brought back after a restart."""
        for resident in self._engine.resident_set():
            if resident.source.weights_digest == ref.weights_digest:
                return resident.pin
        return None

    def _means(self, old: AdapterRef) -> bool:
        """Another name still means these weights, which are pinned for it too."""
        for name in self._registry.names(old.weights_digest):
            with contextlib.suppress(VeneerError):
                ref = self._registry.resolve(name)
                if name != old.name and ref.weights_digest == old.weights_digest:
                    return True
        return False
