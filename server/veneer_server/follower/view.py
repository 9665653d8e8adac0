"""A follower's view of its registry: a pure state machine, without I/O and without a clock.

Each connection begins with the follower's position (`place`). A message that does not fit the
earlier ones raises `OutOfStep`: the caller ends the connection and connects again, and the next
connection begins with a snapshot. Meanwhile the old view is served; a snapshot replaces it only
once it is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from veneer_registry.entry import Entry

from veneer_server.replication.states import (
    BeginFeed,
    Heartbeat,
    Key,
    Message,
    NameState,
    SnapshotEnd,
    Told,
    add_mark,
    mark_of,
)


class OutOfStep(Exception):
    """The registry's messages contradict each other or the applied state."""


@dataclass(frozen=True, slots=True)
class Received:
    """The effects of a message.

    Attributes:
        changes: new states of names, in order; each was current in the registry.
        told: the change of a single name, with its number; None if it is not one.
        current: whether the view was up to date when the message was sent.
        restored: whether the registry's catalog has lost changes: a backup was restored.
        moved: whether this is another registry than before.
        snapshot: whether a snapshot is complete.
    """

    changes: tuple[NameState, ...] = ()
    told: Told | None = None
    current: bool = False
    restored: bool = False
    moved: bool = False
    snapshot: bool = False


@dataclass(frozen=True, slots=True)
class KnownName:
    """What a view remembers of a name: enough to tell whether a snapshot has another state.

    Attributes:
        mark: see `mark_of`.
        rows: number of revisions whose rows are known.
    """

    mark: int
    rows: int

    @classmethod
    def of(cls, key: Key, entry: Entry | None, rows: int) -> Self:
        return cls(mark_of(key, entry), rows)


class View:
    """All names of a registry, as received so far.

    Attributes:
        names: every existing name of all tenants.
        run, sequence: position up to which changes are applied; "" and 0 before the first
            snapshot.
        store: of the registry that was seen last.
        catalogs: by tenant, the number of the registry's catalog that this view has.
        synced: whether a complete snapshot was received, or a saved view restored.
    """

    def __init__(self) -> None:
        self.names: dict[Key, KnownName] = {}
        self.run = ""
        self.sequence = 0
        self.store = ""
        self.catalogs: dict[str, int] = {}
        self.synced = False
        self._checksum = 0
        self._begun = False
        self._staged: dict[Key, NameState] | None = None
        self._next_run = ""
        self._next_catalogs: dict[str, int] = {}
        self._starts_anew = False

    def restore(
        self,
        names: Mapping[Key, KnownName],
        *,
        run: str,
        sequence: int,
        store: str,
        catalogs: Mapping[str, int],
    ) -> None:
        """Start from the view that an earlier run of this server saved."""
        self.names = dict(names)
        self.run, self.sequence = run, sequence
        self.store, self.catalogs = store, dict(catalogs)
        self._checksum = 0
        for seen in self.names.values():
            self._checksum = add_mark(self._checksum, 0, seen.mark)
        self.synced = True

    def place(self) -> tuple[str, int]:
        """Reset for a new connection and return the (run, sequence) to follow from. After this,
        do not pass messages of earlier connections to `receive`."""
        self._begun, self._staged = False, None
        return self.run, self.sequence

    def receive(self, message: Message) -> Received:
        """Apply the next message of the connection. Raises OutOfStep."""
        try:
            match message:
                case BeginFeed():
                    return self._begin(message)
                case Told():
                    return self._told(message)
                case SnapshotEnd():
                    return self._snapshot_end(message)
                case Heartbeat():
                    return self._heartbeat(message)
        except OutOfStep:
            self.run = ""  # the next connection gets a snapshot
            self._begun, self._staged = False, None
            raise

    def _begin(self, begin: BeginFeed) -> Received:
        if self._begun:
            raise OutOfStep("a connection started twice")
        if not begin.snapshot and (begin.run, begin.sequence) != (self.run, self.sequence):
            raise OutOfStep("changes would follow another place than the one asked for")
        if begin.snapshot and begin.run == self.run and begin.sequence < self.sequence:
            raise OutOfStep("the registry has gone back in the same run")
        known = bool(self.store)
        moved = known and begin.store != self.store
        restored = (
            known
            and not moved
            and any(begin.catalogs.get(t, n) < n for t, n in self.catalogs.items())
        )
        self._begun = True
        self._staged = {} if begin.snapshot else None
        self._next_run = begin.run
        self.store = begin.store
        # A snapshot has all that these have; without one, its changes bring their numbers.
        self._next_catalogs = dict(begin.catalogs)
        self._starts_anew = restored or moved
        return Received(restored=restored, moved=moved)

    def _told(self, told: Told) -> Received:
        self._check_begun()
        state = told.state
        if self._staged is not None:
            if state.entry is None or state.key in self._staged:
                raise OutOfStep("a snapshot has a deleted or a duplicate name")
            self._staged[state.key] = state
            return Received()
        if told.sequence <= self.sequence:
            return Received()  # a duplicate
        if told.previous != self.sequence:
            raise OutOfStep(f"changes between {self.sequence} and {told.sequence} are missing")
        self.sequence = told.sequence
        self._reach({state.tenant: told.catalog})
        self._put(state)
        return Received((state,), told)

    def _snapshot_end(self, end: SnapshotEnd) -> Received:
        self._check_begun()
        staged = self._staged
        if staged is None:
            raise OutOfStep("a snapshot ended that had not begun")
        names = {key: _seen(state) for key, state in staged.items()}
        checksum = 0
        for seen in names.values():
            checksum = add_mark(checksum, 0, seen.mark)
        if checksum != end.checksum:
            raise OutOfStep("the snapshot is not whole")
        gone = [NameState(*key, None) for key in sorted(self.names.keys() - staged.keys())]
        changed = [state for key, state in staged.items() if self.names.get(key) != names[key]]
        self.names, self._staged = names, None
        self.run, self.sequence, self._checksum = self._next_run, end.sequence, checksum
        if self._starts_anew:
            self.catalogs = {}
        self._reach(self._next_catalogs)
        self.synced = True
        return Received((*gone, *changed), current=True, snapshot=True)

    def _heartbeat(self, beat: Heartbeat) -> Received:
        self._check_begun()
        if self._staged is not None:
            raise OutOfStep("the end of the snapshot is missing")
        if beat.sequence != self.sequence:
            raise OutOfStep(f"it is at {beat.sequence}, this view at {self.sequence}")
        if beat.checksum != self._checksum:
            raise OutOfStep(f"its names at {beat.sequence} are not those of this view")
        return Received(current=True)

    def _reach(self, catalogs: Mapping[str, int]) -> None:
        for tenant, number in catalogs.items():
            self.catalogs[tenant] = max(number, self.catalogs.get(tenant, 0))

    def _put(self, state: NameState) -> None:
        before, after = self.names.pop(state.key, None), _seen(state)
        self._checksum = add_mark(
            self._checksum, 0 if before is None else before.mark, after.mark
        )
        if state.entry is not None:
            self.names[state.key] = after

    def _check_begun(self) -> None:
        if not self._begun:
            raise OutOfStep("a message came before the beginning")


def _seen(state: NameState) -> KnownName:
    return KnownName.of(state.key, state.entry, len(state.rows))
