"""What is brought into memory before a name moves to a new revision.

A replace of an adapter that is in memory would otherwise make its next request wait for
the disk. So the new revision is brought to where the old one is; then the name moves;
then a pin of the old one passes on to the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Literal

from veneer_registry.adapter import AdapterRef
from veneer_registry.errors import VeneerError
from veneer_registry.registry import AdapterRecord, Registry

from veneer_server.engine.client import EngineClient
from veneer_server.engine.messages import Residency
from veneer_server.logs import get_logger
from veneer_server.rpc.adapter_view import source_of

__all__ = ["Replacing"]

_log = get_logger(__name__)


class Replacing:
    """The warm-up of one publish."""

    def __init__(
        self,
        registry: Registry,
        engine: EngineClient,
        *,
        activate: bool,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Args:
        activate: the caller asked for DEVICE; a failure then fails the publish.
        loop: the engine's.
        """
        self._registry = registry
        self._engine = engine
        self._activate = activate
        self._loop = loop
        self._old: tuple[AdapterRef, Residency] | None = None

    def prepare(self, record: AdapterRecord, current: AdapterRef | None) -> None:
        """For `Registry.publish`, which calls it in a worker thread."""
        asyncio.run_coroutine_threadsafe(self._warm(record, current), self._loop).result()

    async def _warm(self, record: AdapterRecord, current: AdapterRef | None) -> None:
        if current is not None:
            residency = self._engine.tier(current.weights_digest)
            if residency is not None:
                self._old = (current, residency)
        source = source_of(self._registry, record)
        if self._activate:
            await self._engine.activate(source, tier="device", pin=False)
        elif self._old is not None:
            tier: Literal["host", "device"] = (
                "device" if self._old[1].tier == "device" else "host"
            )
            try:
                await self._engine.activate(source, tier=tier, pin=False)
            except VeneerError as error:
                # Nobody asked for it: the next request brings it in.
                _log.warning(
                    "new revision not brought into memory before the replace",
                    adapter=record.ref.short,
                    reason=error.reason,
                )

    async def pass_pin_on(self, record: AdapterRecord) -> tuple[str, ...]:
        """After the name has moved. Returns warnings for the uploader."""
        if self._old is None or not self._old[1].pinned:
            return ()
        old, residency = self._old
        if old.weights_digest == record.ref.weights_digest or self._means(old):
            return ()
        tier: Literal["host", "device"] = "device" if residency.tier == "device" else "host"
        await self._engine.unpin(old.weights_digest)
        try:
            await self._engine.activate(source_of(self._registry, record), tier=tier, pin=True)
        except VeneerError as error:
            return (
                f"{old.short} was pinned, and the new revision could not be: {error.message}",
            )
        return ()

    def _means(self, old: AdapterRef) -> bool:
        """Another name still means these weights, which are pinned for it too."""
        for name in self._registry.names(old.weights_digest):
            with contextlib.suppress(VeneerError):
                ref = self._registry.resolve(name)
                if name != old.name and ref.weights_digest == old.weights_digest:
                    return True
        return False
