"""A registry whose catalog is a copy of another server's, and whose content is fetched.

Nobody who uses a `Registry` asks whether it is one of these. The copy is a `Catalog` like any
other, so a follower's lookups, listings and residents are those of the server that it follows.
Its only change is `RegistryCopy.apply`; every other one is refused with the error that says
where changes are made. Where the content comes from is the store's part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from veneer_registry.adapter import AdapterRef, BaseSpec
from veneer_registry.catalog import Catalog
from veneer_registry.changes import Change
from veneer_registry.completing import COMPLETED
from veneer_registry.core import Core
from veneer_registry.entry import Entry
from veneer_registry.errors import Unavailable
from veneer_registry.following import follow_changes
from veneer_registry.format import read_upload
from veneer_registry.freshness import Freshness
from veneer_registry.index import Index
from veneer_registry.lock import OwnerLock
from veneer_registry.records import AdapterRecord, UploadRequest
from veneer_registry.recovery import base_identity, entry_of
from veneer_registry.registry import Registry
from veneer_registry.rows import SERVER, Foreign, HistoryRow, RevisionRow, Who
from veneer_registry.schema import damaged
from veneer_registry.store import Store
from veneer_registry.upload import Upload

_PLACE: Final = "place"

Refuse = Callable[[str], NoReturn]
"""Raises the error for something that only the other server does. Args: what, in words."""


@dataclass(frozen=True, slots=True)
class NewName:
    """The new state of a name.

    Attributes:
        entry: None if the name is gone.
        rows: rows of the entry's revisions, newest first. Some may be missing.
    """

    entry: Entry | None
    rows: tuple[RevisionRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Changed:
    """What `RegistryCopy.apply` did to a name.

    Attributes:
        before: its current revision before; None if there was none.
        dropped: the revisions that the name no longer has.
    """

    before: AdapterRef | None
    dropped: tuple[AdapterRecord, ...]


class CatalogCopy(Catalog):
    """The copy at ``path``."""

    read_only = True

    def __init__(self, path: Path, refuse: Refuse) -> None:
        """Open or make the copy. Raises as `Catalog`."""
        super().__init__(path)
        self._refuse = refuse
        if self.fact(COMPLETED) is None:
            with super().change() as change:
                change.set_fact(COMPLETED, "1")

    @contextmanager
    def change(self, who: Who = SERVER, time: float = 0.0) -> Iterator[Change]:
        """Refuse."""
        self._refuse("changing an adapter")
        yield  # makes it a generator

    def history(self, name: str, before: int | None, limit: int) -> tuple[HistoryRow, ...]:
        """Refuse: only the other server has the history."""
        self._refuse("reading the history")

    @property
    def place(self) -> Mapping[str, Any]:
        """What the last `apply` wrote as ``place``; empty if there was none."""
        text = self.fact(_PLACE)
        return {} if text is None else json.loads(text)

    def apply(self, states: Mapping[str, NewName], place: Mapping[str, Any]) -> None:
        """Replace names, in one transaction; durable when it returns."""
        with super().change() as change:
            for name, state in states.items():
                change.delete_name(name)
                if (entry := state.entry) is None:
                    continue
                current = None if entry.current is None else entry.current.revision
                change.put_name(name, current, entry.generation, entry.retain)
                for number, row in enumerate(reversed(state.rows), 1):
                    change.put_revision(row, number)
                for alias in entry.aliases:
                    change.set_alias(alias)
                if entry.shared:
                    change.share(name)
            change.set_fact(_PLACE, json.dumps(dict(place)))


class RegistryCopy(Registry):
    """A registry over a `CatalogCopy`; see the module docstring. Made by `open_copy`."""

    def __init__(self, core: Core, catalog: CatalogCopy, refuse: Refuse) -> None:
        super().__init__(core, max_adapter_bytes=0)
        self._catalog = catalog
        self._refuse = refuse

    def begin_upload(self, request: UploadRequest, *, resume: bool = False) -> Upload:
        """Refuse."""
        self._refuse("an upload")

    @property
    def place(self) -> Mapping[str, Any]:
        """The last place that was given to `apply`; empty if there was none."""
        return self._catalog.place

    def entry(self, name: str) -> Entry | None:
        """The entry of a plain name, or None. Reads no disk."""
        return self._core.index.entry(name)

    def entries(self) -> Mapping[str, Entry]:
        """All names. Reads no disk."""
        return self._core.index.entries()

    def apply(
        self, states: Mapping[str, NewName], place: Mapping[str, Any]
    ) -> Mapping[str, Changed]:
        """Replace names; durable when it returns. Lookups beside it find a name's old or new
        state. From a worker thread.

        Args:
            states: by name.
            place: kept with them, as JSON.

        Raises:
            DiskFull, DiskFailed: nothing was changed, or all was but for rows of revisions that
                names no longer have; apply the same again.
        """
        with self._core.changes:
            index = self._core.index
            found: dict[str, Changed] = {}
            first: dict[str, NewName] = {}
            late: dict[str, NewName] = {}
            for name, state in states.items():
                before = index.entry(name)
                old = () if before is None else self._catalog.revisions(name)
                kept = set() if state.entry is None else {r.revision for r in state.rows}
                over = tuple(row for row in old if row.revision not in kept)
                found[name] = Changed(
                    None if before is None else before.current, self._records(over)
                )
                if state.entry is None:
                    if before is not None:
                        index.remove(name)
                    late[name] = state
                    continue
                # A request that found one of these revisions in the index before must find the
                # new one when it looks again: so their rows go after the index has changed.
                first[name] = NewName(state.entry, (*state.rows, *over))
                if over:
                    late[name] = state
            if first:
                self._put(first, self._catalog.place if late else place)
            if late or not first:
                self._put(late, place)
            for name, state in states.items():
                # Requests for a revision whose row is missing then get `Freshness.missing`.
                if state.entry is not None and len(state.rows) < len(state.entry.revisions):
                    index.put(name, state.entry)
            index.take_garbage()  # the store evicts content instead
            return found

    def _put(self, states: Mapping[str, NewName], place: Mapping[str, Any]) -> None:
        self._catalog.apply(states, place)
        follow_changes(self._core, Foreign(frozenset(states), ()))

    def _records(self, rows: Sequence[RevisionRow]) -> tuple[AdapterRecord, ...]:
        records = []
        for row in rows:
            with suppress(Unavailable):  # unreadable here, so it was never in use here
                records.append(self._core.record(row))
        return tuple(records)


def open_copy(
    folder: Path,
    base: BaseSpec,
    *,
    lock: OwnerLock,
    store: Store,
    freshness: Freshness,
    refuse: Refuse,
    retain: int,
) -> RegistryCopy:
    """Open the copy in a folder, or make an empty one.

    Args:
        lock: released by `RegistryCopy.close`.
        store: fetches what is not there.
        retain: for the records of names that set no value of their own.

    Raises:
        CatalogDamaged: it cannot be read, or has damaged rows: remove the folder.
        FailedPrecondition: it is from a newer version: as above.
        DiskFull, DiskFailed: the disk is full or fails.
    """
    path = folder / "catalog.sqlite"
    catalog = CatalogCopy(path, refuse)
    try:
        base_id, index = base_identity(base), Index(base.name)
        entries = {}
        for row in catalog.names():
            if row.damaged:
                raise damaged(path, f"{row.damaged} rows do not have their digest")
            entries[row.name] = entry_of(row, base_id)
        index.load(entries)
    except BaseException:
        catalog.close()
        raise
    core = Core(
        lock=lock,
        store=store,
        catalog=catalog,
        index=index,
        base=base,
        base_id=base_id,
        retain=retain,
        clock=lambda: 0.0,
        read=read_upload,
        freshness=freshness,
    )
    return RegistryCopy(core, catalog, refuse)
