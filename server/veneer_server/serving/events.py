"""Adapter events, numbered and kept in a bounded buffer.

`AdapterEvents` receives the engine's messages and the registry's commits. A watcher has a
position in the buffer instead of a queue of its own (`AdapterEvents.after`), so a slow watcher
costs nothing. The buffer holds small values: digests and records, no messages.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from veneer_registry.adapter import AdapterManifest, AdapterRef, Tier
from veneer_registry.errors import AdapterNotFound, Draining, Unavailable, VeneerError
from veneer_registry.records import AdapterRecord, Published
from veneer_registry.registry import Registry
from veneer_registry.rows import HistoryRow

from veneer_server.engine_client.client import EngineEvent
from veneer_server.logs import get_logger
from veneer_server.wire.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterSource,
    Evicted,
    ResidencyChanged,
)

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

EventKind = Literal[
    "published",
    "replaced",
    "deleted",
    "loaded",
    "activated",
    "evicted",
    "failed",
    "pinned",
    "unpinned",
    "quarantined",
    "alias_changed",
    "updated",
]
"""See `AdapterEvent` in the contract."""


@dataclass(frozen=True, slots=True)
class WeightsState:
    """The state of weights after an event.

    Attributes:
        names: the names that had a revision with these weights at the time, so that no event
            for a name precedes its publication. None: all names that have one now.
    """

    digest: str
    tier: Tier
    pinned: bool
    names: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Happened:
    """One event. Engine events are about weights, registry events about a revision."""

    sequence: int
    kind: EventKind
    time: float
    subject: WeightsState | AdapterRecord
    detail: str = ""


_LoadEvent = ResidencyChanged | AdapterLoaded | AdapterFailed | Evicted


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
        self._residency: dict[str, ResidencyChanged] = {}
        self._frame: list[_LoadEvent] = []

    @property
    def on_device(self) -> int:
        """Number of weights in the DEVICE tier."""
        return sum(state.tier == "device" for state in self._residency.values())

    # --------------------------------------------------------------------- sources

    def name_by(self, names: Callable[[str], Iterable[str]]) -> None:
        """Set the function that maps a weights digest to the names with such a revision."""
        self._names = names

    def on_engine_event(self, event: EngineEvent) -> None:
        """Listener for `EngineClient`."""
        if isinstance(event, ResidencyChanged | AdapterLoaded | AdapterFailed | Evicted):
            if not self._frame:
                # The new state comes before its cause in the same frame: wait for both.
                asyncio.get_running_loop().call_soon(self._take_frame)
            self._frame.append(event)

    def published(self, published: Published) -> None:
        """Add the events of a committed publish."""
        if published.published:
            self._append("replaced" if published.replaced else "published", published.record)
            # If it was loaded before the commit, that event could not name it.
            state = self._residency.get(published.record.ref.weights_digest)
            if state is not None and state.tier != "disk":
                activated = state.tier == "device"
                self._append("activated" if activated else "loaded", published.record)

    def made_current(self, record: AdapterRecord) -> None:
        """Add the event for an earlier revision that became a name's current one."""
        self._append("replaced", record)

    def mirrored(self, record: AdapterRecord, before: AdapterRef | None) -> None:
        """Add the event for a change of a name in the registry that this server follows. A
        change of its aliases or labels is just ``updated``; only the followed registry knows
        more.

        Args:
            record: the name's revision now.
            before: the name's revision before; None if the name is new.
        """
        kind: EventKind = "updated"
        if before is None:
            kind = "published"
        elif before != record.ref:
            kind = "replaced"
        self._append(kind, record)

    def updated(self, record: AdapterRecord) -> None:
        """Add the event for changed labels, retention or sharing."""
        self._append("updated", record)

    def alias_changed(self, records: Iterable[AdapterRecord], alias: str) -> None:
        """Add an event for each revision that an alias now points to, or pointed to before it
        was removed."""
        for record in records:
            self._append("alias_changed", record, alias)

    def quarantined(self, records: Iterable[AdapterRecord], why: str) -> None:
        """Add events for revisions whose stored content is damaged."""
        for record in records:
            self._append("quarantined", record, why)

    def deleted(self, records: Iterable[AdapterRecord]) -> None:
        """Add events for deleted revisions."""
        for record in records:
            self._append("deleted", record)

    def close(self) -> None:
        """End all watches with `Draining`, after they have received all events."""
        self._closed = True
        self._wake()

    def _take_frame(self) -> None:
        frame, self._frame = self._frame, []
        before = dict(self._residency)
        for event in frame:
            if isinstance(event, ResidencyChanged):
                if event.tier == "disk" and not event.pinned:
                    self._residency.pop(event.weights_digest, None)
                else:
                    self._residency[event.weights_digest] = event
        explained = set()
        for event in frame:
            digest = event.weights_digest
            match event:
                case AdapterLoaded(source="disk"):
                    self._about(digest, "loaded")
                case AdapterLoaded():
                    self._about(digest, "activated")
                case Evicted() if digest not in explained:  # once for both tiers
                    self._about(digest, "evicted", event.cause)
                case AdapterFailed():
                    self._about(digest, "failed", event.error.message)
            if not isinstance(event, ResidencyChanged):
                explained.add(digest)
        for digest in dict.fromkeys(event.weights_digest for event in frame):
            self._compare(digest, before.get(digest), tell_tier=digest not in explained)

    def _compare(
        self, digest: str, before: ResidencyChanged | None, *, tell_tier: bool
    ) -> None:
        """Add events for changes of state that no message in the frame has explained."""
        after = self._residency.get(digest)
        was = "disk" if before is None else before.tier
        now = "disk" if after is None else after.tier
        if tell_tier and _NEARNESS[now] < _NEARNESS[was]:
            self._about(digest, "evicted", "engine_ended")
        elif tell_tier and now != was:
            self._about(digest, "activated" if now == "device" else "loaded")
        pinned = after is not None and after.pinned
        if pinned != (before is not None and before.pinned):
            self._about(digest, "pinned" if pinned else "unpinned")

    def _about(self, digest: str, kind: EventKind, detail: str = "") -> None:
        state = self._residency.get(digest)
        tier = Tier.DISK if state is None else Tier(state.tier)
        pinned = state is not None and state.pinned
        names = None if self._names is None else frozenset(self._names(digest))
        self._append(kind, WeightsState(digest, tier, pinned, names), detail)

    def _append(
        self, kind: EventKind, subject: WeightsState | AdapterRecord, detail: str = ""
    ) -> None:
        self.last += 1
        self._row.append(Happened(self.last, kind, self._clock(), subject, detail))
        self._wake()

    # -------------------------------------------------------------------- watchers

    def after(self, sequence: int) -> tuple[Happened, ...] | None:
        """Return the events after ``sequence``; None if the buffer does not, or no longer, have
        all of them."""
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


