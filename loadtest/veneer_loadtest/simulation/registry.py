"""Names and bytes that replicas get from the registry, and when they get them.

Followers run the product's own code: the registry's `Feed` and each follower's `View`. The
registry's catalog is a stand-in, and so is the network: messages arrive in order after a delay,
or not at all while the registry cannot be reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from veneer_registry.adapter import AdapterRef
from veneer_registry.entry import Entry
from veneer_registry.rows import RevisionRow
from veneer_server.follower.view import OutOfStep, View
from veneer_server.replication.feed import Feed
from veneer_server.replication.states import BeginFeed, Message, NameState, SnapshotEnd, Told

from veneer_loadtest.simulation.costs import Costs
from veneer_loadtest.simulation.events import Events

_TENANT: Final = "default"
_IN_STEP_S: Final = 0.05
"""Seconds that a follower that is out of step waits before it connects again."""


@dataclass(slots=True)
class SimulatedPublication:
    """A new revision of an adapter.

    Attributes:
        waiting: followers that do not have it yet.
        everywhere_s: seconds from the publication until the last follower had it; None before
            that.
    """

    adapter: int
    revision: int
    at_s: float
    waiting: set[str] = field(default_factory=set)
    everywhere_s: float | None = None


class SimulatedLink:
    """The registry's connection to all replicas, which share it.

    Attributes:
        up: whether the registry can be reached.
        bytes: number of bytes sent so far.
    """

    def __init__(self, costs: Costs, events: Events) -> None:
        self.up = True
        self.bytes = 0
        self._costs = costs
        self._events = events
        self._free = 0.0

    def fetch(self, size: int) -> float:
        """Start a fetch now; return when it is complete."""
        costs, now = self._costs, self._events.now
        begins = max(now, self._free)
        self._free = begins + size * costs.registry_byte_s
        self.bytes += size
        return max(self._free, begins + size * costs.fetch_byte_s) + costs.fetch_s


class _Catalog:
    """Stand-in for a registry's catalog, for its feed. Adapters without a publication have
    revision 0 and no name."""

    store_id, base_id, told, lag_s, closed = "store", "base", 0, 0.0, False

    def __init__(self) -> None:
        self.last_change = 0
        self.current: dict[int, int] = {}
        self._changed: Callable[[str, Entry | None], None] = lambda name, entry: None

    def follow(self, changed: Callable[[str, Entry | None], None]) -> Mapping[str, Entry]:
        self._changed = changed
        return {}

    def rows(self, name: str) -> tuple[RevisionRow, ...]:
        return ()

    def publish(self, adapter: int) -> int:
        """Publish a new revision of an adapter; return its number."""
        revision = self.current[adapter] = self.current.get(adapter, 0) + 1
        self.last_change += 1
        ref = AdapterRef(str(adapter), str(revision), f"{adapter}@{revision}")
        self._changed(ref.name, Entry(ref, (ref,), generation=revision))
        return revision


@dataclass(slots=True)
class _Follower:
    """A follower of the registry.

    Attributes:
        view: the product's own view.
        known: adapter -> revision, as the view has it.
        connection: number of its connection; messages of earlier connections are dropped.
        connected: whether messages reach it, unless the registry cannot be reached.
        away: whether it is lost; it keeps its view, as on its disk.
        last_s: when its connection's last message arrives; later messages arrive no earlier.
    """

    view: View = field(default_factory=View)
    known: dict[int, int] = field(default_factory=dict)
    connection: int = 0
    connected: bool = False
    away: bool = False
    last_s: float = 0.0


class Followers:
    """All followers, and the revision of each adapter that each follower knows.

    Attributes:
        out_of_step: number of messages that did not fit a follower's view; 0 unless there is a
            bug.

    Args:
        changed: called with a follower and an adapter when its view of it has changed.
    """

    def __init__(
        self,
        names: Iterable[str],
        link: SimulatedLink,
        costs: Costs,
        events: Events,
        changed: Callable[[str, int], None] = lambda name, adapter: None,
    ) -> None:
        self.publications: list[SimulatedPublication] = []
        self.out_of_step = 0
        self._link = link
        self._costs = costs
        self._events = events
        self._changed = changed
        self._catalog = _Catalog()
        self._feed = Feed()
        self._feed.add(_TENANT, self._catalog, lambda call, *args: call(*args))
        self._all = {name: _Follower() for name in names}
        for name in self._all:
            self._begin(name)

    def revision(self, follower: str, adapter: int) -> int:
        """Return the revision that a follower answers with: the newest that it knows, or 0
        before any publication."""
        return self._all[follower].known.get(adapter, 0)

    def newest(self, adapter: int) -> int:
        """Return the revision that the registry has."""
        return self._catalog.current.get(adapter, 0)

    def published(self, adapter: int) -> SimulatedPublication:
        """Publish a new revision now; every follower that is not lost will get it."""
        before = self._feed.sequence
        revision = self._catalog.publish(adapter)
        waiting = {name for name, each in self._all.items() if not each.away}
        publication = SimulatedPublication(adapter, revision, self._events.now, waiting)
        self.publications.append(publication)
        changes = self._feed.after(self._feed.run, before)
        assert changes is not None, "the feed keeps its last change"
        messages: tuple[Message, ...]
        messages = (*map(self._feed.told, changes), self._feed.heartbeat())
        told = 0
        for name, each in self._all.items():
            if each.connected and self._link.up:
                told += 1
                self._send(name, messages, told * self._costs.notify_s + self._costs.follow_s)
        return publication

    def add(self, follower: str) -> None:
        """Add a follower that knows nothing yet; it gets all names now. The registry must be
        reachable."""
        self._all[follower] = _Follower()
        self._begin(follower)

    def leave(self, follower: str) -> None:
        """Handle the loss of a follower: publications no longer wait for it, since its lease
        expires."""
        each = self._all[follower]
        each.away, each.connected = True, False
        each.connection += 1
        for publication in self.publications:
            self._has(publication, follower)

    def come(self, follower: str) -> None:
        """Bring a lost follower back with the view that it had; it follows again."""
        self._all[follower].away = False
        if self._link.up:
            self._connect(follower, 1)

    def reconnect(self) -> None:
        """Reconnect all followers after a partition: each gets the changes that it missed."""
        for number, (name, each) in enumerate(self._all.items(), 1):
            if not each.away:
                self._connect(name, number)

    # ------------------------------------------------------------------ connections

    def _connect(self, name: str, number: int, after_s: float | None = None) -> None:
        costs, each = self._costs, self._all[name]
        each.connection += 1
        each.connected = False
        connection = each.connection

        def begin() -> None:
            if each.connection == connection and self._link.up:
                self._begin(name)

        wait_s = costs.reconnect_s if after_s is None else after_s
        self._events.after(wait_s + number * costs.notify_s + costs.follow_s, begin)

    def _begin(self, name: str) -> None:
        """Send a connection's first messages: the changes since the follower's place in the
        feed, or a snapshot."""
        each, feed = self._all[name], self._feed
        run, sequence = each.view.place()
        changes = feed.after(run, sequence)
        each.connected, each.last_s = True, self._events.now
        (store, base), numbers = feed.facts(), feed.catalogs({})
        messages: tuple[Message, ...]
        if changes is None:
            now, entries = feed.snapshot()
            begin = BeginFeed(feed.run, store, numbers, True, now.sequence, base)
            states = (Told(feed.state(*entry)) for entry in entries.items())
            messages = (begin, *states, SnapshotEnd(now.sequence, now.checksum))
        else:
            begin = BeginFeed(feed.run, store, numbers, False, sequence, base)
            messages = (begin, *map(feed.told, changes), feed.heartbeat())
        self._receive(name, messages)

    def _send(self, name: str, messages: tuple[Message, ...], after_s: float) -> None:
        each = self._all[name]
        connection = each.connection
        each.last_s = max(each.last_s, self._events.now + after_s)

        def arrive() -> None:
            if each.connection == connection and self._link.up:
                self._receive(name, messages)

        self._events.at(each.last_s, arrive)

    def _receive(self, name: str, messages: tuple[Message, ...]) -> None:
        each = self._all[name]
        try:
            for message in messages:
                for state in each.view.receive(message).changes:
                    self._apply(name, each, state)
        except OutOfStep:
            self.out_of_step += 1
            self._connect(name, 1, _IN_STEP_S)
        for publication in self.publications:
            if publication.revision <= each.known.get(publication.adapter, 0):
                self._has(publication, name)

    def _apply(self, name: str, each: _Follower, state: NameState) -> None:
        assert state.entry is not None, "adapters are not deleted here"
        assert state.entry.current is not None, "no content is lost here"
        adapter = int(state.name)
        each.known[adapter] = int(state.entry.current.revision)
        self._changed(name, adapter)

    def _has(self, publication: SimulatedPublication, follower: str) -> None:
        publication.waiting.discard(follower)
        if not publication.waiting and publication.everywhere_s is None:
            publication.everywhere_s = self._events.now - publication.at_s
