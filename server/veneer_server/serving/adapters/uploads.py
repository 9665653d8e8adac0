"""Receiving an upload: one spec, then chunks into a folder of the registry.

Nothing is visible before the registry's commit. A refused upload leaves
nothing behind. If the connection breaks, what arrived is kept and the upload can be resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from typing import Final

from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import (
    Aborted,
    AdapterExists,
    InvalidField,
    QuotaExceeded,
    VeneerError,
)
from veneer_registry.publishing import Staged
from veneer_registry.records import Published
from veneer_registry.upload import Upload

from veneer_server.access.principal import DEFAULT_TENANT, PRINCIPAL
from veneer_server.logs import get_logger
from veneer_server.quotas.uploads import UploadQuotas, UploadReservation
from veneer_server.serving.adapters.upload_options import UploadOptions, upload_options
from veneer_server.serving.adapters.upload_places import (
    DEADLINE_S,
    MAX_DISCARDS,
    MIN_RATE,
    WINDOW_S,
    UploadPace,
    UploadPlaces,
)
from veneer_server.serving.tenants.registry import AdapterRegistry
from veneer_server.serving.threads import to_the_end

__all__ = ["Uploads"]

MAX_BROKEN: Final = 16
MAX_BROKEN_BYTES: Final = 512 << 20
"""Defaults of ``--max-broken-uploads`` and ``--max-broken-upload-bytes``."""

DISCARD_S: Final = 2.0
DISCARD_BYTES: Final = 256 << 20

MAX_CHUNK: Final = 4 << 20

_log = get_logger(__name__)


class Uploads:
    """Runs a tenant's uploads."""

    def __init__(
        self,
        registry: AdapterRegistry,
        *,
        min_rate: int = MIN_RATE,
        deadline_s: float = DEADLINE_S,
        broken: tuple[int, int] = (MAX_BROKEN, MAX_BROKEN_BYTES),
        quotas: UploadQuotas | None = None,
        tenant: str = DEFAULT_TENANT,
        places: UploadPlaces | None = None,
        shares: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Args:
        min_rate: bytes a second at which each upload must arrive.
        deadline_s: time limit for a whole upload.
        broken: most interrupted uploads that are kept, and most bytes of them.
        quotas: what callers may upload; None if that is not limited.
        tenant: whose uploads these are.
        places: those of all tenants; None for places of its own.
        shares: whether a tenant of that name shares adapters.
        """
        self._shares = shares
        self._registry = registry
        self._quotas = quotas
        self._min_rate = min_rate
        self._deadline_s = deadline_s
        self._most_broken, self._most_broken_bytes = broken
        self._tenant = tenant
        self._places = places or UploadPlaces()
        self._workers = self._places.workers

    async def committed(self, spec: adapters_pb2.UploadSpec) -> Mapping[str, int]:
        """Bytes of each announced file that the server already has. Raises as `receive`."""
        request = upload_options(spec).request
        return await to_the_end(lambda: self._registry.committed(request), self._workers)

    @contextlib.asynccontextmanager
    async def receive(
        self, requests: AsyncIterable[adapters_pb2.UploadAdapterRequest]
    ) -> AsyncIterator[tuple[UploadOptions, Upload]]:
        """Receive one upload. It is complete when the block begins, and ends with the block.

        Raises:
            InvalidField, AdapterInvalid, ChecksumMismatch, DiskFull: the upload is refused.
            AdapterExists: the name is that of another tenant, which shares adapters.
            QuotaExceeded: too many uploads are running, or the caller may not store or send as
                much.
            Aborted: the upload arrived too slowly, or was resumed elsewhere.
        """
        pace = UploadPace(self._min_rate, self._deadline_s)
        try:
            self._places.take(self._tenant, pace)
        except QuotaExceeded:
            if self._places.discarding < MAX_DISCARDS:
                self._places.discarding += 1
                try:
                    await _discard(aiter(requests))
                finally:
                    self._places.discarding -= 1
            raise
        messages = aiter(requests)
        upload: Upload | None = None
        allowed: UploadReservation | None = None
        keep, ended_early = True, False
        try:
            first = await self._next(messages, pace)
            if first is None or first.WhichOneof("message") != "spec":
                raise InvalidField(
                    "the first message of an upload must be `spec`", metadata={"field": "spec"}
                )
            options = upload_options(first.spec)
            self._check_name(options.request.name)
            if self._quotas is not None:
                principal = PRINCIPAL.get()
                allowed = await self._quotas.reserve(
                    principal.accounts,
                    principal.tenant,
                    options.request,
                    publish=not options.validate_only,
                    resume=options.resume,
                )

            def begin() -> None:
                nonlocal upload
                upload = self._registry.begin_upload(options.request, resume=options.resume)

            await to_the_end(begin, self._workers)
            assert upload is not None, "begin_upload returned"
            pace.progressed(0, upload.missing_bytes)
            await self._chunks(messages, upload, pace, allowed)
            if ended_early := upload.missing_bytes > 0:
                upload.finish()  # says what is missing
            yield options, upload
        except VeneerError as error:
            # A broken connection looks like a stream that ended too early.
            keep = isinstance(error, Aborted) or ended_early
            await _discard(messages)
            raise
        finally:
            if allowed is not None:
                allowed.close()
            self._places.leave(pace)
            if upload is not None:
                ended = upload
                await to_the_end(lambda: self._end(ended, keep=keep), self._workers)

    def _check_name(self, name: str) -> None:
        if name != self._tenant and not self._registry.knows(name) and self._shares(name):
            raise AdapterExists(
                f"{name!r} is a tenant's name, and {name}/NAME are the adapters it shares: "
                "publish under another name",
                metadata={"adapter": name, "tenant": name, "cause": "tenant"},
            )

    async def validate(self, upload: Upload) -> Published:
        """`Registry.validate`, in a worker thread."""
        return await to_the_end(lambda: self._registry.validate(upload), self._workers)

    @contextlib.asynccontextmanager
    async def stage(self, upload: Upload) -> AsyncIterator[Staged]:
        """`Registry.stage`, in a worker thread. Discarded at the end of the block, unless
        committed."""
        found: list[Staged] = []
        try:
            await to_the_end(lambda: found.append(self._registry.stage(upload)), self._workers)
            yield found[0]
        finally:
            for staged in found:  # even if the caller was cancelled meanwhile
                await to_the_end(staged.discard, self._workers)

    def _end(self, upload: Upload, *, keep: bool) -> None:
        """Suspend or abort an upload; does nothing after a commit."""
        if not keep:
            upload.abort()
            return
        upload.suspend()
        try:
            self._registry.trim_uploads(
                most=self._most_broken, most_bytes=self._most_broken_bytes
            )
        except OSError as error:  # housekeeping tries again
            _log.warning("broken uploads not trimmed", why=str(error))

    async def _chunks(
        self,
        messages: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        upload: Upload,
        pace: UploadPace,
        allowed: UploadReservation | None,
    ) -> None:
        while (message := await self._next(messages, pace)) is not None:
            if message.WhichOneof("message") != "chunk":
                raise InvalidField(
                    "after its first message an upload may hold only `chunk`s",
                    metadata={"field": "chunk"},
                )
            chunk = message.chunk
            if len(chunk.data) > MAX_CHUNK:
                raise InvalidField(
                    f"a chunk has {len(chunk.data)} bytes: send at most {MAX_CHUNK}",
                    metadata={"field": "chunk.data"},
                )
            if allowed is not None:
                allowed.received(len(chunk.data))
            missing = upload.missing_bytes
            await to_the_end(_write(upload, chunk), self._workers)
            # Empty chunks, and bytes that were there before, are not progress.
            left = upload.missing_bytes
            pace.progressed(missing - left, left)
            pace.held(await self._places.flow.hold(len(chunk.data)))

    async def _next(
        self, messages: AsyncIterator[adapters_pb2.UploadAdapterRequest], pace: UploadPace
    ) -> adapters_pb2.UploadAdapterRequest | None:
        """The client's next message; None after its last one."""
        try:
            return await pace.wait(lambda: anext(messages, None))
        except TimeoutError as error:
            if pace.displaced:
                raise Aborted(
                    "the upload stalled or had a long time left, so its slot went to another "
                    "upload; the received data is kept: resume it",
                    metadata={"cause": "displaced"},
                    retry_after_s=2.0,
                ) from error
            if pace.late:
                raise Aborted(
                    f"the upload was not complete after {self._deadline_s:g} s; the received "
                    "data is kept: resume it, or start the server with a larger "
                    "--upload-deadline",
                    metadata={"cause": "upload_deadline"},
                    retry_after_s=0.0,
                ) from error
            raise Aborted(
                f"the upload sent less than {self._min_rate} bytes a second over {WINDOW_S:g} "
                "s; the received data is kept: resume it, or start the server with a smaller "
                "--min-upload-rate",
                metadata={"cause": "upload_rate"},
                retry_after_s=0.0,
            ) from error


async def _discard(messages: AsyncIterator[adapters_pb2.UploadAdapterRequest]) -> None:
    """Let a refused client finish sending, within bounds.

    A client whose write is cut off reports a write error (INTERNAL in grpc.aio) instead of
    the refusal; one that finishes sending sees the refusal.
    """
    left = DISCARD_BYTES
    with contextlib.suppress(TimeoutError, VeneerError):  # the caller raises the refusal
        async with asyncio.timeout(DISCARD_S):
            async for message in messages:
                left -= len(message.chunk.data)
                if left < 0:
                    return


def _write(upload: Upload, chunk: adapters_pb2.UploadChunk) -> Callable[[], None]:
    return lambda: upload.write(chunk.file, chunk.offset, chunk.data)
