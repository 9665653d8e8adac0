"""Receives uploads: first the options, then chunks, which go into a folder of the registry.

Nothing is visible before the registry's commit. A refused upload leaves nothing behind. If the
connection breaks, the received data is kept and the upload can be resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

from veneer_registry.errors import (
    Aborted,
    AdapterExists,
    InvalidField,
    QuotaExceeded,
    VeneerError,
)
from veneer_registry.publishing import Staged
from veneer_registry.records import Published, UploadRequest
from veneer_registry.registry import Registry
from veneer_registry.upload import Upload

from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.logs import get_logger
from veneer_server.queues.upload_flow import UploadFlow
from veneer_server.quotas.quota import Account
from veneer_server.quotas.uploads import UploadQuotas, UploadReservation
from veneer_server.serving.spare_time import to_the_end

MAX_FILES: Final = 16
MAX_LABELS: Final = 64


@dataclass(frozen=True, slots=True)
class UploadOptions:
    """An announced upload, and what to do with it.

    Attributes:
        validate_only: check everything, publish nothing.
        activate: load the adapter into memory before its name moves to it.
        resume: continue an interrupted upload with the data already received.
    """

    request: UploadRequest
    validate_only: bool = False
    activate: bool = False
    resume: bool = False


@dataclass(frozen=True, slots=True)
class UploadChunk:
    """A piece of one file, and its offset there."""

    file: str
    offset: int
    data: bytes


UploadMessage = UploadOptions | UploadChunk
"""The options come first, then chunks."""


def check_file_count(count: int) -> None:
    """Raise InvalidField unless an upload may have ``count`` files."""
    if not 1 <= count <= MAX_FILES:
        raise InvalidField(
            f"spec.files has {count} files: list each file of the adapter, at most {MAX_FILES}",
            metadata={"field": "spec.files"},
        )


# -------------------- upload places
# Places for uploads: how many run at once, and which upload loses its place to another.
#
# All tenants share the places. A tenant with fewer places than its share can take one from a
# tenant with more than its share.

WINDOW_S: Final = 60.0
"""Seconds over which an upload's rate is measured; its client may be silent for this long."""

MIN_RATE: Final = 16 << 10
"""Default of ``--min-upload-rate``, in bytes per second. A 1 Mbit/s line has 125,000, which is
far more."""

PATIENCE_S: Final = 10.0
"""As `WINDOW_S`, when another upload needs the place."""

DEADLINE_S: Final = 3600.0
"""Default of ``--upload-deadline``."""

TURN_S: Final = 60.0
LONG_S: Final = 600.0
"""An upload that has had its place for `TURN_S`, and would need more than `LONG_S` to finish at
its rate so far, loses the place when another upload needs it."""

MAX_AT_ONCE: Final = 8

MAX_DISCARDS: Final = 4
"""Most refused uploads, beyond `MAX_AT_ONCE`, that may finish sending; each may hold a
message."""

T = TypeVar("T")


