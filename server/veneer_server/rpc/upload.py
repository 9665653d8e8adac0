"""Receiving an upload: one spec, then chunks into a folder of the registry.

Nothing is visible before the registry's commit. Of an upload that is refused nothing is
left; of one whose connection breaks, what arrived is kept and can be gone on with.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import Aborted, InvalidField, QuotaExceeded, VeneerError
from veneer_registry.publishing import Prepare
from veneer_registry.registry import (
    Published,
    Registry,
    Upload,
    UploadFile,
    UploadRequest,
    Who,
)

from veneer_server.priority import lower_priority
from veneer_server.rpc.threads import to_the_end

__all__ = ["UploadOptions", "Uploads"]

IDLE_LIMIT_S: Final = 30.0
DISCARD_S: Final = 2.0
DISCARD_BYTES: Final = 256 << 20
MAX_CHUNK: Final = 4 << 20
MAX_FILES: Final = 16
MAX_LABELS: Final = 64
MAX_AT_ONCE: Final = 8
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class UploadOptions:
    """A checked `UploadSpec`."""

    request: UploadRequest
    validate_only: bool
    activate: bool
    resume: bool


class Uploads:
    """Runs uploads, a bounded number of them at once."""

    def __init__(
        self,
        registry: Registry,
        *,
        on_published: Callable[[Published], None] = lambda published: None,
        idle_limit_s: float = IDLE_LIMIT_S,
    ) -> None:
        """Args:
        on_published: told every outcome, also when the caller has left by then.
        idle_limit_s: longest wait for a client's next message.
        """
        self._registry = registry
        self._on_published = on_published
        self._idle_limit_s = idle_limit_s
        self._running = 0
        # Hashing and checking would take the step's cores.
        self._workers = ThreadPoolExecutor(
            MAX_AT_ONCE, thread_name_prefix="upload", initializer=lower_priority
        )

    async def committed(self, spec: adapters_pb2.UploadSpec) -> Mapping[str, int]:
        """Bytes of each announced file that need not be sent. Raises as `receive`."""
        request = _options(spec).request
        return await to_the_end(lambda: self._registry.committed(request), self._workers)

    async def receive(
        self,
        messages: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        *,
        who: Who,
        prepare: Callable[[UploadOptions], Prepare | None],
    ) -> tuple[UploadOptions, Published]:
        """Take in one upload.

        Args:
            who: for the history.
            prepare: gives what `Registry.publish` shall call before the name moves.

        Raises:
            InvalidField, AdapterInvalid, ChecksumMismatch, AdapterExists,
            BaseModelMismatch, DiskFull: the upload is refused.
            QuotaExceeded: too many uploads run at once.
            Aborted: the client sent nothing for too long, or goes on elsewhere.
        """
        if self._running >= MAX_AT_ONCE:
            raise QuotaExceeded(
                f"{MAX_AT_ONCE} uploads run already: retry when one has ended",
                retry_after_s=2.0,
            )
        self._running += 1
        upload: Upload | None = None
        keep, ended_early = True, False
        try:
            first = await self._next(messages)
            if first is None or first.WhichOneof("message") != "spec":
                raise InvalidField(
                    "the first message of an upload must be `spec`", metadata={"field": "spec"}
                )
            options = _options(first.spec)

            def begin() -> None:
                nonlocal upload
                upload = self._registry.begin_upload(options.request, resume=options.resume)

            await to_the_end(begin, self._workers)
            assert upload is not None, "begin_upload returned"
            await self._chunks(messages, upload)
            if ended_early := upload.missing_bytes > 0:
                upload.finish()  # says what is missing
            opened, loop = upload, asyncio.get_running_loop()

            def publish() -> Published:
                published = self._registry.publish(
                    opened,
                    validate_only=options.validate_only,
                    who=who,
                    prepare=None if options.validate_only else prepare(options),
                )
                loop.call_soon_threadsafe(self._on_published, published)
                return published

            return options, await to_the_end(publish, self._workers)
        except VeneerError as error:
            # A broken connection looks like an end that came too early.
            keep = isinstance(error, Aborted) or ended_early
            await _discard(messages)
            raise
        finally:
            self._running -= 1
            if upload is not None:
                # Both do nothing after a commit.
                await to_the_end(upload.suspend if keep else upload.abort, self._workers)

    async def _chunks(
        self, messages: AsyncIterator[adapters_pb2.UploadAdapterRequest], upload: Upload
    ) -> None:
        while (message := await self._next(messages)) is not None:
            if message.WhichOneof("message") != "chunk":
                raise InvalidField(
                    "after the first message an upload has only `chunk`s",
                    metadata={"field": "chunk"},
                )
            chunk = message.chunk
            if len(chunk.data) > MAX_CHUNK:
                raise InvalidField(
                    f"a chunk has {len(chunk.data)} bytes: send at most {MAX_CHUNK}",
                    metadata={"field": "chunk.data"},
                )
            await to_the_end(_write(upload, chunk), self._workers)

    async def _next(
        self, messages: AsyncIterator[adapters_pb2.UploadAdapterRequest]
    ) -> adapters_pb2.UploadAdapterRequest | None:
        """The client's next message; None when it has sent its last."""
        try:
            async with asyncio.timeout(self._idle_limit_s):
                return await anext(messages, None)
        except TimeoutError as error:
            raise Aborted(
                f"no part of the upload came for {self._idle_limit_s:g} s: what came before "
                "is kept, so go on with it",
                retry_after_s=0.0,
            ) from error


async def _discard(messages: AsyncIterator[adapters_pb2.UploadAdapterRequest]) -> None:
    """Let a refused client finish sending, within bounds.

    A client whose write breaks off reports its own broken write (grpc.aio says
    INTERNAL) instead of the refusal; one that finishes sees the refusal.
    """
    left = DISCARD_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            async for message in messages:
                left -= len(message.chunk.data)
                if left < 0:
                    return


def _write(upload: Upload, chunk: adapters_pb2.UploadChunk) -> Callable[[], None]:
    return lambda: upload.write(chunk.file, chunk.offset, chunk.data)


def _options(spec: adapters_pb2.UploadSpec) -> UploadOptions:
    if not 1 <= len(spec.files) <= MAX_FILES:
        raise InvalidField(
            f"spec.files has {len(spec.files)} files: list each file of the adapter, at most "
            f"{MAX_FILES}",
            metadata={"field": "spec.files"},
        )
    for file in spec.files:
        if not _SHA256.fullmatch(file.sha256):
            raise InvalidField(
                f"the sha256 of {file.name[:80]!r} must be 64 hex digits in lower case",
                metadata={"field": "spec.files", "file": file.name[:80]},
            )
    if len(spec.labels) > MAX_LABELS:
        raise InvalidField(
            f"spec.labels has {len(spec.labels)} labels: give at most {MAX_LABELS}",
            metadata={"field": "spec.labels"},
        )
    if spec.validate_only and spec.activate:
        raise InvalidField(
            "validate_only publishes nothing that `activate` could bring to the device: "
            "set one of them",
            metadata={"field": "spec.activate"},
        )
    return UploadOptions(
        UploadRequest(
            name=spec.name,
            files=tuple(UploadFile(f.name, f.size, f.sha256) for f in spec.files),
            labels=dict(spec.labels),
            allow_replace=spec.allow_replace,
            etag=spec.etag,
        ),
        spec.validate_only,
        spec.activate,
        spec.resume,
    )
