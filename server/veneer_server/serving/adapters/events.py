"""Adapter events, numbered and kept in a bounded buffer.

`AdapterEvents` receives the engine's messages and the registry's commits. A watcher has a
position in the buffer instead of its own queue (`watch`), so a slow one costs nothing. The
buffer holds small values: digests and records, no messages.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from veneer_proto.v1 import adapters_pb2
from veneer_registry.adapter import AdapterRef, Tier
from veneer_registry.errors import Draining
from veneer_registry.records import AdapterRecord, Published

from veneer_server.engine_client.client import EngineEvent
from veneer_server.wire.messages import AdapterFailed, AdapterLoaded, Evicted, Residency

__all__ = ["AdapterEvents", "Happened", "Kind", "Weights"]

KEPT: Final = 1024
"""Events in the buffer: how far a watcher may fall behind."""

WOKEN: Final = 8
"""Watchers that are woken at once."""

WAKE_EVERY_S: Final = 0.004
"""Time between two such groups, so that many watchers do not block the event loop."""

_NEARNESS: Final = {"disk": 0, "host": 1, "device": 2}
_RUN_BITS: Final = 20
"""Room for a million events per millisecond, so that the next run's sequence numbers start
above those of this run."""

Kind = adapters_pb2.AdapterEvent


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights, and where they are after an event.

    Attributes:
        names: the names that had a revision with these weights at the time, so that no event
            for a name precedes its publication. None: all names that have one.
    """

    digest: str
    tier: Tier
    pinned: bool
    names: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Happened:
    """One event. Events of the engine concern weights, those of the registry a revision."""

    sequence: int
    kind: Kind
    time: float
    subject: Weights | AdapterRecord
    detail: str = ""


_LoadEvent = Residency | AdapterLoaded | AdapterFailed | Evicted