class UploadPace:
    """Checks that an upload arrives fast enough.

    In each `WINDOW_S` of waiting for the client, ``min_rate`` bytes per second must arrive, or
    the end of the upload. So the total waiting time is at most its size divided by the rate,
    plus one window. Our own processing time counts only towards ``deadline_s``, the limit for
    the whole upload.
    """

    def __init__(self, min_rate: int, deadline_s: float = DEADLINE_S) -> None:
        self._min_rate = min_rate
        self._window_s = WINDOW_S
        self._began = asyncio.get_running_loop().time()
        self._ends = self._began + deadline_s
        self._waited_s = 0.0
        """Waiting time since enough bytes last arrived."""
        self._brought = 0
        self._held_s = 0.0
        self._total = 0
        self._missing = 0
        self._waiting_since: float | None = None
        self._timeout: asyncio.Timeout | None = None
        self.displaced = False

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return asyncio.get_running_loop().time() >= self._ends

    @property
    def missing(self) -> int:
        """Bytes that are still to come; 0 if not known yet."""
        return self._missing

    @property
    def receiving(self) -> bool:
        """Whether its client still has something to send."""
        return self._missing > 0 or self._waiting_since is not None

    @property
    def slow(self) -> bool:
        """Whether its client is so slow that another upload may take its place."""
        if self._waiting_since is None:
            return False
        waited_s = self._waited_s + asyncio.get_running_loop().time() - self._waiting_since
        return (
            not self.displaced
            and waited_s >= min(PATIENCE_S, self._window_s)
            and self._brought < self._min_rate * waited_s
        )

    @property
    def remaining_s(self) -> float:
        """How long the rest will take at the rate so far; 0 if not known yet."""
        has_taken_s = asyncio.get_running_loop().time() - self._began - self._held_s
        if has_taken_s < TURN_S or self.displaced or self._waiting_since is None:
            return 0.0
        return self._missing * has_taken_s / max(1, self._total)

    def displace(self) -> None:
        """End the upload, because another one gets its place."""
        self.displaced = True
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def held(self, seconds: float) -> None:
        """Record seconds for which the server throttled the upload; `remaining_s` ignores
        them."""
        self._held_s += seconds

    def progressed(self, count: int, missing: int = 0) -> None:
        """Record ``count`` new bytes; ``missing`` are still to come."""
        self._total += count
        self._missing = missing
        self._brought += count
        if self._brought >= self._min_rate * self._window_s:
            self._brought, self._waited_s = 0, 0.0

    async def wait(self, receive: Callable[[], Awaitable[T]]) -> T:
        """Wait for the client's next message. Raises TimeoutError if the client is too slow."""
        loop = asyncio.get_running_loop()
        began = self._waiting_since = loop.time()
        if self.displaced:
            raise TimeoutError
        try:
            until = min(began + self._window_s - self._waited_s, self._ends)
            async with asyncio.timeout_at(until) as self._timeout:
                return await receive()
        finally:
            self._timeout = self._waiting_since = None
            self._waited_s += loop.time() - began


