"""Fetches weights by digest: once for all requests that need them."""

from __future__ import annotations

import asyncio
import os
import random
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from veneer_registry.bundle_files import REQUIRED_FILES
from veneer_registry.disk import FILE_MODE, FOLDER_MODE, disk_errors
from veneer_registry.errors import (
    AdapterCorrupt,
    DiskFull,
    QueueFull,
    Unavailable,
    VeneerError,
)
from veneer_registry.weights_cache import WeightsCache

from veneer_server.follower.standing import Standing
from veneer_server.logs import get_logger

MOST_AT_ONCE: Final = 64
"""Maximum number of concurrent fetches; requests for further weights are refused."""

PATIENCE_S: Final = 10.0
"""Seconds that a fetch may make no progress."""

_CHUNK_S: Final = 3.0
"""Seconds that the next chunk may take before the transfer is retried."""

_PARTIAL_BYTES: Final = 256 << 20

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FilePart:
    """A part of a file.

    Attributes:
        size: size of the whole file.
        offset: position of ``data`` in the file.
    """

    size: int
    offset: int
    data: bytes
    crc32: int


class Remote(Protocol):
    """A source of weights."""

    def chunks(
        self, tenant: str, digest: str, file: str, offset: int
    ) -> AsyncIterator[FilePart]:
        """A file's chunks from an offset on; at least one, which may be empty. Raises
        Unavailable if the connection fails, and any error of the other side."""
        ...

    def distrust(self, digest: str) -> None:
        """Report that the fetched weights did not match their digest: fetch them from another
        source next time, if there is one."""
        ...


class _Broken(Unavailable):
    """The transfer was interrupted, and may be resumed."""


