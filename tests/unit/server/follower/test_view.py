"""A follower's view under random histories.

Cuts, delays, duplicates, lost and swapped messages, half-open connections, restarts of the
registry, restored backups. Time is a count of events.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from veneer_registry.adapter import AdapterRef
from veneer_registry.entry import Entry
from veneer_registry.rows import RevisionRow
from veneer_server.follower.view import OutOfStep, Received, View
from veneer_server.replication.feed import Feed
from veneer_server.replication.states import (
    BeginFeed,
    Key,
    Message,
    NameState,
    SnapshotEnd,
    Told,
    mark_of,
)

from tests.scale.planted import PLANTED

NAMES = [("default", "a"), ("default", "b"), ("acme", "a"), ("acme", "c"), ("default", "d")]


class _Rows:
    """A registry whose rows do not matter here."""

    store_id, last_change, base_id = "store", 0, "base"
    told, lag_s, closed = 0, 0.0, False

    def follow(self, changed: Callable[[str, Entry | None], None]) -> dict[str, Entry]:
        self.changed = changed
        return {}

    def rows(self, name: str) -> tuple[RevisionRow, ...]:
        return ()


@dataclass
class Registry:
    """A registry: its names, and everything that they ever meant."""

    random: random.Random
    make_feed: type[Feed] = Feed
    feed: Feed = field(init=False)
    tenants: dict[str, _Rows] = field(default_factory=dict)
    entries: dict[Key, Entry] = field(default_factory=dict)
    ever: dict[Key, set[int]] = field(default_factory=dict)
    backup: tuple[dict[Key, Entry], int] = ({}, 0)
    changes: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.feed = self.make_feed(kept=self.random.choice([2, 8, 64]))
        self.tenants = {tenant: _Rows() for tenant, _ in NAMES}
        for tenant, rows in self.tenants.items():
            self.feed.add(tenant, rows, lambda call, *args: call(*args))
        for key, entry in self.entries.items():
            self.note(key, entry)

    def note(self, key: Key, entry: Entry | None) -> None:
        tenant, name = key
        self.tenants[tenant].changed(name, entry)

    def change(self) -> None:
        key = self.random.choice(NAMES)
        before, self.changes = self.entries.get(key), self.changes + 1
        if before is not None and self.random.random() < 0.2:
            del self.entries[key]
            self.note(key, None)
            return
        ref = AdapterRef(key[1], f"{self.random.getrandbits(256):064x}", "d" * 64)
        kept = (ref, *(() if before is None else before.revisions))[:3]
        current = self.random.choice(kept)  # a publication or a rollback
        entry = Entry(current, kept, self.changes, shared=self.random.random() < 0.3)
        self.entries[key] = entry
        self.ever.setdefault(key, set()).add(mark_of(key, entry))
        self.note(key, entry)

    def restore(self) -> None:
        """Stop, put an old copy of everything in place, start."""
        entries, self.changes = self.backup
        self.entries = dict(entries)
        self.restart()


class Connection:
    """What the registry writes to one follower, as `ReplicationService` does."""

    def __init__(self, registry: Registry, run: str, sequence: int) -> None:
        self.registry, self.feed = registry, registry.feed
        self.sent: list[Message] = []
        begin: dict[str, Any] = {"store": "s", "catalogs": {"default": registry.changes}}
        if self.feed.after(run, sequence) is None:
            beat, entries = self.feed.snapshot()
            self.sent.append(
                BeginFeed(self.feed.run, snapshot=True, sequence=beat.sequence, **begin)
            )
            self.sent += [Told(NameState(*key, entry)) for key, entry in entries.items()]
            self.sent.append(SnapshotEnd(beat.sequence, beat.checksum))
            self.place = beat.sequence
        else:
            self.sent.append(BeginFeed(run, snapshot=False, sequence=sequence, **begin))
            self.place = sequence

    def more(self) -> bool:
        """Write what is new; False if the follower has fallen behind."""
        changes = self.feed.after(self.feed.run, self.place)
        if changes is None or self.feed is not self.registry.feed:
            return False
        for change in changes:
            self.sent.append(self.feed.told(change))
            self.place = change.sequence
        self.sent.append(self.feed.heartbeat())
        return True


@dataclass
class History:
    """One history; see the module docstring."""

    seed: int
    view: View
    feed: type[Feed] = Feed
    registry: Registry = field(init=False)
    connection: Connection | None = None
    served: dict[Key, Entry] = field(default_factory=dict)
    resyncs: int = 0
    restored: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.registry = Registry(self.random, self.feed)

    def connect(self) -> None:
        self.connection = Connection(self.registry, *self.view.place())

    def deliver(self) -> None:
        """The next message of the connection, perhaps spoilt."""
        connection = self.connection
        if connection is None:
            self.connect()
        elif not connection.more():
            self.connection = None
        elif connection.sent:
            self.receive(connection.sent.pop(0))

    def receive(self, message: Message) -> None:
        try:
            self.apply(self.view.receive(message))
        except OutOfStep:
            self.resyncs += 1
            self.connection = None

    def apply(self, received: Received) -> None:
        self.restored += received.restored
        for state in received.changes:
            if state.entry is None:
                self.served.pop(state.key, None)
                continue
            assert mark_of(state.key, state.entry) in self.registry.ever[state.key], (
                "it serves what was never current"
            )
            self.served[state.key] = state.entry

    def spoil(self) -> None:
        """What networks and bugs do to messages that are under way."""
        sent = [] if self.connection is None else self.connection.sent
        at = self.random.randrange(len(sent) + 1)
        match self.random.choice(["cut", "lost", "twice", "swapped", "half"]):
            case "cut":
                self.connection = None
            case "lost":
                del sent[at : at + 1]
            case "twice":
                sent[at:at] = sent[at : at + 1]
            case "swapped":
                sent[at : at + 2] = reversed(sent[at : at + 2])
            case "half":  # nothing arrives until the silence is noticed
                for _ in range(self.random.randrange(3)):
                    self.registry.change()
                self.connection = None

    def run(self, steps: int = 120) -> None:
        for _ in range(steps):
            draw = self.random.random()
            if draw < 0.25:
                self.registry.change()
            elif draw < 0.30:
                self.spoil()
            elif draw < 0.32:
                self.registry.backup = dict(self.registry.entries), self.registry.changes
            elif draw < 0.34:
                self.registry.restart()
            elif draw < 0.355:
                self.registry.restore()
            else:
                self.deliver()
        for _ in range(400):  # quiet, as long as a snapshot and some resyncs take
            self.deliver()
        assert self.served == self.registry.entries, "it does not converge"
        assert self.view.names.keys() == self.registry.entries.keys()


def histories(
    make: Callable[[], View], seeds: range, feed: type[Feed] = Feed
) -> tuple[int, int]:
    """(resyncs, restored backups) of all; an AssertionError names its seed."""
    resyncs = restored = 0
    for seed in seeds:
        history = History(seed, make(), feed)
        try:
            history.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        resyncs += history.resyncs
        restored += history.restored
    return resyncs, restored


def test_every_history_converges_and_serves_only_what_was_current() -> None:
    resyncs, restored = histories(View, range(200))
    assert resyncs > 100  # the histories are hard enough to mean something
    assert restored > 20


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug: str) -> None:
    view, feed = PLANTED[bug]
    with pytest.raises(AssertionError):
        histories(view, range(200), feed)


@pytest.mark.parametrize("bug", PLANTED)
def test_followers_notice_a_registry_with_that_bug(bug: str) -> None:
    """By the numbers or by the checksum: they take a snapshot, and converge all the same."""
    _, feed = PLANTED[bug]
    histories(View, range(100), feed)
