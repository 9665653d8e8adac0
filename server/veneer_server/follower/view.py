"""A follower's view of its registry: a pure state machine, without I/O and without a clock.

Each connection begins with the follower's position (`place`). A message that does not fit the
earlier ones raises `OutOfStep`: the caller ends the connection and connects again, and the next
connection begins with a snapshot. Meanwhile the old view is served; a snapshot replaces it only
once it is complete.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
    """

    changes: tuple[NameState, ...] = ()
    told: Told | None = None
    current: bool = False
    restored: bool = False
    moved: bool = False


class View:
    """All names of a registry, as received so far.

    Attributes:
        names: every existing name of all tenants.
        run, sequence: position up to which changes are applied; "" and 0 before the first
            snapshot.
        store, catalog_change: of the registry that was seen last.
        synced: whether a complete snapshot was received, or a saved view restored.
    """

    def __init__(self) -> None:
        self.names: dict[Key, NameState] = {}
        self.run = ""
        self.sequence = 0
        self.store = ""
        self.catalog_change = 0
        self.synced = False
        self._checksum = 0
        self._begun = False
        self._staged: dict[Key, NameState] | None = None
        self._next_run = ""

    def restore(
        self,
        names: Iterable[NameState],
        *,
        run: str,
        sequence: int,
        store: str,
        catalog_change: int,
    ) -> None:
        """Start from the view that an earlier run of this server saved."""
        self.names = {state.key: state for state in names}
        self.run, self.sequence = run, sequence
        self.store, self.catalog_change = store, catalog_change
        self._checksum = 0
        for key, state in self.names.items():
            self._checksum = add_mark(self._checksum, 0, mark_of(key, state.entry))
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
        restored = known and not moved and begin.catalog_change < self.catalog_change
        self._begun = True
        self._staged = {} if begin.snapshot else None
        self._next_run = begin.run
        self.store, self.catalog_change = begin.store, begin.catalog_change
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
        self._put(state)
        return Received((state,), told)

    def _snapshot_end(self, end: SnapshotEnd) -> Received:
        self._check_begun()
        staged = self._staged
        if staged is None:
            raise OutOfStep("a snapshot ended that had not begun")
        checksum = 0
        for key, state in staged.items():
            checksum = add_mark(checksum, 0, mark_of(key, state.entry))
        if checksum != end.checksum:
            raise OutOfStep("the snapshot is not whole")
        gone = [NameState(*key, None) for key in sorted(self.names.keys() - staged.keys())]
        changed = [state for key, state in staged.items() if self.names.get(key) != state]
        self.names, self._staged = staged, None
        self.run, self.sequence, self._checksum = self._next_run, end.sequence, checksum
        self.synced = True
        return Received((*gone, *changed), current=True)

    def _heartbeat(self, beat: Heartbeat) -> Received:
        self._check_begun()
        if self._staged is not None:
            raise OutOfStep("the end of the snapshot is missing")
        if beat.sequence != self.sequence:
            raise OutOfStep(f"it is at {beat.sequence}, this view at {self.sequence}")
        if beat.checksum != self._checksum:
            raise OutOfStep(f"its names at {beat.sequence} are not those of this view")
        return Received(current=True)

    def _put(self, state: NameState) -> None:
        before = self.names.get(state.key)
        self._checksum = add_mark(
            self._checksum,
            mark_of(state.key, None if before is None else before.entry),
            mark_of(state.key, state.entry),
        )
        if state.entry is None:
            self.names.pop(state.key, None)
        else:
            self.names[state.key] = state

    def _check_begun(self) -> None:
        if not self._begun:
            raise OutOfStep("a message came before the beginning")
