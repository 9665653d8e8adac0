"""ReplicationService for followers, and the calls that a follower makes to its registry."""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from veneer_proto.v1 import adapters_pb2_grpc, replication_pb2, replication_pb2_grpc
from veneer_registry.bundle_files import REQUIRED_FILES
from veneer_registry.errors import (
    Aborted,
    AdapterNotFound,
    InvalidField,
    PermissionDenied,
    Unavailable,
    Unimplemented,
)
from veneer_registry.freshness import HEARTBEAT_S
from veneer_registry.lease import RevisionLease
from veneer_registry.registry import Registry

from veneer_server.access.authenticate import PASSED_ON
from veneer_server.access.caller import Caller
from veneer_server.follower.registry_channel import RegistryChannel, to_error
from veneer_server.follower.standing import Standing
from veneer_server.logs import get_logger
from veneer_server.replication.feed import Feed
from veneer_server.replication.replicas import Replicas
from veneer_server.replication.states import BeginFeed, Message, SnapshotEnd, Told
from veneer_server.replication.wire import to_wire
from veneer_server.serving.generation import READER_LIMIT_S
from veneer_server.serving.spare_time import to_the_end
from veneer_server.serving.tenants import Tenant

CHUNK: Final = 256 << 10
"""Bytes of a chunk of weights."""

_BATCH: Final = 64
"""Names of a snapshot that are read at once."""

_NAME: Final = 128

_log = get_logger(__name__)

Write = Callable[[Any], Awaitable[None]]
Source = Callable[[str], Registry | None]
"""Returns the registry of a tenant, if it is open."""

CaughtUp = Callable[[Mapping[str, int]], Awaitable[None]]
"""Applies what other registries of the same catalog have changed, at least up to these numbers
by tenant, if they exist. Raises Unavailable."""


class _Stamps:
    """A follower's last stamp, for one connection.

    Attributes:
        last: see `Heartbeat.echo`.
        new: set when there is another one.
    """

    def __init__(self) -> None:
        self.last = 0
        self.new = asyncio.Event()


