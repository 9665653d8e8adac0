"""The engines that requests may go to: chosen by adapter, without those that are dead.

Serve says which replicas run, and each replica says once a second what it has in memory and
whether its engine is healthy. Both arrive late. So a call that fails marks its replica at once,
and the replica gets no requests until a later report of its own says that it is healthy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from veneer_registry.errors import Unavailable
from veneer_server.logs import get_logger
from veneer_server.routing.adapter_router import AdapterRouter
from veneer_server.routing.records import ReplicaReport, Wanted

from veneer_ray.calls import lost

_CONNECT_S: Final = 2.0
"""A replica that cannot be connected to within this time counts as dead."""
_SILENT_S: Final = 5.0
"""A replica is skipped when it has been silent for this much longer than another one."""
_CHANNEL: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """An engine's replica that Serve counts as running.

    Attributes:
        grpc: ``HOST:PORT`` of its server.
        http: the same for the OpenAI API.
        stats: its newest ``record_routing_stats``; empty before the first.
    """

    grpc: str
    http: str
    stats: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine that a call goes to.

    Attributes:
        replica: its id.
        channel: connected to its server.
        http: as in `RunningEngine`.
    """

    replica: str
    channel: grpc.aio.Channel
    http: str


@dataclass(slots=True)
class _Replica:
    """What is known of a replica.

    Attributes:
        at: time of its last report, by its own clock.
        heard: when that report arrived, or the replica was first seen; monotonic seconds.
        failed: whether a call there has failed since that report.
        calls: calls under way there.
        gone: whether Serve no longer counts it as running.
    """

    running: RunningEngine
    channel: grpc.aio.Channel
    heard: float
    at: float = 0.0
    failed: bool = False
    calls: int = 0
    gone: bool = False


class EngineReplicas:
    """Chooses an engine for each call, and keeps a channel to each. Belongs to one event loop.

    Args:
        wait_s: seconds that a call may wait until an engine can be reached.
        wall: seconds since 1970, the clock of the replicas' reports.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        wait_s: float,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._router = AdapterRouter()
        self._wait_s = wait_s
        self._wall = wall
        self._clock = clock
        self._closing: set[asyncio.Task[None]] = set()
        self._known: dict[str, _Replica] = {}
        self._changed = asyncio.Event()

    def update(self, running: Mapping[str, RunningEngine]) -> None:
        """Set the replicas that Serve counts as running, by id, with their last reports."""
        for replica in self._known.keys() - running.keys():
            # It drains or has died. Calls that run there go on.
            known = self._known.pop(replica)
            self._router.leave(replica)
            known.gone = True
            self._close_if_unused(known)
        now = self._clock()
        for replica, engine in running.items():
            known = self._known.get(replica) or self._add(replica, engine)
            at = float(engine.stats.get("at", 0.0))
            if at > known.at:
                known.at, known.heard, known.failed = at, now, False
                self._router.report(replica, report_of(engine.stats, self._wall()), now)
        newest = max((known.heard for known in self._known.values()), default=now)
        for replica, known in self._known.items():
            unfit = not running[replica].stats.get("healthy", True)
            if known.failed or unfit or newest - known.heard > _SILENT_S:
                self._router.drain(replica)
            else:
                self._router.join(replica)
        self._changed.set()
        self._changed = asyncio.Event()

    def failed(self, replica: str) -> None:
        """Send no further calls to a replica until its next report says that it is healthy."""
        known = self._known.get(replica)
        if known is not None and not known.failed:
            _log.warning("an engine gets no calls until it reports again", replica=replica)
            known.failed = True
            self._router.drain(replica)

    @asynccontextmanager
    async def chosen(self, wanted: Wanted) -> AsyncIterator[EngineChoice]:
        """Choose an engine and connect to it. Within the block the call counts as running.

        Raises:
            Unavailable: no engine could be reached within ``wait_s``; nothing was sent.
        """
        until = self._clock() + self._wait_s
        while True:
            routed = await self._routed(wanted, until)
            known = self._known[routed.replica]
            known.calls += 1
            try:
                if await _connected(known.channel):
                    yield EngineChoice(routed.replica, known.channel, known.running.http)
                    return
                self.failed(routed.replica)
            finally:
                known.calls -= 1
                self._close_if_unused(known)
                self._router.finished(routed, self._clock())

    async def close(self) -> None:
        """Close the channels."""
        for known in self._known.values():
            await known.channel.close()

    async def _routed(self, wanted: Wanted, until: float) -> Any:
        while True:
            changed = self._changed
            with suppress(Unavailable):
                return self._router.choose(wanted, self._clock())
            try:
                async with asyncio.timeout(until - self._clock()):
                    await changed.wait()
            except TimeoutError:
                raise lost("no engine could be reached in time", "no_replica") from None

    def _add(self, replica: str, engine: RunningEngine) -> _Replica:
        channel = grpc.aio.insecure_channel(engine.grpc, options=_CHANNEL)
        self._known[replica] = _Replica(engine, channel, self._clock())
        self._router.join(replica)
        return self._known[replica]

    def _close_if_unused(self, known: _Replica) -> None:
        if known.gone and not known.calls:
            task = asyncio.get_running_loop().create_task(known.channel.close())
            self._closing.add(task)  # otherwise it may be collected before it has run
            task.add_done_callback(self._closing.discard)


async def _connected(channel: grpc.aio.Channel) -> bool:
    """Whether the channel is connected; waits while it connects."""
    ready, failed = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE
    with suppress(TimeoutError):
        async with asyncio.timeout(_CONNECT_S):
            while (state := channel.get_state(try_to_connect=True)) is not ready:
                if state is failed:
                    return False
                await channel.wait_for_state_change(state)
            return True
    return False


def report_of(stats: Mapping[str, Any], now: float) -> ReplicaReport:
    """Convert a replica's ``record_routing_stats``. Its clock may differ from ours: a report
    from the future counts as made now."""
    return ReplicaReport(
        resident=frozenset(stats.get("resident", ())),
        requests=int(stats.get("requests", 0)),
        age_s=max(0.0, now - float(stats.get("at", now))),
    )
