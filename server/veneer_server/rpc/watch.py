"""What happens to adapters, numbered, kept for a while, and told to whoever watches.

`AdapterEvents` hears the engine and the registry's changes. A watcher has a place in
that one row and no queue of its own, so that it costs nothing when it is slow: who
falls behind the row's oldest event is closed. What is kept is small; messages are
made when they are sent.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from veneer_proto.v1 import adapters_pb2
from veneer_registry.adapter import Tier
from veneer_registry.errors import Aborted, AdapterNotFound, Draining
from veneer_registry.registry import AdapterRecord, Published, Registry

from veneer_server.engine.client import EngineEvent
from veneer_server.engine.messages import AdapterFailed, AdapterLoaded, Evicted, Residency
from veneer_server.rpc import convert
from veneer_server.rpc.adapter_view import AdapterView
from veneer_server.rpc.threads import to_the_end

__all__ = ["AdapterEvents", "AdapterWatch", "Happened", "Weights"]

KEPT: Final = 1024
READER_LIMIT_S: Final = 30.0
"""Longest wait for a watcher to take a message."""
_PAGE: Final = 100
_NEARNESS: Final = {"disk": 0, "host": 1, "device": 2}
_RUN_BITS: Final = 20
"""A run of the server may count a million events a millisecond before the next run's
numbers could begin below its own."""

Kind = adapters_pb2.AdapterEvent
Message = adapters_pb2.WatchAdaptersResponse
Write = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights and where they are after an event; names share them, so it has none."""

    digest: str
    tier: Tier
    pinned: bool


@dataclass(frozen=True, slots=True)
class Happened:
    """One event. The engine's are about weights, the registry's about a revision."""

    sequence: int
    kind: Kind
    time: float
    subject: Weights | AdapterRecord
    detail: str = ""


_LoadEvent = Residency | AdapterLoaded | AdapterFailed | Evicted


class AdapterEvents:
    """The row of events. All methods belong to one event loop."""

    def __init__(self, *, kept: int = KEPT, clock: Callable[[], float] = time.time) -> None:
        """Args:
        kept: events that a watcher may be behind.
        clock: Unix seconds; the first number comes from it, so that another run of
            the server never takes up the numbers of this one.
        """
        self._clock = clock
        self._start = self.last = int(clock() * 1000) << _RUN_BITS
        self._row: deque[Happened] = deque(maxlen=kept)
        self._more = asyncio.Event()
        self._closed = False
        self._residency: dict[str, Residency] = {}
        self._frame: list[_LoadEvent] = []

    # --------------------------------------------------------------------- sources

    def on_engine_event(self, event: EngineEvent) -> None:
        """Listener for `EngineClient`."""
        if isinstance(event, Residency | AdapterLoaded | AdapterFailed | Evicted):
            if not self._frame:
                # The new state comes before its cause, in the same frame: take both.
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

    def deleted(self, records: Iterable[AdapterRecord]) -> None:
        """These revisions were deleted."""
        for record in records:
            self._append(adapters_pb2.ADAPTER_EVENT_DELETED, record)

    def close(self) -> None:
        """End all watches with `Draining`, once they have been told what there is."""
        self._closed = True
        self._more.set()

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
        """Tell what changed without a message that says why."""
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
        self._append(kind, Weights(digest, tier, pinned), detail)

    def _append(self, kind: Kind, subject: Weights | AdapterRecord, detail: str = "") -> None:
        self.last += 1
        self._row.append(Happened(self.last, kind, self._clock(), subject, detail))
        self._more.set()
        self._more = asyncio.Event()

    # -------------------------------------------------------------------- watchers

    def after(self, sequence: int) -> tuple[Happened, ...] | None:
        """What happened after ``sequence``; None where that is not known (any more)."""
        oldest = self.last - len(self._row)
        if not max(self._start, oldest) <= sequence <= self.last:
            return None
        return tuple(itertools.islice(self._row, sequence - oldest, None))

    async def beyond(self, sequence: int) -> None:
        """Wait until something happened after it. Raises Draining after `close`."""
        while self.last <= sequence:
            if self._closed:
                raise Draining(
                    "the server is stopping: watch again when it is back, from the last "
                    "sequence number",
                    retry_after_s=1.0,
                )
            await self._more.wait()


