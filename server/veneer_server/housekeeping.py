"""What the front does beside serving: damaged content is put into quarantine, what is in
memory is written down for the next start, and what was left lying is swept."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, Final

from veneer_registry.errors import AdapterCorrupt, VeneerError
from veneer_registry.registry import Registry

from veneer_server.engine.client import EngineEvent
from veneer_server.engine.messages import AdapterFailed
from veneer_server.logs import get_logger
from veneer_server.rpc.adapter_events import AdapterEvents
from veneer_server.rpc.threads import to_the_end

__all__ = ["Housekeeping"]

_SWEEP_S: Final = 600.0

_log = get_logger(__name__)


class Housekeeping:
    """Belongs to one event loop.

    Args:
        upload_ttl_s: seconds that what arrived of a broken upload is kept.
        sweep_s: seconds between two looks at what may be swept.
    """

    def __init__(
        self,
        registry: Registry,
        events: AdapterEvents,
        *,
        upload_ttl_s: float,
        sweep_s: float = _SWEEP_S,
    ) -> None:
        self._registry = registry
        self._events = events
        self._upload_ttl_s = upload_ttl_s
        self._sweep_s = sweep_s
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin; `stop` ends it."""
        self._begin(self._sweep())

    async def stop(self) -> None:
        """End, once what is under way is done."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def on_engine_event(self, event: EngineEvent) -> None:
        """Listener for `EngineClient`: content that did not have its digest at load."""
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
            _log.error("adapter in quarantine", adapters=[ref.short for ref in refs], why=why)
            records = await to_the_end(lambda: self._registry.holding(digest))
        except VeneerError as error:
            _log.error("damaged adapter not put into quarantine", reason=error.reason)
            return
        self._events.quarantined(records, why)

    async def _sweep(self) -> None:
        while True:
            with contextlib.suppress(VeneerError, OSError):
                swept = await to_the_end(
                    lambda: self._registry.sweep_uploads(self._upload_ttl_s)
                )
                if swept:
                    _log.info("broken uploads removed", count=swept)
                if self._registry.needs_sweep:
                    await to_the_end(self._registry.sweep)
            await asyncio.sleep(self._sweep_s)
