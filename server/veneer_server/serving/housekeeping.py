"""Background upkeep in the front process: quarantines damaged content, records which adapters
are in memory for the next start, and removes leftover files."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final

from veneer_registry.errors import AdapterCorrupt, VeneerError
from veneer_registry.registry import Registry
from veneer_registry.rows import ResidentRow

from veneer_server.engine_client.client import EngineEvent
from veneer_server.engine_client.resident_set import Resident
from veneer_server.engine_client.tenant_engine import TenantEngine
from veneer_server.logs import get_logger
from veneer_server.serving.events import AdapterEvents, source_of
from veneer_server.serving.spare_time import to_the_end
from veneer_server.serving.uploads import MAX_BROKEN, MAX_BROKEN_BYTES
from veneer_server.wire.messages import AdapterFailed, MemoryTier

_SWEEP_S: Final = 600.0
_KEEP_S: Final = 5.0
_PAUSE_S: Final = 0.05

_log = get_logger(__name__)


class Housekeeping:
    """Runs the background upkeep. Belongs to one event loop.

    Args:
        upload_ttl_s: seconds for which the data of an interrupted upload is kept.
        broken_uploads: most interrupted uploads that are kept, and most bytes of them together.
        quarantine_bytes, quarantine_ttl_s: most bytes kept in quarantine, and for how long.
        sweep_s: seconds between sweeps.
        keep_s: seconds between checks whether the resident set has changed and must be stored.
    """

    def __init__(
        self,
        registry: Registry,
        events: AdapterEvents,
        *,
        upload_ttl_s: float,
        broken_uploads: tuple[int, int] = (MAX_BROKEN, MAX_BROKEN_BYTES),
        quarantine_bytes: int = 10 << 30,
        quarantine_ttl_s: float = 720 * 3600.0,
        sweep_s: float = _SWEEP_S,
        keep_s: float = _KEEP_S,
    ) -> None:
        self._registry = registry
        self._events = events
        self._upload_ttl_s = upload_ttl_s
        self._most_broken, self._most_broken_bytes = broken_uploads
        self._quarantine_bytes = quarantine_bytes
        self._quarantine_ttl_s = quarantine_ttl_s
        self._sweep_s = sweep_s
        self._keep_s = keep_s
        self._engine: TenantEngine | None = None
        self._kept_version: object = None
        self._keeping = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, engine: TenantEngine, *, restore: bool = True) -> None:
        """Start the upkeep, which runs until `stop`. With ``restore``, first tell the engine
        which adapters were in memory at the end of the last run."""
        self._engine = engine
        if restore:
            engine.expect_residents(await to_the_end(self._expected))
        await self.keep_residents()  # drops those that can no longer be loaded
        self._begin(self._sweep())
        self._begin(self._complete())
        self._begin(self._keep())

    async def stop(self) -> None:
        """Stop, after finishing the work in progress."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self.keep_residents()
        except VeneerError as error:
            _log.warning("resident adapters not stored for the next start", reason=error.reason)

    def on_engine_event(self, event: EngineEvent) -> None:
        """Listener for `EngineClient`: quarantines content whose digest was wrong at load."""
        if isinstance(event, AdapterFailed) and event.error.reason == AdapterCorrupt.reason:
            self._begin(self._quarantine(event.weights_digest, event.error.message))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quarantine(self, digest: str, why: str) -> None:
        try:
            refs = await to_the_end(lambda: self._registry.quarantine(digest, why))
            if not refs:
                return
            _log.error("adapter quarantined", adapters=[ref.short for ref in refs], why=why)
            records = await to_the_end(lambda: self._registry.holding(digest))
        except VeneerError as error:
            _log.error("damaged adapter not quarantined", reason=error.reason)
            return
        self._events.quarantined(records, why)

    async def _sweep(self) -> None:
        while True:
            try:
                swept = await to_the_end(
                    lambda: self._registry.sweep_uploads(self._upload_ttl_s)
                )
                swept += await to_the_end(
                    lambda: self._registry.trim_uploads(
                        most=self._most_broken, most_bytes=self._most_broken_bytes
                    )
                )
                if swept:
                    _log.info("interrupted uploads removed", count=swept)
                pruned = await to_the_end(
                    lambda: self._registry.prune_quarantine(
                        self._quarantine_bytes, self._quarantine_ttl_s
                    )
                )
                if pruned:
                    _log.warning(
                        "quarantined content removed, because it was too large or too old",
                        folders=[name for name, _ in pruned],
                        bytes=sum(size for _, size in pruned),
                    )
                if self._registry.needs_sweep:
                    await to_the_end(self._registry.sweep)
            except Exception as error:  # disk errors must not end the loop
                _log.error("sweeping failed", error)
            await asyncio.sleep(self._sweep_s)

    async def _complete(self) -> None:
        """Migrate content stored by an older version, a little at a time."""
        try:
            more = True
            while more:
                more = await to_the_end(self._registry.complete_store)
                await asyncio.sleep(_PAUSE_S)
        except Exception as error:  # tried again at the next start
            _log.error("content stored by an older version was not migrated", error)

    # ----------------------------------------------------------- resident adapters

    def _expected(self) -> list[Resident]:
        """The adapters in memory at the end of the last run that can still be loaded."""
        expected = []
        for row in self._registry.residents():
            records = self._registry.holding(row.weights)
            usable = [r for r in records if r.quarantined is None and not r.foreign]
            if not usable:
                continue
            with suppress(VeneerError):  # if this fails, it is fetched when a request needs it
                self._registry.fetch(usable[0].ref)
            tier, pin = _tier(row.tier), None if row.pin is None else _tier(row.pin)
            expected.append(Resident(source_of(self._registry, usable[0]), tier, pin))
        return expected

    async def keep_residents(self) -> None:
        """Store the list of adapters in memory, if it has changed."""
        async with self._keeping:
            engine = self._engine
            if engine is None or engine.residents_version == self._kept_version:
                return
            version, residents = engine.residents_version, engine.resident_set()
            rows = [ResidentRow(r.source.weights_digest, r.tier, r.pin) for r in residents]
            # If this is cancelled, the list may or may not be stored: the next call writes
            # again.
            self._kept_version = None
            await to_the_end(lambda: self._registry.set_residents(rows))
            self._kept_version = version

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._keep_s)
            try:
                await self.keep_residents()
            except Exception as error:  # disk errors must not end the loop
                _log.error("resident adapters not stored for the next start", error)


def _tier(text: str) -> MemoryTier:
    return "device" if text == "device" else "host"
