"""Sends the files of a revision as they were uploaded.

A lease keeps the content while it is sent. Files are read in threads, piece by piece, and the
next piece is read when the last one has been taken: a slow reader costs one piece of memory.
While sequences run, reading is throttled like uploads, since both take CPU time from the step.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from veneer_registry.errors import Aborted, AdapterCorrupt, QuotaExceeded
from veneer_registry.lease import RevisionLease
from veneer_registry.records import AdapterRecord, UploadFile

from veneer_server.queues.upload_flow import UploadFlow
from veneer_server.serving.generation import READER_LIMIT_S
from veneer_server.serving.local_folders import LocalFile
from veneer_server.serving.spare_time import Background, to_the_end
from veneer_server.serving.tenants import Tenant
from veneer_server.serving.uploads import UploadChunk

MAX_AT_ONCE: Final = 8
"""Most downloads at once; once a second tenant has called, each tenant may run half of them."""

PIECE: Final = 256 << 10
"""Bytes per message. A download whose reader takes none for ``reader_limit_s`` is ended."""

_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Start = Callable[[AdapterRecord, Sequence[UploadFile]], bytes]
"""Makes the first message, which describes the revision and its files."""
Chunk = Callable[[UploadChunk], bytes]
"""Makes the message for a piece of a file; called in threads."""
Write = Callable[[bytes], Awaitable[None]]
"""Sends a message."""
T = TypeVar("T")


class Downloads:
    """Bounds and serves downloads. Belongs to one event loop."""

    def __init__(
        self, flow: UploadFlow | None = None, *, reader_limit_s: float = READER_LIMIT_S
    ) -> None:
        """Args:
        flow: limits how fast files are read; None for as fast as the reader.
        """
        self._flow = flow or UploadFlow(lambda: False)
        self._reader_limit_s = reader_limit_s
        self._running: Counter[str] = Counter()
        self._tenants: set[str] = set()
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="download")
        self._background = Background()

    async def stop(self) -> None:
        """Wait until the content that is no longer in use has been removed."""
        await self._background.finish()

    async def send(
        self, home: Tenant, spec: str, *, start: Start, chunk: Chunk, write: Write
    ) -> None:
        """Send the files of ``spec`` to ``write``: first their description, then their content.

        Raises:
            AdapterNotFound, InvalidField, BaseModelMismatch: as `Registry.acquire`.
            AdapterCorrupt: the content is damaged or missing.
            QuotaExceeded: too many downloads are running.
            Aborted: the reader takes nothing.
        """
        with self._place(home.name):
            leases: list[RevisionLease] = []
            try:
                await to_the_end(
                    lambda: leases.append(home.registry.acquire(spec)), self._workers
                )
                await self._send(home, leases[0], start, chunk, write)
            finally:
                for lease in leases:  # even if the caller was cancelled meanwhile
                    lease.release()
                if home.registry.needs_sweep:
                    self._background.start(f"sweep {home.name}", home.registry.sweep)

    async def _send(
        self, home: Tenant, lease: RevisionLease, start: Start, chunk: Chunk, write: Write
    ) -> None:
        files: list[LocalFile] = []
        try:
            await to_the_end(partial(_open_all, home, lease, files), self._workers)
            listed = []
            for file in files:
                found = hashlib.sha256()
                async for _ in self._pieces(file, lambda piece: found.update(piece.data)):  # noqa: B023 - done before the next
                    pass
                listed.append(UploadFile(file.name, file.size, found.hexdigest()))
            await self._write(write, start(lease.record, listed))
            for file in files:
                async for message in self._pieces(file, chunk):
                    await self._write(write, message)
        finally:
            for file in files:
                os.close(file.descriptor)

    async def _pieces(
        self, file: LocalFile, use: Callable[[UploadChunk], T]
    ) -> AsyncIterator[T]:
        """Yield the result of ``use`` for each piece of a file; ``use`` runs in a thread."""
        for at in range(0, file.size, PIECE):
            size = min(PIECE, file.size - at)
            await self._flow.hold(size)
            yield await to_the_end(
                lambda at=at, size=size: use(UploadChunk(file.name, at, _read(file, size, at))),  # type: ignore[misc]
                self._workers,
            )

    async def _write(self, write: Write, message: bytes) -> None:
        try:
            async with asyncio.timeout(self._reader_limit_s):
                await write(message)
        except TimeoutError as error:
            raise Aborted(
                f"the reader read nothing for {self._reader_limit_s:g} s: read faster, and "
                "download again",
                metadata={"cause": "reader_limit"},
            ) from error

    @contextmanager
    def _place(self, tenant: str) -> Iterator[None]:
        self._tenants.add(tenant)
        most = MAX_AT_ONCE if len(self._tenants) == 1 else MAX_AT_ONCE // 2
        if self._running.total() >= MAX_AT_ONCE or self._running[tenant] >= most:
            raise QuotaExceeded(
                f"{most} downloads are already running: retry when one has ended",
                metadata={"limit": str(most)},
                retry_after_s=2.0,
            )
        self._running[tenant] += 1
        try:
            yield
        finally:
            self._running[tenant] -= 1


def _open_all(home: Tenant, lease: RevisionLease, files: list[LocalFile]) -> None:
    """Open the files of a leased revision, see `_open`. Raises Unavailable as well."""
    with home.registry.bundle_files(lease.ref) as paths:
        for name, path in paths.items():
            _open(name, path, files)


def _open(name: str, path: Path, files: list[LocalFile]) -> None:
    """Open a stored file and append it to ``files``, whose owner closes it even if the caller
    has left meanwhile. Raises AdapterCorrupt."""
    try:
        descriptor = os.open(path, _OPEN)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _damaged(name, "not a regular file")
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise _damaged(name, str(error)) from error
    files.append(LocalFile(name, status.st_size, descriptor))


def _read(file: LocalFile, size: int, at: int) -> bytes:
    """Read exactly ``size`` bytes: a short read would leave a gap. Raises AdapterCorrupt."""
    parts = bytearray()
    try:
        while len(parts) < size:
            part = os.pread(file.descriptor, size - len(parts), at + len(parts))
            if not part:
                raise _damaged(file.name, "it became shorter")
            parts += part
    except OSError as error:
        raise _damaged(file.name, str(error)) from error
    return bytes(parts)


def _damaged(name: str, why: str) -> AdapterCorrupt:
    return AdapterCorrupt(
        f"the stored file {name} cannot be read; push the adapter again",
        metadata={"file": name, "cause": "files"},
        detail=why,
    )
