"""The changes of all tenants' registries in one numbered sequence, for followers.

Numbers start again with each run of the server, and each run has an id: restoring a backup
needs a restart, so followers notice it by the new id. Rejected: the catalog's own change
numbers, since a restored backup reuses them for other changes, and each tenant has its own.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from veneer_registry.entry import Entry
from veneer_registry.errors import Draining
from veneer_registry.rows import RevisionRow

from veneer_server.replication.states import (
    Heartbeat,
    Key,
    NameState,
    Told,
    add_mark,
    mark_of,
)

KEPT: Final = 4096
"""Changes that a follower may be behind before it needs a snapshot."""


class FeedSource(Protocol):
    """A registry that followers mirror: see `veneer_registry.replicating`."""

    def follow(self, changed: Callable[[str, Entry | None], None]) -> Mapping[str, Entry]: ...

    def rows(self, name: str) -> tuple[RevisionRow, ...]: ...

    @property
    def store_id(self) -> str: ...

    @property
    def last_change(self) -> int: ...

    @property
    def told(self) -> int: ...

    @property
    def closed(self) -> bool: ...

    @property
    def lag_s(self) -> float: ...

    @property
    def base_id(self) -> str: ...


@dataclass(frozen=True, slots=True)
class FeedChange:
    """One change: a name's new entry (None if the name is gone), the change's number, and the
    number of the tenant's catalog that has it."""

    sequence: int
    key: Key
    entry: Entry | None
    catalog: int = 0


class Feed:
    """The numbered changes of this run. Belongs to one event loop.

    Attributes:
        run: id of this run.
        sequence: number of the last change; 0 if there is none.
        closed: whether `close` was called.
    """

    def __init__(self, *, kept: int = KEPT) -> None:
        self.run = secrets.token_hex(8)
        self.sequence = 0
        self._registries: dict[str, FeedSource] = {}
        self._entries: dict[Key, Entry] = {}
        self._catalogs: dict[str, int] = {}
        self._checksum = 0
        self._row: deque[FeedChange] = deque(maxlen=kept)
        self._waiting: set[asyncio.Future[None]] = set()
        self.closed = False

    def add(
        self, tenant: str, registry: FeedSource, schedule: Callable[..., object] | None = None
    ) -> None:
        """Add the changes of a registry that has just been opened.

        Args:
            schedule: schedules a call in the event loop's thread; None uses the running loop.
        """
        in_loop = schedule or asyncio.get_running_loop().call_soon_threadsafe

        def changed(name: str, entry: Entry | None) -> None:
            # Called in the thread that makes the change, before it acknowledges the change: so
            # each acknowledged change has a number.
            in_loop(self._note, (tenant, name), entry, registry.last_change)

        self._registries[tenant] = registry
        number = registry.last_change
        for name, entry in registry.follow(changed).items():
            self._note((tenant, name), entry, number)
        self._catalogs[tenant] = max(number, self._catalogs.get(tenant, 0))

    def _note(self, key: Key, entry: Entry | None, catalog: int) -> None:
        self._catalogs[key[0]] = max(catalog, self._catalogs.get(key[0], 0))
        before = self._entries.get(key)
        if before == entry:
            return  # already in the entries that `follow` returned
        self._checksum = add_mark(self._checksum, mark_of(key, before), mark_of(key, entry))
        if entry is None:
            del self._entries[key]
        else:
            self._entries[key] = entry
        self.sequence += 1
        self._row.append(FeedChange(self.sequence, key, entry, catalog))
        self._wake()

    # ------------------------------------------------------------------- followers

    def heartbeat(self) -> Heartbeat:
        """The last number, the checksum of all names there, and how old that may be."""
        return Heartbeat(self.sequence, self._checksum, lag_s=self.lag_s)

    def snapshot(self) -> tuple[Heartbeat, dict[Key, Entry]]:
        """All names now."""
        return self.heartbeat(), dict(self._entries)

    def after(self, run: str, sequence: int) -> tuple[FeedChange, ...] | None:
        """The changes after a number of a run; None if the run is not this one, or the changes
        are no longer kept."""
        oldest = self.sequence - len(self._row)
        if run != self.run or not oldest <= sequence <= self.sequence:
            return None
        return tuple(itertools.islice(self._row, sequence - oldest, None))

    def told(self, change: FeedChange) -> Told:
        """A change with its rows. Reads the catalog: call it from a worker thread.

        It has the name's state now, which may be newer than the change: rows of revisions that
        were dropped since are gone, and a follower may as well have what comes later.
        """
        state = self.state(change.key, self._entries.get(change.key))
        while len(state.rows) < len(state.entry.revisions if state.entry else ()):
            entry = self._entries.get(change.key)
            if entry == state.entry:  # a row is damaged, or being deleted
                break
            state = self.state(change.key, entry)
        return Told(state, change.sequence, change.sequence - 1, change.catalog)

    def state(self, key: Key, entry: Entry | None) -> NameState:
        """A name's state with its rows, as `told`."""
        if entry is None:
            return NameState(*key, None)
        tenant, name = key
        wanted = {ref.revision for ref in entry.revisions}
        rows = self._registries[tenant].rows(name)
        return NameState(
            tenant, name, entry, tuple(row for row in rows if row.revision in wanted)
        )

    async def beyond(self, sequence: int, within_s: float) -> bool:
        """Wait for a change after ``sequence``; return False on timeout. Raises Draining after
        `close`."""
        if self.closed:
            raise Draining(
                "the registry is stopping: follow it again when it has restarted",
                retry_after_s=0.5,
            )
        if self.sequence > sequence:
            return True
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(told)
        try:
            await asyncio.wait({told}, timeout=within_s)
        finally:
            self._waiting.discard(told)
        return self.sequence > sequence

    def close(self) -> None:
        """Make all followers' calls end; they would not end by themselves."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        for told in self._waiting:
            if not told.done():
                told.set_result(None)

    # ---------------------------------------------------------------------- facts

    def told_by_tenant(self) -> dict[str, int]:
        """By tenant, see `Catalog.told`: all of it is numbered here after the event loop's next
        turn."""
        return {tenant: each.told for tenant, each in self._registries.items()}

    def registry(self, tenant: str) -> FeedSource | None:
        """The registry of an open tenant; None if it is not open."""
        return self._registries.get(tenant)

    @property
    def lag_s(self) -> float:
        """How old the oldest of all registries' views of their catalogs is, in seconds."""
        found = (each.lag_s for each in self._registries.values() if not each.closed)
        return max(found, default=0.0)

    def catalogs(self, told: Mapping[str, int]) -> dict[str, int]:
        """By tenant, the number of its catalog that all names have here.

        Args:
            told: `told_by_tenant` of an earlier turn of the event loop.
        """
        return {each: max(told.get(each, 0), at) for each, at in self._catalogs.items()}

    def facts(self) -> tuple[str, str]:
        """Return the id of the first tenant's store, and the identity of the base. Reads the
        catalog."""
        default = next(iter(self._registries.values()))
        return default.store_id, default.base_id
