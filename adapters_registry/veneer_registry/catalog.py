"""Names and revisions in SQLite: one transaction a change, durable when it returns.

Write-ahead log with ``synchronous=FULL``: a commit survives a power cut. One
connection writes, another reads, so that a reader never waits for an fsync.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import operator
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from veneer_registry.changes import Change
from veneer_registry.errors import FailedPrecondition
from veneer_registry.rows import (
    SERVER,
    AliasRow,
    HistoryRow,
    NameRow,
    ResidentRow,
    RevisionRow,
    Who,
)
from veneer_registry.schema import upgrade
from veneer_registry.store import disk_failed, disk_full

__all__ = ["Catalog"]

_FULL_BYTES: Final = 1 << 20
"""A disk with less room than this counts as full."""

_FEW: Final = 1000
"""Of how many revisions with a label it is counted which of two labels is the rarer."""

_COLUMNS: Final = (
    "r.name, r.revision, r.weights, r.base, r.manifest, r.created, r.labels, r.bytes, "
    "n.current IS r.revision, n.generation"
)


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
                upgrade(self._writer, path)
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

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            folder = self._path.parent
            if code == sqlite3.SQLITE_FULL:
                raise disk_full(folder) from error
            if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
                # SQLite does not say which error it got.
                full = shutil.disk_usage(folder).free < _FULL_BYTES
                failed = disk_full(folder) if full else disk_failed(folder, str(error))
                raise failed from error
            if type(error) is not sqlite3.DatabaseError:
                raise
            raise FailedPrecondition(
                f"{self._path} is damaged ({error}); restore it, or move it away and push "
                "the adapters again",
                metadata={"file": str(self._path)},
            ) from error

    @contextlib.contextmanager
    def change(self, who: Who = SERVER, time: float = 0.0) -> Iterator[Change]:
        """One transaction, durable when the block ends; undone where it raises.

        Args:
            who, time: for the history; Unix seconds.
        """
        with self._write_lock, self._errors():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                (number,) = self._writer.execute(
                    "UPDATE counter SET value = value + 1 RETURNING value"
                ).fetchone()
                yield Change(self._writer, number, who, time)
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    # -------------------------------------------------------------------- queries

    def _query(self, sql: str, parameters: Sequence[object]) -> list[tuple[Any, ...]]:
        with self._read_lock, self._errors():
            return self._reader.execute(sql, parameters).fetchall()

    def names(self) -> Iterator[NameRow]:
        """Every name in order, for the index."""
        rows = self._query(
            "SELECT n.name, n.current, n.generation, n.retain, r.revision, r.weights, r.base "
            "FROM names n LEFT JOIN revisions r ON r.name = n.name "
            "ORDER BY n.name, r.sequence DESC",
            (),
        )
        aliases: dict[str, list[AliasRow]] = {}
        for alias in self.aliases():
            aliases.setdefault(alias.name, []).append(alias)
        for name, group in itertools.groupby(rows, key=operator.itemgetter(0)):
            found = list(group)
            _, current, generation, retain = found[0][:4]
            revisions = tuple(row[4:] for row in found if row[4] is not None)
            yield NameRow(
                name, current, generation, revisions, retain, tuple(aliases.get(name, ()))
            )

    def aliases(self) -> tuple[AliasRow, ...]:
        """Every alias, in order of name and alias."""
        rows = self._query("SELECT * FROM aliases ORDER BY name, alias", ())
        return tuple(
            AliasRow(name, alias, _targets(targets), _targets(previous), generation, updated)
            for name, alias, targets, previous, generation, updated in rows
        )

    def quarantined(self) -> dict[str, str]:
        """Weights digest -> why, of what is damaged."""
        return dict(self._query("SELECT weights, why FROM quarantine", ()))

    def file(self, sha256: str) -> tuple[str, str] | None:
        """(digest of the folder, file name) of stored content with this SHA-256."""
        rows = self._query("SELECT digest, file FROM files WHERE sha256 = ?", (sha256,))
        return (rows[0][0], rows[0][1]) if rows else None

    def residents(self) -> tuple[ResidentRow, ...]:
        """What was in memory when that was last written, most recently used first."""
        rows = self._query("SELECT weights, tier, pin FROM residents ORDER BY place", ())
        return tuple(ResidentRow(*row) for row in rows)

    def history(self, name: str, before: int | None, limit: int) -> tuple[HistoryRow, ...]:
        """Lines of a name (of all names if empty), newest first, older than line
        ``before`` if that is given."""
        where: list[str] = ["1"]
        parameters: list[object] = []
        if name:
            where.append("name = ?")
            parameters.append(name)
        if before is not None:
            where.append("sequence < ?")
            parameters.append(before)
        rows = self._query(
            "SELECT sequence, time, name, event, revision, actor, peer, detail FROM history "
            f"WHERE {' AND '.join(where)} ORDER BY sequence DESC LIMIT ?",
            [*parameters, limit],
        )
        return tuple(
            HistoryRow(number, time, of, event, revision, Who(actor, peer), detail)
            for number, time, of, event, revision, actor, peer, detail in rows
        )

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
        pairs = self._rarest_first(labels)
        first, at = "names n", "n"
        if pairs:
            # In the order of the index on labels; SQLite would walk through all names.
            first = "labels l CROSS JOIN names n ON n.name = l.name AND n.current = l.revision"
            at = "l"
        sql = (
            f"SELECT {_COLUMNS} FROM {first} CROSS JOIN revisions r ON r.name = n.name "
            f"AND r.revision = n.current WHERE {at}.name > ? AND {at}.name >= ? "
            f"AND {at}.name < ?"
        )
        # Names are ASCII, so this is past every name with the prefix.
        parameters: list[object] = [after, prefix, prefix + "\x7f"]
        for number, pair in enumerate(pairs):
            if number == 0:
                sql += " AND l.key = ? AND l.value = ?"
            else:
                sql += (
                    " AND EXISTS (SELECT 1 FROM labels o WHERE o.name = n.name AND "
                    "o.revision = n.current AND o.key = ? AND o.value = ?)"
                )
            parameters += pair
        rows = self._query(sql + f" ORDER BY {at}.name LIMIT ?", [*parameters, limit])
        return tuple(map(_row, rows))

    def _rarest_first(self, labels: Mapping[str, str]) -> list[tuple[str, str]]:
        """Pairs of a filter, the one that fewest revisions have in front."""
        if len(labels) < 2:
            return list(labels.items())

        def count(pair: tuple[str, str]) -> int:
            sql = "SELECT 1 FROM labels WHERE key = ? AND value = ? LIMIT ?"
            ((found,),) = self._query(f"SELECT count(*) FROM ({sql})", (*pair, _FEW))
            return int(found)

        return sorted(labels.items(), key=count)


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


def _targets(text: str) -> tuple[tuple[str, int], ...]:
    return tuple((revision, weight) for revision, weight in json.loads(text))
