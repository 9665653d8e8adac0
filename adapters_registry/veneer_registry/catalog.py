"""Names and revisions in SQLite: one transaction per change, durable when it returns.

Write-ahead log with ``synchronous=FULL``: a commit survives a power cut. One connection
writes and two read: a reader never waits for an fsync, and a query that a request needs
before it can start waits neither for a listing nor for a low-priority thread that was
preempted in the middle of its query.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from veneer_registry.catalog_reads import CatalogReads
from veneer_registry.changes import Change
from veneer_registry.database import Reader, connect, database_errors
from veneer_registry.disk import create_file, disk_errors, sync
from veneer_registry.exclusive import Exclusive
from veneer_registry.rows import SERVER, Foreign, ResidentRow, Who
from veneer_registry.schema import upgrade

_log = logging.getLogger(__name__)

_LABELS: Final = (
    "SELECT r.name, r.revision, l.key, l.value FROM revisions r, "
    "json_each(CASE WHEN json_valid(r.labels) THEN r.labels ELSE '{}' END) l"
)
"""Derives the rows of the labels table from those of the revisions."""


def _nothing(number: int) -> None:
    pass


class Catalog(CatalogReads):
    """The database at ``path``. Every method may be called from any thread.

    Attributes:
        read_only: whether this is a copy of a catalog that another server changes.
        exclusive: lock to hold from reading the index, to decide on a change, until the change
            is made.
    """

    read_only = False

    def __init__(self, path: Path, *, after_change: Callable[[int], None] = _nothing) -> None:
        """Open or make the database.

        Args:
            after_change: called with the number of each change once it is durable.

        Raises:
            FailedPrecondition: the database is from a newer Veneer.
            CatalogDamaged: it cannot be read.
            DiskFull: the disk has no space for it.
        """
        self._path = path
        self._after_change = after_change
        self._write_lock = threading.Lock()
        self.exclusive = Exclusive()
        if not path.exists():
            # Make it private: SQLite would leave its mode to the umask, and gives its other
            # files the same mode. An existing file is not opened, since closing it would
            # drop SQLite's locks on it.
            with disk_errors(path.parent):
                create_file(path)
                sync(path.parent)
        with database_errors(path), contextlib.ExitStack() as undo:
            self._writer = connect(path)
            undo.callback(self._writer.close)
            upgrade(self._writer, path)
            self._reader = Reader(path)
            undo.callback(self._reader.close)
            self._urgent = Reader(path)
            undo.pop_all()

    def close(self) -> None:
        """Close the connections. Idempotent."""
        with self._write_lock:
            self._reader.close()
            self._urgent.close()
            self._writer.close()

    @contextlib.contextmanager
    def change(self, who: Who = SERVER, time: float = 0.0) -> Iterator[Change]:
        """One transaction: durable when the block ends, rolled back if it raises.

        Args:
            who, time: for the history; Unix seconds.
        """
        with self._write_lock, database_errors(self._path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                self._begin()
                (number,) = self._writer.execute(
                    "UPDATE counter SET value = value + 1 RETURNING value"
                ).fetchone()
                yield Change(self._writer, number, who, time)
                self._before_commit(number)
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
            self._after_change(number)

    def _begin(self) -> None:
        """Called at the beginning of a change."""

    def _before_commit(self, number: int) -> None:
        """Called when a change is complete, before its commit. If this raises, the change is
        rolled back."""

    @property
    def told(self) -> int:
        """Number of the last change that the index has."""
        return self.number

    def set_residents(self, residents: Sequence[ResidentRow]) -> None:
        """Record the resident adapters, most recently used first. They are this process's own,
        so this is no change of the catalog, and needs no `exclusive`."""
        with self._own() as writer:
            writer.execute("DELETE FROM residents")
            writer.executemany(
                "INSERT INTO residents VALUES (?, ?, ?, ?)",
                [(place, r.weights, r.tier, r.pin) for place, r in enumerate(residents)],
            )

    @contextlib.contextmanager
    def _own(self) -> Iterator[sqlite3.Connection]:
        """A transaction of this database that is no change of the catalog."""
        with self._write_lock, database_errors(self._path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def follow(self, follower: Callable[[Foreign], None]) -> None:
        """Call ``follower`` with the changes of other processes. Does nothing here, since no
        other process changes this catalog."""

    def restore_labels(self) -> bool:
        """Rebuild the labels table from the revisions' rows if they differ, and return whether
        they did. The table has no digests, so only this comparison can tell."""
        stored = "SELECT name, revision, key, value FROM labels"
        ((differs,),) = self._reader.rows(
            f"SELECT EXISTS ({stored} EXCEPT {_LABELS}) OR EXISTS ({_LABELS} EXCEPT {stored})"
        )
        if differs:
            _log.error("the labels table (used by listings) was damaged and has been rebuilt")
            try:
                with self.change() as change:
                    change.restore_labels(_LABELS)
            except sqlite3.IntegrityError as error:
                # Listings check each row's own labels: at worst they miss a row.
                _log.error(
                    "the labels table (used by listings) is damaged and cannot be rebuilt: %s",
                    error,
                )
        return bool(differs)