class ReplicationService(replication_pb2_grpc.ReplicationServiceServicer):
    """Serves followers. Reading the catalog and the store happens in worker threads."""

    def __init__(
        self,
        feed: Feed,
        replicas: Replicas,
        source: Source,
        *,
        caught_up: CaughtUp | None = None,
        asks_callers: bool = False,
        heartbeat_s: float = HEARTBEAT_S,
        reader_limit_s: float = READER_LIMIT_S,
    ) -> None:
        """Args:
        caught_up: brings catalogs that this registry shares with others up to date.
        asks_callers: whether callers of this server must say who they are.
        """
        self._caught_up = caught_up
        self._feed = feed
        self._replicas = replicas
        self._source = source
        self._asks_callers = asks_callers
        self._heartbeat_s = heartbeat_s
        self._reader_limit_s = reader_limit_s

    async def Follow(  # type: ignore[override]  # writes instead of yielding
        self, request_iterator: Any, context: Any
    ) -> None:
        """Send a follower all names, or the changes that it missed; then new changes, until it
        leaves."""
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("message") != "start":
            raise InvalidField(
                "the first request must be `start`", metadata={"field": "message"}
            )
        start = first.start
        if not 1 <= len(start.follower) <= _NAME:
            raise InvalidField(
                f"start.follower must have 1 to {_NAME} characters",
                metadata={"field": "start.follower"},
            )
        stamps = _Stamps()
        telling = asyncio.ensure_future(self._tell(start, context.write, stamps))
        hearing = asyncio.ensure_future(self._hear(start.follower, requests, stamps))
        try:
            await asyncio.wait({telling, hearing}, return_when=asyncio.FIRST_COMPLETED)
            for ended in (telling, hearing):
                if ended.done():
                    ended.result()
        finally:
            for task in (telling, hearing):
                task.cancel()
            await asyncio.gather(telling, hearing, return_exceptions=True)

    async def _hear(self, follower: str, requests: Any, stamps: _Stamps) -> None:
        """Record which changes a follower has applied. One that goes silent without leaving
        keeps its lease."""
        async for request in requests:
            if request.WhichOneof("message") != "applied":
                raise InvalidField(
                    "after `start`, requests must be `applied`", metadata={"field": "message"}
                )
            if request.applied.leaving:
                self._replicas.leave(follower)
                return
            self._replicas.report(follower, request.applied.sequence)
            if request.applied.stamp:
                stamps.last = request.applied.stamp
                stamps.new.set()

    async def _tell(
        self, start: replication_pb2.FollowStart, write: Write, stamps: _Stamps
    ) -> None:
        feed = self._feed
        if self._caught_up is not None:
            await self._caught_up(dict(start.catalogs))
        numbers = feed.told_by_tenant()
        store, base = await to_the_end(feed.facts)
        begin = partial(
            BeginFeed,
            run=feed.run,
            store=store,
            catalogs=feed.catalogs(numbers),
            base=base,
            heartbeat_s=self._heartbeat_s,
            lease_s=self._replicas.lease_s,
            asks_callers=self._asks_callers,
            lag_s=feed.lag_s,
        )
        place = start.sequence
        _log.info("follower", follower=start.follower, run=start.run, sequence=place)
        if feed.after(start.run, place) is None:
            place = await self._snapshot(begin, write)
        else:
            await self._send(write, begin(snapshot=False, sequence=place))
        while True:
            changes = feed.after(feed.run, place)
            if changes is None:
                raise Aborted(
                    "the follower fell behind the registry's change buffer: follow again",
                    metadata={"cause": "fell_behind"},
                )
            for change in changes:
                told = await to_the_end(partial(feed.told, change))
                await self._send(write, told)
                place = change.sequence
            beat = feed.heartbeat()
            if beat.sequence == place:
                stamps.new.clear()
                await self._send(write, replace(beat, echo=stamps.last))
                await self._news(place, stamps)

    async def _news(self, place: int, stamps: _Stamps) -> None:
        """Wait for a change after ``place``, or a stamp to echo, or the next heartbeat."""
        waiting = [
            asyncio.ensure_future(self._feed.beyond(place, self._heartbeat_s)),
            asyncio.ensure_future(stamps.new.wait()),
        ]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _snapshot(self, begin: Callable[..., BeginFeed], write: Write) -> int:
        beat, entries = self._feed.snapshot()
        await self._send(write, begin(snapshot=True, sequence=beat.sequence))
        items = list(entries.items())
        for at in range(0, len(items), _BATCH):
            batch = items[at : at + _BATCH]
            states = await to_the_end(
                lambda batch=batch: [self._feed.state(*each) for each in batch]  # type: ignore[misc]
            )
            for state in states:
                await self._send(write, Told(state))
        await self._send(write, SnapshotEnd(beat.sequence, beat.checksum))
        return beat.sequence

    async def _send(self, write: Write, message: Message) -> None:
        await self._write(write, to_wire(message))

    async def _write(self, write: Write, message: object) -> None:
        try:
            async with asyncio.timeout(self._reader_limit_s):
                await write(message)
        except TimeoutError as error:
            raise Aborted(
                f"the follower read nothing for {self._reader_limit_s:g} s",
                metadata={"cause": "reader_limit"},
            ) from error

    # --------------------------------------------------------------------- weights

    async def FetchWeights(  # type: ignore[override]  # writes instead of yielding
        self, request: replication_pb2.FetchWeightsRequest, context: Any
    ) -> None:
        """Send one of the two weight files, from an offset on, with a lease on the weights."""
        if request.file not in REQUIRED_FILES:
            raise InvalidField(
                f"file must be one of {', '.join(REQUIRED_FILES)}", metadata={"field": "file"}
            )
        registry = self._source(request.tenant)
        if registry is None:
            raise AdapterNotFound(
                "this tenant has no adapters here", metadata={"tenant": request.tenant[:80]}
            )
        lease = await to_the_end(lambda: _leased(registry, request.weights_digest))
        with lease:
            # The object store alone may have them: pushed at another registry, or evicted here.
            await registry.present(lease.ref)
            await self._file(registry, lease, request, context.write)

    async def _file(
        self,
        registry: Registry,
        lease: RevisionLease,
        request: replication_pb2.FetchWeightsRequest,
        write: Write,
    ) -> None:
        path = registry.weights_folder(lease.ref) / request.file
        file, size = await to_the_end(lambda: _opened(path))
        try:
            at = request.offset
            while True:
                data = b""
                if at < size:
                    data = await to_the_end(lambda at=at: os.pread(file, CHUNK, at))  # type: ignore[misc]
                await self._write(
                    write,
                    replication_pb2.FetchWeightsResponse(
                        size=size, offset=at, data=data, crc32=zlib.crc32(data)
                    ),
                )
                at += len(data)
                if not data or at >= size:
                    return
        finally:
            with suppress(OSError):
                os.close(file)


def _leased(registry: Registry, digest: str) -> RevisionLease:
    """A lease on weights. Raises AdapterNotFound, or the error that says why the revision with
    these weights is not served."""
    try:
        return registry.acquire_weights(digest)
    except AdapterNotFound:
        for record in registry.holding(digest):
            return registry.acquire(f"{record.ref.name}@{record.ref.revision}")
        raise