class Fetching:
    """Brings weights from a `Remote` into the cache. Belongs to one event loop.

    Attributes:
        fetched, fetched_bytes, failed: counts since the start.
    """

    def __init__(
        self,
        cache: WeightsCache,
        remote: Remote,
        standing: Standing,
        *,
        patience_s: float = PATIENCE_S,
        chunk_s: float = _CHUNK_S,
        on_fetched: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Args: on_fetched: called with the duration of each fetch."""
        self.fetched = 0
        self.fetched_bytes = 0
        self.failed = 0
        self._cache = cache
        self._remote = remote
        self._standing = standing
        self._patience_s = patience_s
        self._chunk_s = chunk_s
        self._on_fetched = on_fetched
        self._running: dict[str, asyncio.Task[bool]] = {}

    @property
    def running(self) -> int:
        """Number of fetches in progress."""
        return len(self._running)

    async def present(self, tenant: str, digest: str) -> bool:
        """Ensure that leased weights are in the cache. Returns whether they had to be fetched.
        If a caller is cancelled, the fetch continues for the others.

        Raises:
            Unavailable: the weights are not here, and the registry does not answer.
            QueueFull: too many fetches are running, or the cache has no room.
            AdapterNotFound, AdapterCorrupt: the registry no longer has the weights intact.
        """
        if self._cache.use(digest):
            return False
        task = self._running.get(digest)
        if task is None:
            if len(self._running) >= MOST_AT_ONCE:
                raise QueueFull(
                    f"{MOST_AT_ONCE} adapters are being fetched: retry",
                    metadata={"limit": str(MOST_AT_ONCE), "cause": "fetches"},
                    retry_after_s=1.0,
                )
            task = asyncio.get_running_loop().create_task(self._bring(tenant, digest))
            self._running[digest] = task
            task.add_done_callback(lambda done: self._ended(digest, done))
        return await asyncio.shield(task)

    async def stop(self) -> None:
        """End running fetches; they resume after the next start."""
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _ended(self, digest: str, task: asyncio.Task[bool]) -> None:
        del self._running[digest]
        self._cache.release(digest)
        if not task.cancelled() and task.exception() is not None:
            self.failed += 1

    async def _bring(self, tenant: str, digest: str) -> bool:
        if self._cache.use(digest) is None and await asyncio.to_thread(
            self._cache.check, digest
        ):
            return False
        started = time.monotonic()
        for last in (False, True):
            try:
                await self._fetched(tenant, digest)
                break
            except AdapterCorrupt as error:
                # A resumed file may have been damaged: fetch once more from the beginning.
                _log.warning("fetched weights do not have their digest", why=str(error))
                self._remote.distrust(digest)
                if last:
                    raise
        seconds = time.monotonic() - started
        self.fetched += 1
        self._on_fetched(seconds)
        _log.info("weights fetched", digest=digest[:12], seconds=round(seconds, 3))
        return True

    async def _fetched(self, tenant: str, digest: str) -> None:
        """Fetch and commit. If the disk is full before the cache is, evict the least recently
        used weights and try again."""
        while True:
            try:
                await self._fetch(tenant, digest)
                return await asyncio.to_thread(self._cache.commit, digest)
            except DiskFull as error:
                if not await asyncio.to_thread(self._cache.give_way, digest):
                    raise DiskFull(
                        "this server's disk has no room for the adapter: free space there, "
                        "or use another server",
                        detail=error.detail,
                    ) from error
                _log.warning("the disk has less free space than --adapter-cache-bytes")

    async def _fetch(self, tenant: str, digest: str) -> None:
        """Fetch both files into the partial folder, resuming where an earlier try ended."""
        folder = self._cache.partial_folder(digest)
        with disk_errors(folder.parent):
            folder.mkdir(FOLDER_MODE, exist_ok=True)
        most_bytes = min(_PARTIAL_BYTES, self._cache.most_bytes)
        await asyncio.to_thread(self._cache.trim_partial, {*self._running}, most_bytes)
        progress, wait_s = time.monotonic(), 0.05
        sizes: dict[str, int] = {}
        while True:
            before = self.fetched_bytes
            try:
                for name in REQUIRED_FILES:
                    await self._file(tenant, digest, folder / name, sizes)
                return
            except _Broken as error:
                if self.fetched_bytes > before:
                    progress, wait_s = time.monotonic(), 0.05
                if time.monotonic() - progress > self._patience_s or not (
                    self._standing.connected or self.fetched_bytes > before
                ):
                    raise self._standing.unreachable(
                        "fetching this adapter", error.detail or str(error)
                    ) from error
            await asyncio.sleep(wait_s * (0.5 + random.random()))  # nosec B311 # not for secrets
            wait_s = min(1.0, wait_s * 2)

    async def _file(self, tenant: str, digest: str, path: Path, sizes: dict[str, int]) -> None:
        file, offset = await asyncio.to_thread(_opened, path)
        chunks = self._remote.chunks(tenant, digest, path.name, offset)
        try:
            while True:
                chunk = await self._next(chunks)
                if chunk is None:
                    break
                if path.name not in sizes:
                    sizes[path.name] = chunk.size
                    await asyncio.to_thread(self._cache.make_room, digest, sum(sizes.values()))
                end = chunk.offset + len(chunk.data)
                if chunk.size != sizes[path.name] or end > chunk.size:
                    await asyncio.to_thread(os.ftruncate, file, 0)
                    raise _Broken("the file's size has changed", detail="size")
                if chunk.offset != offset or zlib.crc32(chunk.data) != chunk.crc32:
                    raise _Broken("a chunk arrived damaged or out of order", detail="chunk")
                if chunk.data:
                    await asyncio.to_thread(_write, path.parent, file, chunk.data, offset)
                offset += len(chunk.data)
                self.fetched_bytes += len(chunk.data)
            if offset != sizes.get(path.name):
                raise _Broken("the transfer ended early", detail="short")
        finally:
            os.close(file)
            with suppress(Exception):
                await chunks.aclose()  # type: ignore[attr-defined]  # a generator

    async def _next(self, chunks: AsyncIterator[FilePart]) -> FilePart | None:
        try:
            async with asyncio.timeout(self._chunk_s):
                return await anext(chunks, None)
        except TimeoutError as error:
            raise _Broken("no data arrived in time", detail="slow") from error
        except Unavailable as error:
            raise _Broken(str(error), detail=str(error)) from error
        except VeneerError:
            raise


def _opened(path: Path) -> tuple[int, int]:
    """Open a file for writing, without truncating it; return (descriptor, size)."""
    with disk_errors(path.parent):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        return file, os.fstat(file).st_size


def _write(folder: Path, file: int, data: bytes, offset: int) -> None:
    with disk_errors(folder):
        view, at = memoryview(data), offset
        while view:
            done = os.pwrite(file, view, at)
            view, at = view[done:], at + done
