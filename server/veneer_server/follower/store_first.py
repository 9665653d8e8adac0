"""Fetches weights from the registry's object store, or from the registry if that fails."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeVar

from veneer_registry.errors import Unavailable, VeneerError
from veneer_registry.store_folders import checked_digest

from veneer_server.follower.fetching import FilePart, Remote
from veneer_server.logs import get_logger

_PIECE: Final = 1 << 20
_ACCESS_S: Final = 2.0
"""Seconds that an access to the store may take: less than `fetching._CHUNK_S`, as otherwise the
registry would never be asked."""
_AWAY_S: Final = 5.0
"""Seconds that the store is not asked after a failure."""
_MOST_DISTRUSTED: Final = 1024
_THREADS: Final = 16

_log = get_logger(__name__)

T = TypeVar("T")


class _Stat(Protocol):
    @property
    def size(self) -> int: ...


class StoredObjects(Protocol):
    """One tenant's objects: see `veneer_registry.shared.objects.Objects`. Blocks."""

    def stat(self, key: str) -> _Stat | None: ...

    def read_part(self, key: str, start: int, end: int) -> bytes | None: ...


ObjectsOf = Callable[[str], StoredObjects]
"""Returns the objects of a tenant, by the tenant's name."""


class _NotThere(Exception):
    """The store does not have the object, or its size cannot be right."""


class StoreFirst:
    """A `Remote` that asks the store, then the registry. Weights are compared with their digest
    as always; if they did not match it, the next fetch uses the registry.

    Attributes:
        pieces: number of pieces that came from the store since the start.
    """

    def __init__(
        self,
        objects: ObjectsOf,
        registry: Remote,
        *,
        most_bytes: int,
        access_s: float = _ACCESS_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: most_bytes: largest size of an adapter's file; larger objects are not used."""
        self.pieces = 0
        self._objects = objects
        self._by_tenant: dict[str, StoredObjects] = {}
        self._registry = registry
        self._most_bytes = most_bytes
        self._access_s = access_s
        self._clock = clock
        self._away_until = 0.0
        # Own threads: a store that hangs must not block those that everything else needs.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="store")
        self._distrusted: OrderedDict[str, None] = OrderedDict()

    def distrust(self, digest: str) -> None:
        """As `Remote.distrust`."""
        self._distrusted[digest] = None
        if len(self._distrusted) > _MOST_DISTRUSTED:
            self._distrusted.popitem(last=False)

    async def chunks(
        self, tenant: str, digest: str, file: str, offset: int
    ) -> AsyncIterator[FilePart]:
        """As `Remote.chunks`."""
        if digest not in self._distrusted and self._clock() >= self._away_until:
            at = offset
            try:
                async for chunk in self._stored(tenant, digest, file, offset):
                    at = chunk.offset + len(chunk.data)
                    yield chunk
                return
            except _NotThere as error:
                _log.info("not in the object store", digest=digest[:12], why=str(error))
                if at > offset:
                    raise Unavailable(
                        "it was deleted in the meantime", detail=str(error)
                    ) from error
            except (VeneerError, TimeoutError) as error:
                self._away_until = self._clock() + _AWAY_S
                _log.warning("object store unreachable: asking the registry", why=str(error))
                if at > offset:
                    raise Unavailable(
                        "the object store closed the connection", detail=str(error)
                    ) from error
        async for chunk in self._registry.chunks(tenant, digest, file, offset):
            yield chunk

    async def _stored(
        self, tenant: str, digest: str, file: str, offset: int
    ) -> AsyncIterator[FilePart]:
        key = f"weights/{checked_digest(digest)}/{file}"
        objects = self._by_tenant.get(tenant)
        if objects is None:
            objects = self._by_tenant[tenant] = await self._soon(lambda: self._objects(tenant))
        stat = await self._soon(lambda: objects.stat(key))
        if stat is None:
            raise _NotThere("no such object")
        if not offset <= stat.size <= self._most_bytes:
            raise _NotThere(f"the object has {stat.size} bytes")
        at = offset
        while True:
            end = min(stat.size, at + _PIECE)
            data = (
                b""
                if at == end
                else await self._soon(
                    lambda start=at, end=end: objects.read_part(key, start, end)  # type: ignore[misc]
                )
            )
            if data is None or len(data) != end - at:
                raise _NotThere("it ended early")
            yield FilePart(stat.size, at, data, zlib.crc32(data))
            self.pieces += 1
            at = end
            if at >= stat.size:
                return

    async def _soon(self, access: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._access_s):
            return await loop.run_in_executor(self._threads, access)