class AdapterWatch:
    """Serves WatchAdapters calls from the row of events."""

    def __init__(
        self,
        registry: Registry,
        view: AdapterView,
        events: AdapterEvents,
        *,
        reader_limit_s: float = READER_LIMIT_S,
    ) -> None:
        self._registry = registry
        self._view = view
        self._events = events
        self._reader_limit_s = reader_limit_s

    async def serve(self, since: int, write: Write) -> None:
        """Tell what happened after ``since`` and go on, until the caller leaves.

        Raises:
            Aborted: the watcher reads too slowly.
            Draining: the server stops.
        """
        place, synced = since, False
        if self._events.after(since) is None:
            place = self._events.last
            await self._snapshot(write)
        while True:
            happened = self._events.after(place)
            if happened is None:
                raise Aborted(
                    "the watcher fell behind what the server keeps: read faster, and watch "
                    "again from the last sequence number"
                )
            for event in happened:
                for message in await self._messages(event):
                    await self._send(write, message)
                place = event.sequence
            if not synced and not self._events.after(place):
                synced = True
                kind = adapters_pb2.ADAPTER_EVENT_SYNCED
                await self._send(write, self._message(kind, sequence=place))
            await self._events.beyond(place)

    async def _snapshot(self, write: Write) -> None:
        await self._send(write, self._message(adapters_pb2.ADAPTER_EVENT_RESET))
        name = ""
        while True:
            page = await to_the_end(
                lambda after=name: self._registry.list(after=after, limit=_PAGE)  # type: ignore[misc]
            )
            for record in page:
                message = self._message(adapters_pb2.ADAPTER_EVENT_PRESENT)
                message.adapter.CopyFrom(self._view.adapter(record))
                await self._send(write, message)
            if len(page) < _PAGE:
                return
            name = page[-1].ref.name

    async def _messages(self, event: Happened) -> list[Message]:
        """One for each revision that the event is about; the last has the number."""
        if isinstance(event.subject, AdapterRecord):
            adapters = [await self._registered(event, event.subject)]
        else:
            adapters = await self._sharing(event.subject)
        messages = [
            Message(
                event=event.kind,
                adapter=adapter,
                time=convert.timestamp(event.time),
                detail=event.detail,
            )
            for adapter in adapters
        ]
        if messages:
            messages[-1].sequence = event.sequence
        return messages

    async def _registered(self, event: Happened, record: AdapterRecord) -> adapters_pb2.Adapter:
        gone = replace(record, current=False)
        if event.kind == adapters_pb2.ADAPTER_EVENT_DELETED:
            return self._view.adapter(gone)
        # It may be superseded or deleted by now: `current` must not claim otherwise.
        full = f"{record.ref.name}@{record.ref.revision}"
        try:
            return self._view.adapter(await to_the_end(lambda: self._registry.get(full)))
        except AdapterNotFound:
            return self._view.adapter(gone)

    async def _sharing(self, weights: Weights) -> list[adapters_pb2.Adapter]:
        records = await to_the_end(lambda: self._registry.holding(weights.digest))
        adapters = [self._view.adapter(record) for record in records]
        for adapter in adapters:
            adapter.tier = convert.tier_to_proto(weights.tier)
            adapter.pinned = weights.pinned
        return adapters

    def _message(self, kind: Kind, *, sequence: int = 0) -> Message:
        return Message(event=kind, sequence=sequence, time=convert.timestamp(time.time()))

    async def _send(self, write: Write, message: Message) -> None:
        try:
            async with asyncio.timeout(self._reader_limit_s):
                await write(message)
        except TimeoutError as error:
            raise Aborted(
                f"the watcher read nothing for {self._reader_limit_s:g} s: read events as "
                "they come"
            ) from error
