"""Names and revisions in SQLite: one transaction a change, durable when it returns.

Write-ahead log with ``synchronous=FULL``: a commit survives a power cut. One
connection writes, another reads, so that a reader never waits for an fsync.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from veneer_registry.errors import FailedPrecondition
from veneer_registry.store import disk_full
from veneer_registry.strict_json import canonical_json

__all__ = ["Catalog", "NameRow", "RevisionRow"]

_VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE counter (value INTEGER NOT NULL);
INSERT INTO counter VALUES (0);
CREATE TABLE names (
    name TEXT PRIMARY KEY,
    current TEXT,              -- NULL: its content was lost
    generation INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE revisions (
    name TEXT NOT NULL REFERENCES names(name) ON DELETE CASCADE,
    revision TEXT NOT NULL,
    weights TEXT NOT NULL,
    base TEXT NOT NULL,        -- identity of the base it was checked against
    manifest TEXT NOT NULL,
    created REAL NOT NULL,
    labels TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    sequence INTEGER NOT NULL, -- order of publishing
    PRIMARY KEY (name, revision)
);
CREATE TABLE labels (
    name TEXT NOT NULL,
    revision TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (name, revision, key),
    FOREIGN KEY (name, revision) REFERENCES revisions(name, revision) ON DELETE CASCADE
) WITHOUT ROWID;
"""

_COLUMNS: Final = (
    "r.name, r.revision, r.weights, r.base, r.manifest, r.created, r.labels, r.bytes, "
    "n.current IS r.revision, n.generation"
)


@dataclass(frozen=True, slots=True)
class RevisionRow:
    """One stored revision; ``manifest`` is the text of `manifest_to_json`."""

    name: str
    revision: str
    weights: str
    base: str
    manifest: str
    created: float
    labels: Mapping[str, str]
    bytes: int
    current: bool = True
    generation: int = 0


@dataclass(frozen=True, slots=True)
class NameRow:
    """What the index needs of a name: revisions are (revision, weights, base), newest first."""

    name: str
    current: str | None
    generation: int
    revisions: tuple[tuple[str, str, str], ...]