class AdapterEvents:
    """The event buffer. All methods belong to one event loop."""

    def __init__(self, *, kept: int = KEPT, clock: Callable[[], float] = time.time) -> None:
        """Args:
        kept: events in the buffer.
        clock: Unix seconds; sequence numbers start from it, so that another run of the
            server never reuses the numbers of this one.
        """
        self._clock = clock
        self._start = self.last = int(clock() * 1000) << _RUN_BITS
        self._row: deque[Happened] = deque(maxlen=kept)
        self._waiting: list[asyncio.Future[None]] = []
        self._woken: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self._names: Callable[[str], Iterable[str]] | None = None
        self._residency: dict[str, Residency] = {}
        self._frame: list[_LoadEvent] = []

    @property
    def on_device(self) -> int:
        """Weights in the DEVICE tier."""
        return sum(state.tier == "device" for state in self._residency.values())

    # --------------------------------------------------------------------- sources

    def name_by(self, names: Callable[[str], Iterable[str]]) -> None:
        """Set the function that finds the names that have a revision with given weights."""
        self._names = names

    def on_engine_event(self, event: EngineEvent) -> None:
        """Listener for `EngineClient`."""
        if isinstance(event, Residency | AdapterLoaded | AdapterFailed | Evicted):
            if not self._frame:
                # A new state precedes its cause in the same frame: wait for both.
                asyncio.get_running_loop().call_soon(self._take_frame)
            self._frame.append(event)

    def published(self, published: Published) -> None:
        """A publish was committed."""
        if published.published:
            kind = (
                adapters_pb2.ADAPTER_EVENT_REPLACED
                if published.replaced
                else adapters_pb2.ADAPTER_EVENT_PUBLISHED
            )
            self._append(kind, published.record)
            # If it was loaded before the commit, that event had no name to report.
            state = self._residency.get(published.record.ref.weights_digest)
            if state is not None and state.tier != "disk":
                activated = state.tier == "device"
                self._append(
                    adapters_pb2.ADAPTER_EVENT_ACTIVATED
                    if activated
                    else adapters_pb2.ADAPTER_EVENT_LOADED,
                    published.record,
                )

    def made_current(self, record: AdapterRecord) -> None:
        """An earlier revision became a name's current one."""
        self._append(adapters_pb2.ADAPTER_EVENT_REPLACED, record)

    def mirrored(self, record: AdapterRecord, before: AdapterRef | None) -> None:
        """The registry that this server follows has changed a name: its current revision, and
        what it meant before. What changed of its aliases and labels is the registry's to tell.
        """
        kind = adapters_pb2.ADAPTER_EVENT_UPDATED
        if before is None:
            kind = adapters_pb2.ADAPTER_EVENT_PUBLISHED
        elif before != record.ref:
            kind = adapters_pb2.ADAPTER_EVENT_REPLACED
        self._append(kind, record)

    def updated(self, record: AdapterRecord) -> None:
        """Labels, retention or sharing changed."""
        self._append(adapters_pb2.ADAPTER_EVENT_UPDATED, record)

    def alias_changed(self, record: AdapterRecord, alias: str) -> None:
        """An alias now points to this revision, or pointed to it and was removed."""
        self._append(adapters_pb2.ADAPTER_EVENT_ALIAS_CHANGED, record, alias)

    def quarantined(self, records: Iterable[AdapterRecord], why: str) -> None:
        """Stored content of these revisions is damaged."""
        for record in records:
            self._append(adapters_pb2.ADAPTER_EVENT_QUARANTINED, record, why)

    def deleted(self, records: Iterable[AdapterRecord]) -> None:
        """These revisions were deleted."""
        for record in records:
            self._append(adapters_pb2.ADAPTER_EVENT_DELETED, record)

    def close(self) -> None:
        """End all watches with `Draining`, after they have received all events."""
        self._closed = True
        self._wake()

    def _take_frame(self) -> None:
        frame, self._frame = self._frame, []
        before = dict(self._residency)
        for event in frame:
            if isinstance(event, Residency):
                if event.tier == "disk" and not event.pinned:
                    self._residency.pop(event.weights_digest, None)
                else:
                    self._residency[event.weights_digest] = event
        explained = set()
        for event in frame:
            digest = event.weights_digest
            match event:
                case AdapterLoaded(source="disk"):
                    self._about(digest, adapters_pb2.ADAPTER_EVENT_LOADED)
                case AdapterLoaded():
                    self._about(digest, adapters_pb2.ADAPTER_EVENT_ACTIVATED)
                case Evicted() if digest not in explained:  # once for both tiers
                    self._about(digest, adapters_pb2.ADAPTER_EVENT_EVICTED, event.cause)
                case AdapterFailed():
                    failed = adapters_pb2.ADAPTER_EVENT_FAILED
                    self._about(digest, failed, event.error.message)
            if not isinstance(event, Residency):
                explained.add(digest)
        for digest in dict.fromkeys(event.weights_digest for event in frame):
            self._compare(digest, before.get(digest), tell_tier=digest not in explained)

    def _compare(self, digest: str, before: Residency | None, *, tell_tier: bool) -> None:
        """Add events for changes that no message has explained."""
        after = self._residency.get(digest)
        was = "disk" if before is None else before.tier
        now = "disk" if after is None else after.tier
        if tell_tier and _NEARNESS[now] < _NEARNESS[was]:
            self._about(digest, adapters_pb2.ADAPTER_EVENT_EVICTED, "engine_ended")
        elif tell_tier and now != was:
            activated = now == "device"
            self._about(
                digest,
                adapters_pb2.ADAPTER_EVENT_ACTIVATED
                if activated
                else adapters_pb2.ADAPTER_EVENT_LOADED,
            )
        pinned = after is not None and after.pinned
        if pinned != (before is not None and before.pinned):
            self._about(
                digest,
                adapters_pb2.ADAPTER_EVENT_PINNED
                if pinned
                else adapters_pb2.ADAPTER_EVENT_UNPINNED,
            )

    def _about(self, digest: str, kind: Kind, detail: str = "") -> None:
        state = self._residency.get(digest)
        tier = Tier.DISK if state is None else Tier(state.tier)
        pinned = state is not None and state.pinned
        names = None if self._names is None else frozenset(self._names(digest))
        self._append(kind, Weights(digest, tier, pinned, names), detail)

    def _append(self, kind: Kind, subject: Weights | AdapterRecord, detail: str = "") -> None:
        self.last += 1
        self._row.append(Happened(self.last, kind, self._clock(), subject, detail))
        self._wake()

    # -------------------------------------------------------------------- watchers

    def after(self, sequence: int) -> tuple[Happened, ...] | None:
        """The events after ``sequence``; None if they are not, or no longer, in the buffer."""
        oldest = self.last - len(self._row)
        if not max(self._start, oldest) <= sequence <= self.last:
            return None
        return tuple(itertools.islice(self._row, sequence - oldest, None))

    async def beyond(self, sequence: int) -> None:
        """Wait for an event after ``sequence``. Raises Draining after `close`."""
        while self.last <= sequence:
            if self._closed:
                raise Draining(
                    "the server is stopping: watch again from the last sequence number when "
                    "it has restarted",
                    retry_after_s=1.0,
                )
            told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(told)
            await told

    def _wake(self) -> None:
        """Wake all waiting watchers, some at a time."""
        under_way = bool(self._woken)
        self._woken.extend(self._waiting)
        self._waiting.clear()
        if self._woken and not under_way:
            self._wake_some()

    def _wake_some(self) -> None:
        for _ in range(min(WOKEN, len(self._woken))):
            told = self._woken.popleft()
            if not told.done():
                told.set_result(None)
        if self._woken:
            asyncio.get_running_loop().call_later(WAKE_EVERY_S, self._wake_some)
