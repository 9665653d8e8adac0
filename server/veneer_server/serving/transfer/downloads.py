"""Sends the files of a revision as they were uploaded.

A lease keeps the content while it is sent. Files are read in threads, piece by piece, and the
next piece is read when the last one has been taken: a slow reader costs one piece of memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import Aborted, AdapterCorrupt, QuotaExceeded
from veneer_registry.lease import RevisionLease

from veneer_server.serving.calls import READER_LIMIT_S
from veneer_server.serving.tenants.tenant import Tenant
from veneer_server.serving.threads import Background, to_the_end

__all__ = ["MAX_AT_ONCE", "Downloads"]

MAX_AT_ONCE: Final = 8
"""Downloads that run at once; once a second tenant has called, one may have half of them."""

PIECE: Final = 256 << 10
"""Bytes of a message. A reader that takes none for ``reader_limit_s`` is ended."""

_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Message = adapters_pb2.DownloadAdapterResponse
Write = Callable[[Message], Awaitable[None]]
Describe = Callable[[RevisionLease], adapters_pb2.Adapter]


@dataclass(frozen=True, slots=True)
class _File:
    """An open file of the store."""

    name: str
    size: int
    sha256: str
    descriptor: int


class Downloads:
    """Bounds and serves downloads. Belongs to one event loop."""

    def __init__(self, *, reader_limit_s: float = READER_LIMIT_S) -> None:
        self._reader_limit_s = reader_limit_s
        self._running: Counter[str] = Counter()
        self._tenants: set[str] = set()
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="download")
        self._background = Background()

    async def stop(self) -> None:
        """Wait for the removal of content that nothing holds any more."""
        await self._background.finish()

    async def send(self, home: Tenant, spec: str, describe: Describe, write: Write) -> None:
        """Send the files of ``spec`` to ``write``: what they are, then their content.

        Args:
            describe: the first message's record.

        Raises:
            AdapterNotFound, InvalidField, BaseModelMismatch: as `Registry.acquire`.
            AdapterCorrupt: its content is damaged or gone.
            QuotaExceeded: too many downloads are running.
            Aborted: the reader takes nothing.
        """
        with self._place(home.name):
            leases: list[RevisionLease] = []
            try:
                await to_the_end(
                    lambda: leases.append(home.registry.acquire(spec)), self._workers
                )
                await self._send(home, leases[0], describe, write)
            finally:
                for lease in leases:  # even if the caller was cancelled meanwhile
                    lease.release()
                if home.registry.needs_sweep:
                    self._background.start(f"sweep {home.name}", home.registry.sweep)

    async def _send(
        self, home: Tenant, lease: RevisionLease, describe: Describe, write: Write
    ) -> None:
        files: list[_File] = []
        try:
            opening = lambda: _open_all(home.registry.bundle_files(lease.ref), files)  # noqa: E731
            await to_the_end(opening, self._workers)
            start = adapters_pb2.DownloadStart(adapter=describe(lease))
            for file in files:
                start.files.add(name=file.name, size=file.size, sha256=file.sha256)
            await self._write(write, Message(start=start))
            for file in files:
                for at in range(0, file.size, PIECE):
                    read = lambda file=file, at=at: _piece(file, at)  # type: ignore[misc]  # noqa: E731
                    await self._write(write, await to_the_end(read, self._workers))
        finally:
            for file in files:
                os.close(file.descriptor)

    async def _write(self, write: Write, message: Message) -> None:
        try:
            async with asyncio.timeout(self._reader_limit_s):
                await write(message)
        except TimeoutError as error:
            raise Aborted(
                f"the reader took nothing for {self._reader_limit_s:g} s: read faster, and "
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


def _open_all(paths: Mapping[str, Path], files: list[_File]) -> None:
    """Open and hash files, into ``files``, which the caller closes. Raises AdapterCorrupt."""
    for name, path in paths.items():
        try:
            descriptor = os.open(path, _OPEN)
        except OSError as error:
            raise _damaged(name, str(error)) from error
        files.append(_File(name, 0, "", descriptor))
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(name, "not a regular file")
        size = status.st_size
        files[-1] = _File(name, size, _sha256(name, descriptor, size), descriptor)


def _sha256(name: str, descriptor: int, size: int) -> str:
    found, at = hashlib.sha256(), 0
    while at < size:
        data = _read(name, descriptor, min(1 << 20, size - at), at)
        found.update(data)
        at += len(data)
    return found.hexdigest()


def _piece(file: _File, at: int) -> Message:
    message = Message()
    chunk = message.chunk
    chunk.file, chunk.offset = file.name, at
    chunk.data = _read(file.name, file.descriptor, min(PIECE, file.size - at), at)
    return message


def _read(name: str, descriptor: int, size: int, at: int) -> bytes:
    """All of it, since a short read would leave a gap. Raises AdapterCorrupt."""
    parts = bytearray()
    try:
        while len(parts) < size:
            part = os.pread(descriptor, size - len(parts), at + len(parts))
            if not part:
                raise _damaged(name, "it became shorter")
            parts += part
    except OSError as error:
        raise _damaged(name, str(error)) from error
    return bytes(parts)


def _damaged(name: str, why: str) -> AdapterCorrupt:
    return AdapterCorrupt(
        f"the stored file {name} cannot be read; push the adapter again",
        metadata={"file": name, "cause": "files"},
        detail=why,
    )