class Catalog:
    """The database at ``path``. Every method may be called from any thread."""

    def __init__(self, path: Path) -> None:
        """Open or make the database.

        Raises:
            FailedPrecondition: it is damaged, or from a newer Veneer.
            DiskFull: there is no room for it.
        """
        self._path = path
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        with self._errors():
            self._writer = self._connect()
            try:
                self._set_up()
                self._reader = self._connect()
            except BaseException:
                self._writer.close()
                raise

    def close(self) -> None:
        """Close both connections. May be called again."""
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def _set_up(self) -> None:
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version == 0:
            script = f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={_VERSION}; COMMIT;"
            self._writer.executescript(script)
        elif version != _VERSION:
            raise FailedPrecondition(
                f"{self._path} has schema {version}, this Veneer knows {_VERSION}; start the "
                "version that made it, or give another folder with --data-dir",
                metadata={"schema": str(version)},
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise disk_full(self._path.parent) from error
            if type(error) is not sqlite3.DatabaseError:
                raise
            raise FailedPrecondition(
                f"{self._path} is damaged ({error}); restore it, or move it away and push "
                "the adapters again",
                metadata={"file": str(self._path)},
            ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[int]:
        """Yields the change's number, larger than any before, also over deletions."""
        with self._write_lock, self._errors():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                (number,) = self._writer.execute(
                    "UPDATE counter SET value = value + 1 RETURNING value"
                ).fetchone()
                yield number
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    # ------------------------------------------------------------------- changes

    def publish(self, row: RevisionRow) -> int:
        """Make ``row`` the current revision of its name. Returns the new generation."""
        with self._transaction() as number:
            self._writer.execute(
                "INSERT INTO names VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE "
                "SET current = excluded.current, generation = excluded.generation",
                (row.name, row.revision, number),
            )
            self._forget(row.name, [row.revision])
            self._writer.execute(
                "INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(row.name, row.revision, row.weights, row.base, row.manifest, row.created),
                    *(canonical_json(dict(row.labels)).decode(), row.bytes, number),
                ),
            )
            self._writer.executemany(
                "INSERT INTO labels VALUES (?, ?, ?, ?)",
                [(row.name, row.revision, key, value) for key, value in row.labels.items()],
            )
        return number

    def delete_name(self, name: str) -> None:
        """Forget a name with all its revisions."""
        with self._transaction():
            self._writer.execute("DELETE FROM names WHERE name = ?", (name,))

    def delete_revisions(self, name: str, revisions: Sequence[str]) -> int:
        """Forget some revisions of a name, which stays without a current one if that
        was among them. Returns the new generation."""
        with self._transaction() as number:
            self._forget(name, revisions)
            self._writer.execute(
                "UPDATE names SET generation = ?, current = (SELECT revision FROM revisions r "
                "WHERE r.name = names.name AND r.revision = names.current) WHERE name = ?",
                (number, name),
            )
        return number

    def drop_superseded(self, name: str, revisions: Sequence[str]) -> None:
        """Forget revisions that are not current; the generation stays."""
        with self._transaction():
            self._forget(name, revisions)

    def _forget(self, name: str, revisions: Sequence[str]) -> None:
        self._writer.executemany(
            "DELETE FROM revisions WHERE name = ? AND revision = ?",
            [(name, revision) for revision in revisions],
        )

    # -------------------------------------------------------------------- queries

    def _query(self, sql: str, parameters: Sequence[object]) -> list[tuple[Any, ...]]:
        with self._read_lock, self._errors():
            return self._reader.execute(sql, parameters).fetchall()

    def names(self) -> Iterator[NameRow]:
        """Every name in order, for the index."""
        rows = self._query(
            "SELECT n.name, n.current, n.generation, r.revision, r.weights, r.base "
            "FROM names n LEFT JOIN revisions r ON r.name = n.name "
            "ORDER BY n.name, r.sequence DESC",
            (),
        )
        at = 0
        while at < len(rows):
            name, current, generation = rows[at][:3]
            end = at
            while end < len(rows) and rows[end][0] == name:
                end += 1
            revisions = tuple(row[3:] for row in rows[at:end] if row[3] is not None)
            yield NameRow(name, current, generation, revisions)
            at = end

    def revision(self, name: str, revision: str) -> RevisionRow | None:
        """One revision, or None where it is gone."""
        rows = self._query(
            f"SELECT {_COLUMNS} FROM revisions r JOIN names n ON n.name = r.name "
            "WHERE r.name = ? AND r.revision = ?",
            (name, revision),
        )
        return _row(rows[0]) if rows else None

    def revisions(self, name: str) -> tuple[RevisionRow, ...]:
        """All revisions of a name, newest first."""
        rows = self._query(
            f"SELECT {_COLUMNS} FROM revisions r JOIN names n ON n.name = r.name "
            "WHERE r.name = ? ORDER BY r.sequence DESC",
            (name,),
        )
        return tuple(map(_row, rows))

    def page(
        self, prefix: str, labels: Mapping[str, str], after: str, limit: int
    ) -> tuple[RevisionRow, ...]:
        """Current revisions in name order: those of names that start with ``prefix``,
        carry all of ``labels`` and come after ``after``."""
        sql = (
            f"SELECT {_COLUMNS} FROM names n JOIN revisions r ON r.name = n.name "
            "AND r.revision = n.current WHERE n.name > ? AND n.name >= ? AND n.name < ?"
        )
        # Names are ASCII, so this is past every name with the prefix.
        parameters: list[object] = [after, prefix, prefix + "\x7f"]
        for key, value in labels.items():
            sql += (
                " AND EXISTS (SELECT 1 FROM labels l WHERE l.name = r.name AND "
                "l.revision = r.revision AND l.key = ? AND l.value = ?)"
            )
            parameters += [key, value]
        rows = self._query(sql + " ORDER BY n.name LIMIT ?", [*parameters, limit])
        return tuple(map(_row, rows))


def _row(row: tuple[Any, ...]) -> RevisionRow:
    name, revision, weights, base, manifest, created, labels, size, current, generation = row
    return RevisionRow(
        name=name,
        revision=revision,
        weights=weights,
        base=base,
        manifest=manifest,
        created=created,
        labels=json.loads(labels),
        bytes=size,
        current=bool(current),
        generation=generation,
    )
