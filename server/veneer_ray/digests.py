"""The weights digest of each adapter name, for routing: looked up in the registry and cached.

It is only a hint. The engine resolves the name itself, so an outdated digest can at worst send
a request to a less suitable replica.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from veneer_ray.calls import Metadata

_FRESH_S: Final = 2.0
_LOOK_UP_S: Final = 0.5
_MOST: Final = 1 << 16
_CALLERS: Final = frozenset(
    ("authorization", "x-api-key", "api-key", "veneer-tenant", "x-veneer-tenant")
)
"""Metadata that decides which tenant an adapter name belongs to."""

_Key = tuple[str, Metadata]


class Digests:
    """Cache of digests. Belongs to one event loop.

    Args:
        look_up: asks the registry with a caller's metadata; may raise any exception.
    """

    def __init__(
        self,
        look_up: Callable[[str, Metadata], Awaitable[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look_up = look_up
        self._clock = clock
        self._known: OrderedDict[_Key, tuple[str, float]] = OrderedDict()
        self._asking: dict[_Key, asyncio.Task[str]] = {}

    async def of(self, name: str, metadata: Metadata) -> str:
        """The digest of a name; "" for the base; ``?NAME`` if the registry does not tell. Waits
        only for a name's first look-up, at most `_LOOK_UP_S`."""
        if not name:
            return ""
        caller = tuple(pair for pair in metadata if pair[0] in _CALLERS)
        key = (name, caller)
        known = self._known.get(key)
        if known is not None and self._clock() - known[1] < _FRESH_S:
            return known[0]
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.create_task(self._ask(key))
        if known is not None:
            return known[0]
        return await asyncio.shield(task)

    async def _ask(self, key: _Key) -> str:
        name, caller = key
        known = self._known.get(key)
        digest = f"?{name}" if known is None else known[0]
        try:
            # If the look-up fails, the request itself will report why.
            with suppress(Exception):
                async with asyncio.timeout(_LOOK_UP_S):
                    digest = await self._look_up(name, caller)
            self._known[key] = (digest, self._clock())
            self._known.move_to_end(key)
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
            return digest
        finally:
            del self._asking[key]
