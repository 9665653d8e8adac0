"""The connection that keeps a follower's view up to date; reconnects whenever it ends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import grpc
from veneer_proto.v1 import replication_pb2, replication_pb2_grpc
from veneer_registry.errors import FailedPrecondition, VeneerError
from veneer_registry.freshness import HEARTBEAT_S

from veneer_server.follower.registry_channel import (
    RegistryAddress,
    refuses_strangers,
    to_error,
)
from veneer_server.follower.standing import Standing
from veneer_server.follower.view import OutOfStep, Received, View
from veneer_server.logs import get_logger
from veneer_server.replication.states import LEASE_S, BeginFeed, Heartbeat
from veneer_server.replication.wire import from_wire

_FIRST_WAIT_S: Final = 0.05
_LONGEST_WAIT_S: Final = 0.8
"""Longest wait between attempts to connect. With the time to connect, an attempt takes less
than two seconds."""

_CONNECT_S: Final = 2.0
"""Seconds that a connection may take to answer: it may be half open, or packets may be lost."""

_STAMPS_A_SECOND: Final = 1_000_000_000

_SILENT_BEATS: Final = 4
"""Heartbeats that may be missing before a connection counts as half open."""

_REFUSED: Final = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"})
"""Codes that a quick retry will not change."""

REFUSED_WAIT_S: Final = 5.0
"""Wait before the next attempt after an error that a quick retry will not change."""

_log = get_logger(__name__)


class RegistryLink:
    """Keeps `view` up to date until it is stopped. Belongs to one event loop.

    Attributes:
        connects: number of connections that the registry has answered.
        resyncs: number of these that began with a snapshot although a view existed.
    """

    def __init__(
        self,
        place: RegistryAddress,
        view: View,
        standing: Standing,
        *,
        name: str,
        base: str,
        asks_callers: bool,
        apply: Callable[[Received], Awaitable[bool]],
    ) -> None:
        """Args:
        name: this follower's name.
        base: identity of this server's base.
        asks_callers: whether this server authenticates callers.
        apply: applies a message's changes; returns whether this server has, durably, all that
            the view has, so that it may be acknowledged to the registry.
        """
        self.connects = 0
        self.resyncs = 0
        self._place = place
        self._view = view
        self._standing = standing
        self._name = name
        self._base = base
        self._asks_callers = asks_callers
        self._apply = apply
        self._task: asyncio.Task[None] | None = None
        self._synced = asyncio.Event()
        self._answered = asyncio.Event()
        """Set once the first snapshot is applied, or the registry does not fit."""
        self._done = view.run, view.sequence
        """Run and sequence up to which changes are applied."""
        self._applied = asyncio.Event()
        self._echoes = False
        self._registry_lag_s = 0.0
        self._asked = 0.0
        """When the registry was asked to be followed, on `Standing`'s clock."""
        self._heartbeat_s = HEARTBEAT_S
        self._lease_s = LEASE_S

    def start(self) -> None:
        """Begin to follow the registry."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End the connection. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def synced(self, within_s: float) -> bool:
        """Wait for the first snapshot; return False on timeout. Raises FailedPrecondition if
        only one of this server and the registry authenticates callers."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._answered.wait()
        self._standing.check_fit()
        return self._synced.is_set()

    async def _run(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            connects = self.connects
            pause_s, why = 0.0, ""
            try:
                await self._follow()
                why = "the registry ended the connection"
            except OutOfStep as error:
                why = f"out of step: {error}"
            except TimeoutError:
                why = "no message arrived in time"
            except grpc.aio.AioRpcError as error:
                failure = to_error(error, self._place.address)
                why = str(failure)
                if failure.code in _REFUSED:
                    pause_s = REFUSED_WAIT_S
            except (VeneerError, ValueError) as error:
                why, pause_s = str(error), REFUSED_WAIT_S
            except Exception as error:  # no input from there may end the loop
                why, pause_s = repr(error), REFUSED_WAIT_S
                _log.error("following failed", error, registry=self._place.address)
            self._tell_cut(why)
            if self.connects > connects:
                wait_s = _FIRST_WAIT_S
            await asyncio.sleep(
                max(pause_s, wait_s) * (0.5 + random.random() / 2)  # nosec B311 # not for secrets
            )
            wait_s = min(_LONGEST_WAIT_S, wait_s * 2)

    def _tell_cut(self, why: str) -> None:
        if self._standing.connected:
            _log.warning("registry unreachable", registry=self._place.address, why=why)
        self._standing.fault = why
        self._standing.cut()

    async def _follow(self) -> None:
        """Follow over one connection until it ends."""
        run, sequence = self._view.place()
        async with self._place.connect() as channel:
            stub: Any = replication_pb2_grpc.ReplicationServiceStub(channel)
            call = stub.Follow(metadata=self._place.metadata)
            self._asked = self._standing.now
            telling: asyncio.Task[None] | None = None
            try:
                begin = replication_pb2.FollowStart(
                    follower=self._name,
                    run=run,
                    sequence=sequence,
                    catalogs=self._view.catalogs,
                )
                async with asyncio.timeout(_CONNECT_S):
                    await call.write(replication_pb2.FollowRequest(start=begin))
                    first = await call.read()
                limit_s = _CONNECT_S
                while first is not grpc.aio.EOF:
                    if first is None:  # gRPC's value for an unreadable message
                        raise ValueError("the registry sent an invalid message")
                    message = from_wire(first, self._base)
                    if isinstance(message, BeginFeed):
                        await self._check_fit(message, channel)
                    received = self._view.receive(message)
                    if isinstance(message, BeginFeed):
                        self._begun(message)
                        limit_s = self._heartbeat_s * _SILENT_BEATS
                        telling = asyncio.get_running_loop().create_task(
                            self._tell(call, message.run)
                        )
                    await self._take(message, received)
                    async with asyncio.timeout(limit_s):
                        first = await call.read()
                status = await call.code()
                if status is not grpc.StatusCode.OK:
                    raise grpc.aio.AioRpcError(
                        status,
                        await call.initial_metadata(),
                        await call.trailing_metadata(),
                        await call.details(),
                    )
            except asyncio.CancelledError:
                if telling is not None:  # this server stops
                    telling.cancel()
                    await asyncio.gather(telling, return_exceptions=True)
                    await _say_goodbye(call)
                raise
            finally:
                if telling is not None:
                    telling.cancel()
                call.cancel()

    async def _check_fit(self, begin: BeginFeed, channel: grpc.aio.Channel) -> None:
        """Raise FailedPrecondition, before anything is applied, if only one of this server and
        the registry authenticates callers."""
        asks_there = begin.asks_callers
        if asks_there is None:  # an older version
            asks_there = await refuses_strangers(channel)
        unfit = self._standing.unfit
        try:
            self._standing.fit(asks_here=self._asks_callers, asks_there=asks_there)
        except FailedPrecondition as error:
            if error.message != unfit:
                _log.error("not following the registry", why=error.message)
            self._answered.set()
            raise

    def _begun(self, begin: BeginFeed) -> None:
        self.connects += 1
        self._echoes = begin.echoes
        self._registry_lag_s = begin.lag_s
        self._heartbeat_s, self._lease_s = begin.heartbeat_s, begin.lease_s
        self._standing.fault = ""
        if begin.base and begin.base != self._base:
            self._standing.fault = "the registry has another base model"
            _log.error(
                "the registry checks adapters against another base than this server has: all "
                "adapters are refused here",
                registry=self._place.address,
            )
        if begin.snapshot and self._view.synced:
            self.resyncs += 1
        _log.info(
            "registry followed",
            registry=self._place.address,
            snapshot=begin.snapshot,
            sequence=begin.sequence,
        )

    async def _take(self, message: object, received: Received) -> None:
        if received.restored:
            _log.warning("the registry was restored from a backup: taking over its names again")
        if received.moved:
            _log.warning("it is another registry than before: taking over its names again")
        # The view is ahead of the copies while a change, or a snapshot, is being applied.
        before = self._done
        whole = await self._apply(received)
        if whole:
            self._done = self._view.run, self._view.sequence
        self._standing.sequence = self._view.sequence
        if received.current and whole:
            if isinstance(message, Heartbeat):
                self._registry_lag_s = message.lag_s
            at = self._known_at(message)
            now = self._standing.now if at is None else at
            self._standing.current(now - self._registry_lag_s)
            self._synced.set()
            self._answered.set()
        elif received.changes and whole and self._standing.connected and not self._echoes:
            self._standing.current(self._standing.now - self._registry_lag_s)
        # Not for each heartbeat: the registry sends one for each report.
        if self._done != before or isinstance(message, BeginFeed):
            self._applied.set()

    def _known_at(self, message: object) -> float | None:
        """When the registry had no more than the view has now: at this server's time that it
        echoes, however long its messages took; None for now, if it echoes none."""
        if not self._echoes:
            return None
        if isinstance(message, Heartbeat) and message.echo:
            return message.echo / _STAMPS_A_SECOND
        return self._asked

    async def _tell(self, call: Any, run: str) -> None:
        """Report applied changes to the registry: at once, and in time to keep the lease. Each
        report has the time, for `Heartbeat.echo`."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(self._lease_s / 4, self._heartbeat_s)):
                        await self._applied.wait()
                self._applied.clear()
                done_run, sequence = self._done
                # Until a snapshot is applied, the number belongs to another run.
                applied = replication_pb2.Applied(
                    sequence=sequence if done_run == run else 0,
                    stamp=int(self._standing.now * _STAMPS_A_SECOND),
                )
                await call.write(replication_pb2.FollowRequest(applied=applied))


async def _say_goodbye(call: Any) -> None:
    """Leave, so that publications need not wait for the lease to expire."""
    leaving = replication_pb2.FollowRequest(applied=replication_pb2.Applied(leaving=True))
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
        async with asyncio.timeout(0.2):
            await call.write(leaving)
            await call.read()  # until the registry has ended the call