def _opened(path: Path) -> tuple[int, int]:
    """(descriptor, size). Raises AdapterNotFound if the file is gone."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise AdapterNotFound(
            "the adapter's files no longer exist", detail=str(path)
        ) from error
    return file, os.fstat(file).st_size


class NoFollowers(replication_pb2_grpc.ReplicationServiceServicer):
    """ReplicationService of a follower, which has no followers."""

    def __init__(self, registry: str) -> None:
        """Args: registry: address of the registry that it follows."""
        self._registry = registry

    async def Follow(self, request_iterator: object, context: object) -> None:  # type: ignore[override]
        self._refuse()

    async def FetchWeights(self, request: object, context: object) -> None:  # type: ignore[override]
        self._refuse()

    def _refuse(self) -> None:
        raise Unimplemented(
            f"this server is itself a follower: follow the registry at {self._registry}",
            metadata={"cause": "follower", "registry": self._registry},
        )


# -------------------- asking
# Calls that a follower passes on to its registry, with the caller's own credentials.

T = TypeVar("T")

AWAY_S: Final = 15.0
"""A call ends after this long without progress, if nothing is heard from the registry
meanwhile. On a half-open connection, gRPC's keepalive did not end it (tried for 60 s)."""


class CallProgress:
    """Records when a call last sent or received a message."""

    def __init__(self) -> None:
        self.made()

    def made(self) -> None:
        self._at = time.monotonic()

    @property
    def ago_s(self) -> float:
        return time.monotonic() - self._at


class Asking:
    """Calls the registry's AdapterService. Calls raise the registry's errors, `Unavailable` if
    it does not answer, `FailedPrecondition` if only one of the two servers asks who calls, and
    `PermissionDenied` if the caller has only a certificate."""

    def __init__(
        self, channel: RegistryChannel, standing: Standing, *, asks_callers: bool
    ) -> None:
        """Args: asks_callers: whether callers of this server say who they are."""
        self._channel = channel
        self._standing = standing
        self._asks_callers = asks_callers

    async def answer(
        self,
        method: str,
        request: Any,
        caller: Caller,
        *,
        progress: CallProgress | None = None,
    ) -> Any:
        """Call a method, and return its answer.

        Args:
            request: a message, or an iterator of messages.
            caller: the registry sees its credentials, and its deadline applies.
            progress: to be updated by the iterator for each message.
        """
        call = self._begin(method, request, caller)
        try:
            return await self._while_heard(call, progress or CallProgress())
        except grpc.aio.AioRpcError as error:
            raise to_error(error, self._channel.place.address) from error
        finally:
            call.cancel()

    async def messages(
        self, method: str, request: Any, caller: Caller
    ) -> AsyncGenerator[Any, None]:
        """Call a method that streams, and yield its messages."""
        call = self._begin(method, request, caller)
        try:
            while True:
                message = await self._while_heard(call.read(), CallProgress())
                if message is grpc.aio.EOF:
                    return
                yield message
        except grpc.aio.AioRpcError as error:
            raise to_error(error, self._channel.place.address) from error
        finally:
            call.cancel()

    async def _while_heard(self, awaited: Awaitable[T], progress: CallProgress) -> T:
        answering = asyncio.ensure_future(awaited)
        try:
            while not (await asyncio.wait({answering}, timeout=AWAY_S / 4))[0]:
                silent_s = min(self._standing.lag_s, progress.ago_s)
                if silent_s > AWAY_S and not self._standing.connected:
                    raise self._standing.unreachable("this call", "it is silent")
            return answering.result()
        finally:
            answering.cancel()

    def _begin(self, method: str, request: Any, caller: Caller) -> Any:
        self._standing.check_fit()
        if self._asks_callers and not caller.shows_secret:
            # The registry would see the certificate of this server's own connection.
            raise PermissionDenied(
                f"{method} needs the registry, and a client certificate cannot be forwarded "
                "to it: send a key or token, or call the registry at "
                f"{self._standing.registry}",
                metadata={"method": method, "cause": "certificate"},
            )
        stub = adapters_pb2_grpc.AdapterServiceStub(self._channel.channel)
        return getattr(stub, method)(
            request,
            metadata=(*caller.shown, (PASSED_ON, caller.tenant)),
            timeout=caller.time_left,
        )


# -------------------- arrival
# Waits until a change that the registry has made for a follower's caller is known here.

ARRIVAL_S: Final = 10.0
"""How long a change that the registry has made may take to be known here."""

Until = Callable[[Callable[[], bool], float], Awaitable[bool]]
"""Wait until a predicate holds for the view of the registry. Args: the predicate, a timeout in
seconds. Returns False on timeout."""


async def arrived(until: Until, name: str, holds: Callable[[], bool]) -> None:
    """Wait until a change of ``name`` is known here. Raises Unavailable."""
    if not await until(holds, ARRIVAL_S):
        raise Unavailable(
            f"the registry changed {name!r}, but the change did not arrive here within "
            f"{ARRIVAL_S:g} s: it will once the registry is reachable",
            metadata={"adapter": name, "cause": "registry_away"},
            retry_after_s=1.0,
        )


def knows(home: Tenant, spec: str, caller: Caller) -> bool:
    """Whether ``name@revision`` is known here, by a view that is as new as the caller wants."""
    try:
        home.registry.check_age(caller.most_lag_s)
        home.registry.resolve(spec)
    except (AdapterNotFound, Unavailable):  # Unavailable: cannot tell, the registry is away
        return False
    return True
