"""Names and revisions in SQLite: one transaction a change, durable when it returns.

Write-ahead log with ``synchronous=FULL``: a commit survives a power cut. One connection
writes and two read, so that a reader never waits for an fsync, and what a request must know
before it can start is never waited for behind a listing, or behind a thread of low priority
that was interrupted in the middle of its query.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Final

from veneer_registry.changes import Change
from veneer_registry.checked_rows import (
    COLUMNS,
    REVISION,
    alias_row,
    history_row,
    newest_first,
    revision_row,
    revision_rows,
    sound_name,
)
from veneer_registry.database import Reader, connect, database_errors
from veneer_registry.disk import create_file, disk_errors, sync
from veneer_registry.integrity import row_digest
from veneer_registry.rows import (
    BEGINNINGS,
    ENDS,
    SERVER,
    AliasRow,
    HistoryRow,
    NameRow,
    ResidentRow,
    RevisionRow,
    Who,
    damaged_row,
)
from veneer_registry.schema import upgrade

__all__ = ["Catalog"]

_log = logging.getLogger(__name__)

_FEW: Final = 1000
"""Of how many revisions with a label it is counted which of two labels is the rarer."""

_HEX: Final = re.compile(r"[0-9a-f]{64}")

_LABELS: Final = (
    "SELECT r.name, r.revision, l.key, l.value FROM revisions r, "
    "json_each(CASE WHEN json_valid(r.labels) THEN r.labels ELSE '{}' END) l"
)
"""The rows of the table of labels, from those of the revisions."""


def _nothing(number: int) -> None:
    pass


class Catalog:
    """The database at ``path``. Every method may be called from any thread."""

    def __init__(self, path: Path, *, after_change: Callable[[int], None] = _nothing) -> None:
        """Open or make the database.

        Args:
            after_change: told the number of each change once it is durable.

        Raises:
            FailedPrecondition: it is from a newer Veneer.
            CatalogDamaged: it cannot be read.
            DiskFull: there is no room for it.
        """
        self._path = path
        self._after_change = after_change
        self._write_lock = threading.Lock()
        if not path.exists():
            # Private, which SQLite would leave to the umask; its other files follow this one's
            # mode. Not where there is one: closing it would drop SQLite's locks on it.
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
        """Close its connections. May be called again."""
        with self._write_lock:
            self._reader.close()
            self._urgent.close()
            self._writer.close()

    @contextlib.contextmanager
    def change(self, who: Who = SERVER, time: float = 0.0) -> Iterator[Change]:
        """One transaction, durable when the block ends; undone where it raises.

        Args:
            who, time: for the history; Unix seconds.
        """
        with self._write_lock, database_errors(self._path):
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
            self._after_change(number)

    # -------------------------------------------------------------------- queries

    def fact(self, key: str) -> str | None:
        """A fact about the whole catalog; None where it is not there, or is damaged."""
        for value, digest in self._reader.rows(
            "SELECT value, digest FROM facts WHERE key = ?", [key]
        ):
            if digest == row_digest("facts", key, value):
                return str(value)
        return None

    @property
    def number(self) -> int:
        """Of the last change."""
        ((number,),) = self._reader.rows("SELECT value FROM counter")
        return int(number)

    @property
    def empty(self) -> bool:
        """It has neither names nor revisions."""
        ((some,),) = self._reader.rows(
            "SELECT EXISTS (SELECT 1 FROM names) OR EXISTS (SELECT 1 FROM revisions)"
        )
        return not some

    def names(self) -> Iterator[NameRow]:
        """Every name in order, for the index. Damaged rows are counted at the name that they
        seem to be about, or at an empty one."""
        aliases, damage = self._aliases()
        # A start is made of this: tens of thousands of rows, most names with one revision.
        revisions: dict[str, list[tuple[Any, ...]]] = {}
        for row in self._reader.rows(f"SELECT digest, {REVISION} FROM revisions"):
            if row[0] != row_digest("revisions", *row[1:]):
                damage[sound_name(row[1])] += 1
            elif row[1] in revisions:
                revisions[row[1]].append(row)
            else:
                revisions[row[1]] = [row]
        nothing: list[tuple[Any, ...]] = []
        for row in self._reader.rows(
            "SELECT digest, name, current, generation, retain FROM names ORDER BY name"
        ):
            if row[0] != row_digest("names", *row[1:]):
                damage[sound_name(row[1])] += 1
                continue
            _, name, current, generation, retain = row
            kept = newest_first(revisions.pop(name, nothing))
            also = tuple(aliases.pop(name, ())) if name in aliases else ()
            bad = damage.pop(name, 0) if damage else 0
            yield NameRow(name, current, generation, kept, retain, also, bad)
        # What is left is about names whose own row is damaged, or gone.
        for name in sorted({*revisions, *aliases, *damage}):
            kept = newest_first(revisions.get(name, nothing))
            also = tuple(aliases.get(name, ()))
            yield NameRow(name, None, 0, kept, None, also, max(1, damage[name]))

    def damaged_rows(self, name: str) -> int:
        """How many rows about a name are damaged."""
        count = 0
        for table, columns in (
            ("names", "name, current, generation, retain"),
            ("revisions", REVISION),
            ("aliases", "name, alias, targets, previous, generation, updated"),
        ):
            for digest, *values in self._reader.rows(
                f"SELECT digest, {columns} FROM {table} WHERE name = ?", (name,)
            ):
                count += digest != row_digest(table, *values)
        return count

    def restore_labels(self) -> bool:
        """Make the table that is searched by label what the revisions' rows say. True if it
        was something else: it has no digests of its own."""
        stored = "SELECT name, revision, key, value FROM labels"
        ((differs,),) = self._reader.rows(
            f"SELECT EXISTS ({stored} EXCEPT {_LABELS}) OR EXISTS ({_LABELS} EXCEPT {stored})"
        )
        if differs:
            _log.error(
                "the labels that listings are searched by were damaged; they are restored"
            )
            try:
                with self.change() as change:
                    change.restore_labels(_LABELS)
            except sqlite3.IntegrityError as error:
                # Listings check each row's own labels: at worst one is not found.
                _log.error("the labels that listings are searched by stay damaged: %s", error)
        return bool(differs)

    def aliases(self) -> tuple[AliasRow, ...]:
        """Every alias, in order of name and alias; not those whose row is damaged."""
        return tuple(alias for group in self._aliases()[0].values() for alias in group)

    def _aliases(self) -> tuple[dict[str, list[AliasRow]], Counter[str]]:
        rows = self._reader.rows("SELECT * FROM aliases ORDER BY name, alias")
        damage = Counter[str]()
        found: dict[str, list[AliasRow]] = {}
        for each in rows:
            if (row := alias_row(each)) is None:
                damage[sound_name(each[0])] += 1
            else:
                found.setdefault(row.name, []).append(row)
        return found, damage

    def quarantined(self) -> dict[str, str]:
        """Weights digest -> why, of what is damaged."""
        return dict(self._reader.rows("SELECT weights, why FROM quarantine", ()))

    def file(self, sha256: str) -> tuple[str, str] | None:
        """(digest of the folder, file name) of stored content with this SHA-256."""
        rows = self._reader.rows("SELECT digest, file FROM files WHERE sha256 = ?", (sha256,))
        return (rows[0][0], rows[0][1]) if rows else None

    def residents(self) -> tuple[ResidentRow, ...]:
        """What was in memory when that was last written, most recently used first."""
        rows = self._reader.rows("SELECT weights, tier, pin FROM residents ORDER BY place", ())
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
        rows = self._reader.rows(
            "SELECT sequence, time, name, event, revision, actor, peer, detail, digest "
            f"FROM history WHERE {' AND '.join(where)} ORDER BY sequence DESC LIMIT ?",
            [*parameters, limit],
        )
        return tuple(history_row(row) for row in rows)

    def vanished(self, revisions: Set[str]) -> set[str]:
        """Which of these revisions, that no row names, a row must have named: the history
        tells of their publishing and of no end."""
        last: dict[tuple[str, str], str] = {}
        events = ", ".join(f"'{event}'" for event in (*ENDS, *BEGINNINGS))
        for name, revision, event in self._reader.rows(
            "SELECT name, revision, event FROM history "
            f"WHERE event IN ({events}) ORDER BY sequence"
        ):
            if revision in revisions:
                last[name, revision] = event
        return {revision for (_, revision), event in last.items() if event in BEGINNINGS}

    def revisions_of(self, name: str) -> set[str]:
        """All revisions of a name: those in damaged rows, too, and those of which the history
        tells a beginning and no end."""
        rows = self._reader.rows("SELECT revision FROM revisions WHERE name = ?", (name,))
        found = {text for (text,) in rows if isinstance(text, str) and _HEX.fullmatch(text)}
        for _, *values, digest in self._reader.rows(
            "SELECT sequence, time, name, event, revision, actor, peer, detail, digest "
            "FROM history WHERE name = ? ORDER BY sequence",
            (name,),
        ):
            event, revision = values[2], values[3]
            if digest != row_digest("history", *values):
                continue
            if event in BEGINNINGS:
                found.add(revision)
            elif event in ENDS:
                found.discard(revision)
        return found

    def revision(self, name: str, revision: str, *, urgent: bool = False) -> RevisionRow | None:
        """One revision, or None where it is gone.

        Args:
            urgent: for a caller that must wait for no other query, as the event loop. Only
                such callers may set it: they wait for each other.

        Raises:
            AdapterCorrupt: its row is damaged.
        """
        reader = self._urgent if urgent else self._reader
        rows = reader.rows(
            f"SELECT {COLUMNS} FROM revisions r JOIN names n ON n.name = r.name "
            "WHERE r.name = ? AND r.revision = ?",
            (name, revision),
        )
        if not rows:
            return None
        row = revision_row(rows[0])
        if row is None:
            raise damaged_row(f"{name}@{revision[:12]}")
        return row

    def revisions(self, name: str) -> tuple[RevisionRow, ...]:
        """All revisions of a name, newest first; not those whose row is damaged."""
        rows = self._reader.rows(
            f"SELECT {COLUMNS} FROM revisions r JOIN names n ON n.name = r.name "
            "WHERE r.name = ? ORDER BY r.sequence DESC",
            (name,),
        )
        return revision_rows(rows)

    def page(
        self, prefix: str, labels: Mapping[str, str], after: str, limit: int
    ) -> tuple[RevisionRow, ...]:
        """Current revisions in name order: those of names that start with ``prefix``,
        carry all of ``labels`` and come after ``after``. Damaged rows are left out."""
        pairs = self._rarest_first(labels)
        first, at = "names n", "n"
        if pairs:
            # In the order of the index on labels; SQLite would walk through all names.
            first = "labels l CROSS JOIN names n ON n.name = l.name AND n.current = l.revision"
            at = "l"
        sql = (
            f"SELECT {COLUMNS} FROM {first} CROSS JOIN revisions r ON r.name = n.name "
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
        sql += f" ORDER BY {at}.name LIMIT ?"
        rows = self._reader.rows(sql, [*parameters, limit])
        sound = revision_rows(rows)
        found = tuple(row for row in sound if labels.items() <= row.labels.items())
        if len(found) < len(rows) == limit:  # what is left out must not look like the end
            beyond = self.page(prefix, labels, str(rows[-1][0]), limit - len(found))
            return found + beyond
        return found

    def _rarest_first(self, labels: Mapping[str, str]) -> list[tuple[str, str]]:
        """Pairs of a filter, the one that fewest revisions have in front."""
        if len(labels) < 2:
            return list(labels.items())

        def count(pair: tuple[str, str]) -> int:
            sql = "SELECT 1 FROM labels WHERE key = ? AND value = ? LIMIT ?"
            ((found,),) = self._reader.rows(f"SELECT count(*) FROM ({sql})", (*pair, _FEW))
            return int(found)

        return sorted(labels.items(), key=count)
