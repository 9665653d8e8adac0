"""The adapter methods of the asyncio client, `AsyncClient`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from veneer_proto.v1 import adapters_pb2
from veneer_registry.adapter import Tier
from veneer_registry.errors import AdapterInvalid, InvalidField, Unimplemented

from veneer_client import calls, calls_admin
from veneer_client.aio_connection import AsyncConnection, sleep_or_raise
from veneer_client.aio_streams import AsyncAdapterWatch
from veneer_client.aio_transport import (
    apart,
    begin,
    messages,
    next_message,
    outcome,
    prepared,
)
from veneer_client.download import Download
from veneer_client.failures import Attempts, to_error
from veneer_client.readers import StreamStart, WatchReader
from veneer_client.records import (
    AdapterDetails,
    AdapterInfo,
    Alias,
    AliasMove,
    AliasTarget,
    Eviction,
    EvictMode,
    HistoryEntry,
    Pulled,
    Pushed,
)
from veneer_client.replicas import WaitReplicas
from veneer_client.upload import OnResume, Progress, PushOptions, Upload

__all__ = ["AsyncAdapterCalls"]


class AsyncAdapterCalls(AsyncConnection):
    """Publish, inspect, move, name and remove adapters."""

    async def push(
        self,
        folder: Path,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
        activate: bool = False,
        allow_replace: bool = False,
        same_base: bool = False,
        etag: str = "",
        wait_replicas: WaitReplicas = WaitReplicas.NONE,
        progress: Progress = lambda done, total: None,
        on_resume: OnResume = lambda resumed: None,
        timeout_s: float | None = None,
    ) -> Pushed:
        """Check an adapter folder locally, then publish it under ``name``.

        Sends only what the server lacks. After a broken connection or a restart it resumes by
        itself, while it makes progress or `RetryPolicy` has attempts left, or if called again.

        Args:
            validate_only: check everything, publish nothing.
            activate: also load the adapter onto the device before returning.
            allow_replace: publish even if the name holds other content.
            same_base: declare that the base named in the adapter's config is the served one
                under another name. The registry records this declaration.
            etag: must equal the name's etag (`AdapterInfo.etag`), else nothing is published.
            wait_replicas: return once followers have it, too; see `Pushed.replicas`.
            progress: called with the bytes sent so far and the total, in any thread.
            on_resume: called when the push resumes from bytes that the server has.

        Raises:
            AdapterInvalid, BaseModelMismatch, AdapterExists, DiskFull, EtagMismatch:
                nothing was published.
            ServerUnreachable: the server was away for too long; push again to resume.
        """
        options = PushOptions(
            labels=labels or {},
            validate_only=validate_only,
            activate=activate,
            allow_replace=allow_replace,
            same_base=same_base,
            etag=etag,
            wait_replicas=wait_replicas,
            progress=progress,
            on_resume=on_resume,
            retry=self._retry,
            timeout_s=timeout_s,
        )
        with await prepared(folder, name, options) as upload:
            while True:
                try:
                    asked = upload.question()
                    known = await self._once(asked, upload.remaining_s()) if asked else {}
                    upload.begin(known)
                    return upload.result(await self._send(upload))
                except grpc.RpcError as error:
                    failure = upload.failed(error, self.address)
                    await sleep_or_raise(upload.wait_s(failure), failure, error)

    async def check_push(self, name: str, *, timeout_s: float | None = None) -> None:
        """Check that this caller may push under ``name``, without sending anything. For
        programs that have the adapter only hours later, such as a training run.

        Raises:
            Unauthenticated, PermissionDenied: the caller may not push.
        """
        asked = calls_admin.committed(adapters_pb2.UploadSpec(name=name))
        # Past the permission check: the server misses the files, or is too old for this call.
        with suppress(InvalidField, AdapterInvalid, Unimplemented):
            await self._ask(asked, timeout_s)

    async def _send(self, upload: Upload) -> adapters_pb2.UploadAdapterResponse:
        send: Any = self._channel.stream_unary(
            calls_admin.UPLOAD,
            request_serializer=adapters_pb2.UploadAdapterRequest.SerializeToString,
            response_deserializer=adapters_pb2.UploadAdapterResponse.FromString,
        )
        running = begin(
            send, messages(upload), timeout_s=upload.remaining_s(), metadata=self._metadata
        )
        answer: adapters_pb2.UploadAdapterResponse = await outcome(running)
        return answer

    async def register(
        self,
        uri: str,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
        activate: bool = False,
        allow_replace: bool = False,
        same_base: bool = False,
        etag: str = "",
        wait_replicas: WaitReplicas = WaitReplicas.NONE,
        timeout_s: float | None = None,
    ) -> Pushed:
        """Let the server fetch an adapter, and publish it as `push` does.

        Args:
            uri: the adapter folder's URI: ``https://``, ``hf://``, ``s3://``, ``gs://`` or ``file://``.

        Raises:
            InvalidField: the server may not fetch from it (metadata ``field``).
            Also every error of `push`.
        """
        call = calls_admin.register(
            uri,
            name,
            labels=labels or {},
            validate_only=validate_only,
            activate=activate,
            allow_replace=allow_replace,
            same_base=same_base,
            etag=etag,
            wait_replicas=wait_replicas,
        )
        return await self._perform(call, timeout_s)

    async def pull(
        self,
        name: str,
        folder: Path,
        *,
        force: bool = False,
        progress: Progress = lambda done, total: None,
        timeout_s: float | None = None,
    ) -> Pulled:
        """Download an adapter's files as they were uploaded, verify them, and write them to
        ``folder``.

        Args:
            name: ``name``, ``name@revision`` or ``name/alias``.
            folder: must not exist or must be empty. It is created once all files are
                complete.
            force: replace the adapter that the folder already holds.
            progress: called with the bytes that have arrived and the total. The first number
                drops if the connection breaks, since the pull then starts over.

        Raises:
            InvalidField: the folder already holds something that may not be replaced.
            ChecksumMismatch: the received files differ from the uploaded ones.
        """
        start: Any = self._channel.unary_stream(
            calls_admin.DOWNLOAD,
            request_serializer=adapters_pb2.DownloadAdapterRequest.SerializeToString,
            response_deserializer=adapters_pb2.DownloadAdapterResponse.FromString,
        )
        attempts = Attempts(
            self._retry, repeatable=True, timeout_s=timeout_s, reconnect_s=calls.RECONNECT_S
        )
        with Download(name, folder, force=force, progress=progress) as download:
            while True:
                call = start(
                    download.begin(), timeout=attempts.remaining_s(), metadata=self._metadata
                )
                try:
                    while (message := await next_message(call)) is not None:
                        attempts.reached()
                        await apart(partial(download.receive, message))
                    return await apart(download.finish)
                except grpc.RpcError as error:
                    failure = to_error(error, self.address, timeout_s=timeout_s)
                    await sleep_or_raise(attempts.wait_s(failure), failure, error)
                finally:
                    call.cancel()

    async def get(self, name: str, *, timeout_s: float | None = None) -> AdapterDetails:
        """Return one adapter, by ``name``, ``name@revision`` or ``name/alias``, and all
        revisions of its name."""
        return await self._ask(calls_admin.get(name), timeout_s)

    def list(
        self,
        *,
        name_prefix: str = "",
        tier: Tier | None = None,
        labels: Mapping[str, str] | None = None,
        page_size: int = 100,
        timeout_s: float | None = None,
    ) -> AsyncIterator[AdapterInfo]:
        """Iterate over the current revisions in name order. Fetches pages as needed, each
        within ``timeout_s``."""
        page = partial(
            calls_admin.page,
            page_size=page_size,
            name_prefix=name_prefix,
            tier=tier,
            labels=labels or {},
        )
        return self._pages(page, timeout_s)

    async def activate(
        self,
        name: str,
        *,
        tier: Tier = Tier.DEVICE,
        pin: bool = False,
        timeout_s: float | None = None,
    ) -> AdapterInfo:
        """Load an adapter into HOST or DEVICE, and keep it there if ``pin``."""
        return await self._ask(calls_admin.activate(name, tier=tier, pin=pin), timeout_s)

    async def pin(self, name: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Load an adapter onto the device and keep it there until it is unpinned."""
        return await self.update_adapter(name, pinned=True, timeout_s=timeout_s)

    async def unpin(self, name: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Remove the pin; the adapter stays in memory until its space is needed."""
        return await self.update_adapter(name, pinned=False, timeout_s=timeout_s)

    async def update_adapter(
        self,
        name: str,
        *,
        pinned: bool | None = None,
        labels: Mapping[str, str] | None = None,
        remove_labels: Iterable[str] = (),
        retain: int | None = None,
        current: bool | None = None,
        shared: bool | None = None,
        etag: str = "",
        wait_replicas: WaitReplicas = WaitReplicas.NONE,
        timeout_s: float | None = None,
    ) -> AdapterInfo:
        """Change an adapter's settings; omitted ones stay as they are.

        Args:
            pinned: True loads it onto the device and keeps it there.
            labels: labels to set; other labels stay.
            remove_labels: keys of labels to remove.
            retain: number of superseded revisions that the name keeps; older ones are
                dropped at once.
            current: True makes ``name@revision`` the current one, for example to roll back.
            shared: True lets other tenants use the name with all its revisions and aliases.
            etag: must equal the name's etag (`AdapterInfo.etag`), else nothing changes.
            wait_replicas: return once followers have it, too.
        """
        call = calls_admin.update(
            name,
            pinned=pinned,
            labels=labels,
            remove_labels=remove_labels,
            retain=retain,
            current=current,
            shared=shared,
            etag=etag,
            wait_replicas=wait_replicas,
        )
        return await self._ask(call, timeout_s)

    async def evict(
        self,
        name: str,
        *,
        mode: EvictMode = EvictMode.DRAIN,
        unpin: bool = False,
        timeout_s: float | None = None,
    ) -> Eviction:
        """Free an adapter's memory; it stays registered."""
        return await self._ask(calls_admin.evict(name, mode=mode, unpin=unpin), timeout_s)

    async def delete(
        self,
        name: str,
        *,
        etag: str = "",
        mode: EvictMode = EvictMode.DRAIN,
        wait_replicas: WaitReplicas = WaitReplicas.NONE,
        timeout_s: float | None = None,
    ) -> tuple[str, ...]:
        """Remove ``name`` with all revisions, or ``name@revision``. Return the revisions
        removed."""
        call = calls_admin.delete(name, etag=etag, mode=mode, wait_replicas=wait_replicas)
        return await self._ask(call, timeout_s)

    async def set_alias(
        self,
        alias: str,
        revision: str = "",
        *,
        targets: Mapping[str, int] | Sequence[AliasTarget] = (),
        rollback: bool = False,
        remove: bool = False,
        etag: str = "",
        wait_replicas: WaitReplicas = WaitReplicas.NONE,
        timeout_s: float | None = None,
    ) -> AliasMove:
        """Move, roll back or remove ``name/alias``, atomically for all callers. Takes exactly
        one of ``revision``, ``targets``, ``rollback`` and ``remove``.

        Args:
            revision: its new target, as 4 to 64 hex digits of a kept revision.
            targets: several revisions with their weights (a canary):
                ``{"1a2b3c4d5e6f": 90, "6f5e4d3c2b1a": 10}``.
            rollback: restore its targets from before the last move.
            remove: remove the alias.
            etag: must equal the alias's etag (`Alias.etag`), else nothing changes.
            wait_replicas: return once followers have it, too; see `AliasMove.replicas`.

        Raises:
            InvalidField: not exactly one of the four is given.
            AdapterNotFound: no such alias or revision.
        """
        call = calls_admin.set_alias(
            alias,
            revision,
            targets=targets,
            rollback=rollback,
            remove=remove,
            etag=etag,
            wait_replicas=wait_replicas,
        )
        return await self._ask(call, timeout_s)

    async def list_aliases(
        self, name: str = "", *, timeout_s: float | None = None
    ) -> tuple[Alias, ...]:
        """Return the aliases of one name, or of all names, in order."""
        pages = self._pages(partial(calls_admin.alias_page, name=name), timeout_s)
        return tuple([alias async for alias in pages])

    def history(
        self, name: str = "", *, page_size: int = 100, timeout_s: float | None = None
    ) -> AsyncIterator[HistoryEntry]:
        """Iterate over the history of changes (who, what and when), newest first, including
        deleted names; "" means all names. Fetches pages as needed, each within
        ``timeout_s``."""
        page = partial(calls_admin.history_page, name=name, page_size=page_size)
        return self._pages(page, timeout_s)

    def watch(self, since: int = 0, *, timeout_s: float | None = None) -> AsyncAdapterWatch:
        """Stream the events of all adapters, without end: first the events after ``since``
        (or, if the server no longer has them, RESET and the present adapters), then SYNCED,
        then live events.

        If the server restarts or the connection breaks, it resumes by itself without a gap,
        as long as `RetryPolicy` has attempts left.

        Args:
            since: `AdapterEvent.sequence` of the last event seen; 0 at first.
            timeout_s: limit for the whole watch; none if unset.
        """
        start = self._channel.unary_stream(
            calls_admin.WATCH,
            request_serializer=adapters_pb2.WatchAdaptersRequest.SerializeToString,
            response_deserializer=adapters_pb2.WatchAdaptersResponse.FromString,
        )
        reader = WatchReader(since)
        attempts = Attempts(
            self._retry, repeatable=True, timeout_s=timeout_s, reconnect_s=calls.RECONNECT_S
        )
        return AsyncAdapterWatch(
            StreamStart(
                lambda left_s: start(reader.request(), timeout=left_s, metadata=self._metadata),
                attempts,
                lambda error: to_error(error, self.address, timeout_s=timeout_s),
            ),
            reader,
        )
