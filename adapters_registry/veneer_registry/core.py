"""State that the parts of the registry share: folder, catalog, index; and reading a row.

Two locks: every change of store or catalog holds `changes` for as long as it takes; the index
has its own lock, which is never held across a system call. Where several processes share one
catalog, `changes` keeps the other processes out too, and once it is acquired the index has
their changes.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from veneer_registry import registration
from veneer_registry.adapter import AdapterManifest, AdapterRef, BaseClaim, BaseSpec
from veneer_registry.catalog import Catalog
from veneer_registry.causes import cause_of
from veneer_registry.changes import Change
from veneer_registry.entry import Entry
from veneer_registry.errors import AdapterCorrupt, EtagMismatch, Unavailable, VeneerError
from veneer_registry.exclusive import Exclusive
from veneer_registry.freshness import Freshness, Owned
from veneer_registry.index import Index
from veneer_registry.lock import OwnerLock
from veneer_registry.manifest_json import manifest_from_json
from veneer_registry.records import AdapterRecord
from veneer_registry.rows import SERVER, HistoryRow, RevisionRow, Who
from veneer_registry.store import Store
from veneer_registry.values import SERVING_BYTES

ReadAdapter = Callable[[Path, BaseSpec | None, BaseClaim], AdapterManifest]

_CACHED_MANIFESTS: Final = 256

_log = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True, eq=False)
class Core:
    """Owner of a data folder's parts; `Registry` opens and closes it.

    Attributes:
        base_id: identity of the base; shows whether an adapter was checked against it.
        retain: how many superseded revisions a name keeps, unless it sets its own number.
        clock: returns Unix seconds.
        read: checks the files of an upload, as `format.read_upload` does.
        close: closes everything else that belongs to the catalog and the store.
        freshness: how current the catalog is.
        watchers: called with the changes of other processes; see `Registry.watch`.
    """

    lock: OwnerLock
    store: Store
    catalog: Catalog
    index: Index
    base: BaseSpec
    base_id: str
    retain: int
    clock: Callable[[], float]
    read: ReadAdapter
    close: Callable[[], None] = lambda: None
    freshness: Freshness = dataclasses.field(default_factory=Owned)
    watchers: list[Callable[[Sequence[HistoryRow]], None]] = dataclasses.field(
        default_factory=list, init=False
    )

    def __post_init__(self) -> None:
        # Rows are read each time, but parsed manifests are cached. The key is the
        # manifest's text, so an entry cannot be stale.
        self._parse = functools.lru_cache(maxsize=_CACHED_MANIFESTS)(manifest_from_json)

    @property
    def changes(self) -> Exclusive:
        """The lock that is held for every change; see the module docstring."""
        return self.catalog.exclusive

    def change(self, who: Who) -> AbstractContextManager[Change]:
        """A transaction of the catalog; the caller holds `changes`."""
        return self.catalog.change(who, self.clock())

    def record(self, row: RevisionRow) -> AdapterRecord:
        """The record that callers get for a row. Raises Unavailable if this version of Veneer
        cannot read it: another server may have written it."""
        try:
            manifest = self._parse(row.manifest)
        except (ValueError, TypeError, KeyError) as error:
            raise Unavailable(
                f"this server cannot read adapter {row.name}@{row.revision[:12]}, which a "
                "server of another version wrote; use another server",
                metadata={"adapter": row.name, "cause": "version"},
                detail=repr(error),
            ) from error
        # The server may have been restarted with another serving dtype.
        served = manifest.parameters * SERVING_BYTES[self.base.serving_dtype]
        ref = AdapterRef(row.name, row.revision, row.weights)
        entry = self.index.entry(row.name)
        retain = None if entry is None else entry.retain
        return AdapterRecord(
            ref=ref,
            manifest=dataclasses.replace(manifest, serving_bytes=served),
            created=row.created,
            labels=row.labels,
            current=row.current,
            etag=str(row.generation),
            bytes=row.bytes,
            aliases=() if entry is None else entry.aliases_of(row.revision),
            retain=self.retain if retain is None else retain,
            quarantined=self.index.unusable(ref),
            foreign=row.base != self.base_id,
            shared=entry is not None and entry.shared,
        )

    def sweep(self) -> int:
        """Remove content that no name or lease needs. Returns the number of folders removed. A
        read-only copy has no content of its own.

        While the catalog has damaged rows, content that one of them may refer to stays, and
        the rest goes to quarantine.
        """
        with self.changes:
            garbage = self.index.take_garbage()
            if self.catalog.read_only:
                return 0
            if self.index.any_damaged and self.store.remote:
                # What a damaged row may refer to could only be found out by reading all of it.
                self.index.put_back(garbage)
                return 0
            weights, revisions = garbage.weights, garbage.revisions
            trash: Path | None = None
            try:
                if self.index.any_damaged and (weights or revisions):
                    needed = self._registered_beside_the_index()
                    weights, revisions = weights - needed, revisions - needed
                if not weights and not revisions:
                    return 0
                with self.change(SERVER) as change:
                    change.forget_files((*weights, *revisions))
                    healed = [change.release(digest) for digest in weights]
                if any(healed):
                    self.index.set_quarantined(self.catalog.quarantined())
                if self.index.any_damaged:
                    self.store.quarantine.set_aside(weights, revisions)
                else:
                    trash = self.store.discard(weights, revisions)
            except BaseException:
                self.index.put_back(garbage)
                raise
        if trash is not None:
            self.store.drop_staging(trash)
        return len(weights) + len(revisions)

    def _registered_beside_the_index(self) -> set[str]:
        """Weights and revisions that are registered in the store but missing from the index:
        a damaged row of the catalog may refer to them.

        Raises:
            AdapterCorrupt: a bundle cannot be read.
        """
        needed: set[str] = set()
        for revision in self.store.present()[1] - self.index.revisions():
            if self.store.registered(revision):
                try:
                    weights = self.store.bundle(revision).weights
                except (OSError, ValueError, KeyError, TypeError) as error:
                    raise AdapterCorrupt(
                        "not removing anything: the catalog has damaged rows and bundle.json "
                        f"of {revision[:12]} cannot be read: {cause_of(error)}"
                    ) from error
                needed |= {revision, weights}
        return needed

    def sweep_quietly(self) -> None:
        """`sweep` after a change, but only log a failure, since the change itself stands.
        Content that could not be removed is tried again later."""
        try:
            self.sweep()
        except (VeneerError, OSError, sqlite3.Error) as error:
            _log.warning("unneeded content stays on disk for now: %s", error)

    def drop_superseded(self, name: str, entry: Entry, dropped: Iterable[AdapterRef]) -> None:
        """Forget revisions that ``entry`` no longer has.

        ``entry`` must be in the index already: a request that found one of these revisions
        before that looks the name up again and gets the new one.
        """
        dropped = tuple(dropped)
        with self.change(SERVER) as change:
            change.forget(name, [ref.revision for ref in dropped])
            for ref in dropped:
                change.note("superseded", name, ref.revision)
        self.unregister(name, [ref.revision for ref in dropped])

    def unregister(self, name: str, revisions: Iterable[str]) -> None:
        """Unregister revisions that a name no longer has, so that `store recover` does not
        bring them back."""
        for revision in revisions:
            try:
                self.store.unregister(revision, registration.file_name(name))
            except VeneerError as error:  # the change stands; only a recovery is affected
                _log.warning("%s is still registered in the store: %s", name, error)

    def register(self, row: RevisionRow) -> None:
        """Write a copy of a revision's catalog row beside its bundle."""
        try:
            self.store.register(row.revision, *registration.write(row))
        except VeneerError as error:
            _log.warning("the registration of %s in the store is outdated: %s", row.name, error)


class Part:
    """Base of the classes that `Registry` is composed of."""

    def __init__(self, core: Core) -> None:
        self._core = core


def check_etag(name: str, entry: Entry | None, etag: str) -> None:
    """Raise EtagMismatch unless ``etag`` is empty or the name's."""
    now = "" if entry is None else str(entry.generation)
    if etag and etag != now:
        raise EtagMismatch(
            f"adapter {name!r} has etag {now or 'none'}, not {etag[:40]}: it has changed; "
            "read it again with `GetAdapter`",
            metadata={"adapter": name, "etag": now},
        )
