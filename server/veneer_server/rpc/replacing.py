"""What is brought into memory before a name moves to a new revision.

A replace of an adapter that is in memory would otherwise make its next request wait for
the disk. So the new revision is brought to where the old one is, and pinned if that is;
then the name moves; then the old one's pin ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Literal

from veneer_registry.adapter import AdapterRef
from veneer_registry.errors import VeneerError
from veneer_registry.registry import AdapterRecord, Registry

from veneer_server.engine.client import EngineClient
from veneer_server.engine.messages import AdapterSource
from veneer_server.logs import get_logger
from veneer_server.rpc.adapter_view import source_of

__all__ = ["Replacing"]

Tier = Literal["host", "device"]

_log = get_logger(__name__)


class Replacing:
    """The warm-up of one publish. After it, call `finish`, or `undo` where it failed."""

    def __init__(
        self,
        registry: Registry,
        engine: EngineClient,
        *,
        activate: bool,
        keep_residents: Callable[[], Awaitable[None]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Args:
        activate: the caller asked for DEVICE; a failure then fails the publish.
        keep_residents: writes pins down for the next start of the server.
        loop: the engine's.
        """
        self._registry = registry
        self._engine = engine
        self._activate = activate
        self._keep_residents = keep_residents
        self._loop = loop
        self._source: AdapterSource | None = None
        self._old: AdapterRef | None = None
        self._pin: Tier | None = None
        """The old revision's, which passes on."""
        self._pinned = False

    def prepare(self, record: AdapterRecord, current: AdapterRef | None) -> None:
        """For `Registry.publish`, which calls it in a worker thread."""
        asyncio.run_coroutine_threadsafe(self._warm(record, current), self._loop).result()

    async def _warm(self, record: AdapterRecord, current: AdapterRef | None) -> None:
        self._source, self._old = source_of(self._registry, record), current
        wanted: Tier | None = "device" if self._activate else None
        if current is not None and current.weights_digest != record.ref.weights_digest:
            residency = self._engine.tier(current.weights_digest)
            if wanted is None and residency is not None:
                wanted = "device" if residency.tier == "device" else "host"
            if not self._means(current):
                self._pin = self._pin_of(current)
        if self._pin is not None:
            await self._pin_both()
        if wanted is None or (self._pinned and wanted == self._pin):
            return
        try:
            await self._engine.activate(self._source, tier=wanted, pin=False)
        except VeneerError as error:
            if self._activate:
                raise
            # Nobody asked for it: the next request brings it in.
            _log.warning(
                "new revision not brought into memory before the replace",
                adapter=record.ref.short,
                reason=error.reason,
            )

    async def _pin_both(self) -> None:
        """A server that is killed finds a pin on whichever the name means then."""
        assert self._source is not None
        assert self._pin is not None
        try:
            await self._engine.activate(self._source, tier=self._pin, pin=True)
        except VeneerError:
            return  # there is no room for both: `finish` tries again with the one
        self._pinned = True
        await self._keep_residents()

    async def finish(self) -> tuple[str, ...]:
        """After the name has moved: the old one's pin ends. Returns warnings, since the
        publish stands whatever becomes of it."""
        if self._pin is None or self._old is None or self._source is None:
            return ()
        try:
            await self._engine.unpin(self._old.weights_digest)
            if not self._pinned:
                await self._engine.activate(self._source, tier=self._pin, pin=True)
        except VeneerError as error:
            return (
                f"{self._old.short} was pinned, and its pin could not be passed on whole: "
                f"{error.message}",
            )
        return ()

    async def undo(self) -> None:
        """The name did not move: the new one's pin ends."""
        if self._pinned and self._source is not None:
            await self._engine.unpin(self._source.weights_digest)

    def _pin_of(self, ref: AdapterRef) -> Tier | None:
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