# -------------------- use
# Records when adapters were last requested, and tells the engine where their weights are.


class AdapterUse:
    """When each name's revisions were last requested since the server started."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._last: dict[tuple[str, str], float] = {}

    def touch(self, ref: AdapterRef) -> None:
        """Record a request for the revision."""
        self._last[ref.name, ref.revision] = self._clock()

    def last(self, ref: AdapterRef) -> float | None:
        """When the revision was last requested, in Unix seconds; None if it was not."""
        return self._last.get((ref.name, ref.revision))

    def recent(self) -> list[tuple[str, str]]:
        """Names and revisions, most recently requested first."""
        return sorted(self._last, key=lambda key: self._last[key], reverse=True)

    def forget(self, ref: AdapterRef) -> None:
        """Remove a revision that its name no longer has."""
        self._last.pop((ref.name, ref.revision), None)


def source_of(registry: Registry, record: AdapterRecord) -> AdapterSource:
    """Make the source that tells the engine where to find a revision's weights."""
    return AdapterSource(
        weights_digest=record.ref.weights_digest,
        folder=str(registry.weights_folder(record.ref)),
        parameters=record.manifest.parameters,
        name=record.ref.short,
    )


# -------------------- elsewhere
# Events for changes that other servers make in a shared catalog.

_REVISION: Final = re.compile(r"[0-9a-f]{64}")
_UPDATES: Final = ("labels", "retention", "shared", "unshared")

_log = get_logger(__name__)


def tell_of_others(registry: Registry, events: AdapterEvents) -> None:
    """Add an event for each line that another server writes into the history from now on. Must
    be called on the event loop that the events belong to."""
    loop = asyncio.get_running_loop()

    def told(lines: Sequence[HistoryRow]) -> None:
        """Called in a thread of the registry, so it may read rows."""
        for line in lines:
            try:
                event = _event(registry, events, line)
            except VeneerError as error:
                _log.error("event of another server skipped", line=line.event, why=str(error))
                continue
            if event is not None:
                loop.call_soon_threadsafe(event)

    registry.watch(told)


def _event(
    registry: Registry, events: AdapterEvents, line: HistoryRow
) -> Callable[[], None] | None:
    """Return the function that adds the events for a history line; None if it has none."""
    match line.event:
        case "published" | "replaced":
            record = _record(registry, line, line.revision)
            published = Published(record, True, line.event == "replaced", ())
            return partial(events.published, published)
        case "made_current":
            return partial(events.made_current, _record(registry, line, line.revision))
        case event if event in _UPDATES:
            return partial(events.updated, _record(registry, line, line.revision))
        case "alias_set" | "alias_removed":
            # A line has room for seven targets; those after them have no event.
            alias, _, words = line.detail.partition(": ")
            targets = _REVISION.findall(words.partition(", before: ")[0])
            records = [_record(registry, line, each) for each in targets or [line.revision]]
            return partial(events.alias_changed, records, f"{line.name}/{alias}")
        case "quarantined":
            record = _record(registry, line, line.revision)
            return partial(events.quarantined, (record,), line.detail)
        case "deleted" | "superseded":
            return partial(events.deleted, (_gone(line, line.revision),))
    return None


def _record(registry: Registry, line: HistoryRow, revision: str) -> AdapterRecord:
    """A revision of the line's name as it is now; it may have been deleted since."""
    try:
        return registry.get(f"{line.name}@{revision}" if revision else line.name)
    except (AdapterNotFound, Unavailable):  # Unavailable: the names are not current yet
        return _gone(line, revision)


def _gone(line: HistoryRow, revision: str) -> AdapterRecord:
    """A record for a deleted revision: only its name and digest are known."""
    nothing = AdapterManifest("", (), 0, (), 0, 0, "", "")
    ref = AdapterRef(line.name, revision, "")
    return AdapterRecord(ref, nothing, line.time, {}, False, "", 0)