class UploadPlaces:
    """Places for uploads, and the threads that do their work. Belongs to one event loop.

    Attributes:
        discarding: number of refused uploads that are finishing sending.
        flow: limits how fast uploads are received.
        workers: threads at normal priority: at a low priority, a thread that holds the GIL may
            get no CPU time to release it, and the event loop would wait for it. The check of
            an upload, which takes long, runs in a process of its own.
    """

    def __init__(self, flow: UploadFlow | None = None) -> None:
        """Args:
        flow: limits how fast uploads are received; None for no limit.
        """
        self.discarding = 0
        self.flow = flow or UploadFlow(lambda: False)
        self.workers = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="upload")
        self._running: dict[UploadPace, str] = {}
        """The tenant of each upload; oldest first."""

    def take(self, tenant: str, pace: UploadPace) -> None:
        """Take a place. If none is free, take it from an upload that is slow or has a long time
        left, or from a tenant with more than its share. Raises QuotaExceeded if no upload has
        to give way."""
        if len(self._running) >= MAX_AT_ONCE:
            leaves = self._slow() or self._beyond_share(tenant)
            if leaves is None:
                raise QuotaExceeded(
                    f"{MAX_AT_ONCE} uploads are already running: retry when one has ended",
                    metadata={"limit": str(MAX_AT_ONCE)},
                    retry_after_s=2.0,
                )
            leaves.displace()
            del self._running[leaves]
        self._running[pace] = tenant

    def leave(self, pace: UploadPace) -> None:
        """Give a place back. Does nothing if another upload has it already."""
        self._running.pop(pace, None)

    def _slow(self) -> UploadPace | None:
        slow = next((pace for pace in self._running if pace.slow), None)
        if slow is not None:
            return slow
        longest = max(self._running, key=lambda pace: pace.remaining_s)
        return longest if longest.remaining_s > LONG_S else None

    def _beyond_share(self, tenant: str) -> UploadPace | None:
        """Of the tenant with the most places, the upload with the most bytes to come; None if
        that tenant has no more than its share, or if ``tenant`` already has its share."""
        held = Counter(self._running.values())
        share = MAX_AT_ONCE // len({*held, tenant})
        most, places = held.most_common(1)[0]
        if held[tenant] >= share or places <= share:
            return None
        running = self._running.items()
        theirs = [pace for pace, whose in running if whose == most and pace.receiving]
        return max(theirs, key=lambda pace: pace.missing, default=None)


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
        registry: Registry,
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
        min_rate: least bytes per second at which each upload must arrive.
        deadline_s: time limit for a whole upload.
        broken: most interrupted uploads that are kept, and most bytes of them together.
        quotas: limits of callers' uploads; None for no limits.
        tenant: name of the tenant.
        places: the places that all tenants share; None for places of its own.
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

    async def committed(self, request: UploadRequest) -> Mapping[str, int]:
        """Return how many bytes of each announced file the server already has. Raises as
        `receive`."""
        return await to_the_end(lambda: self._registry.committed(request), self._workers)

    @contextlib.asynccontextmanager
    async def receive(
        self,
        sent: AsyncIterable[UploadMessage | InvalidField],
        accounts: Sequence[Account] = (),
    ) -> AsyncIterator[tuple[UploadOptions, Upload]]:
        """Receive one upload. It is complete when the block begins. If it has not been
        committed when the block ends, it is suspended, or removed if it was refused.

        Args:
            sent: the client's messages; an error stands for a message that is refused, after
                which the client may finish sending.
            accounts: the accounts whose limits the upload counts towards.

        Raises:
            InvalidField, AdapterInvalid, ChecksumMismatch, DiskFull: the upload is refused.
            AdapterExists: the name is the name of another tenant that shares adapters.
            QuotaExceeded: too many uploads are running, or the caller may not store or send
                this much.
            Aborted: the upload arrived too slowly, or was resumed elsewhere.
        """
        pace = UploadPace(self._min_rate, self._deadline_s)
        try:
            self._places.take(self._tenant, pace)
        except QuotaExceeded:
            if self._places.discarding < MAX_DISCARDS:
                self._places.discarding += 1
                try:
                    await _discard(aiter(sent))
                finally:
                    self._places.discarding -= 1
            raise
        messages = aiter(sent)
        upload: Upload | None = None
        allowed: UploadReservation | None = None
        keep, ended_early = True, False
        try:
            options = await self._next(messages, pace)
            assert isinstance(options, UploadOptions), "they come first"
            self._check_name(options.request.name)
            if self._quotas is not None:
                allowed = await self._quotas.reserve(
                    accounts,
                    self._tenant,
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
        """Run `Registry.validate` in a worker thread."""
        return await to_the_end(lambda: self._registry.validate(upload), self._workers)

    @contextlib.asynccontextmanager
    async def stage(self, upload: Upload) -> AsyncIterator[Staged]:
        """Run `Registry.stage` in a worker thread. What it staged is discarded at the end of
        the block, unless it was committed."""
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
        messages: AsyncIterator[UploadMessage | InvalidField],
        upload: Upload,
        pace: UploadPace,
        allowed: UploadReservation | None,
    ) -> None:
        while (chunk := await self._next(messages, pace)) is not None:
            assert isinstance(chunk, UploadChunk), "only chunks follow the options"
            if len(chunk.data) > MAX_CHUNK:
                raise InvalidField(
                    f"a chunk has {len(chunk.data)} bytes: send at most {MAX_CHUNK}",
                    metadata={"field": "chunk.data"},
                )
            if allowed is not None:
                allowed.received(len(chunk.data))
            missing = upload.missing_bytes
            await to_the_end(_write(upload, chunk), self._workers)
            # Empty chunks and bytes received before are not progress.
            left = upload.missing_bytes
            pace.progressed(missing - left, left)
            pace.held(await self._places.flow.hold(len(chunk.data)))

    async def _next(
        self,
        messages: AsyncIterator[UploadMessage | InvalidField],
        pace: UploadPace,
    ) -> UploadMessage | None:
        """Return the client's next message; None after its last one."""
        try:
            message = await pace.wait(lambda: anext(messages, None))
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
        if isinstance(message, InvalidField):
            raise message
        return message


async def _discard(messages: AsyncIterator[UploadMessage | InvalidField]) -> None:
    """Let a refused client finish sending, up to a limit of bytes and time.

    A client whose write is cut off reports a write error (INTERNAL in grpc.aio) instead of
    the refusal; a client that finishes sending sees the refusal.
    """
    left = DISCARD_BYTES
    with contextlib.suppress(TimeoutError, VeneerError):  # the caller raises the refusal
        async with asyncio.timeout(DISCARD_S):
            async for message in messages:
                left -= len(message.data) if isinstance(message, UploadChunk) else 0
                if left < 0:
                    return


def _write(upload: Upload, chunk: UploadChunk) -> Callable[[], None]:
    return lambda: upload.write(chunk.file, chunk.offset, chunk.data)
