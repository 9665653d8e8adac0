"""A transaction of the catalog, and the changes that it may make: all or none."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from veneer_registry.errors import AdapterCorrupt
from veneer_registry.integrity import row_digest, text_digest
from veneer_registry.rows import (
    AliasRow,
    HistoryRow,
    RevisionRow,
    Who,
    damaged_row,
)
from veneer_registry.strict_json import canonical_json

_DETAIL: Final = 500
"""Most characters of a history line's detail."""
_LINES: Final = 1000
"""History lines kept for each name."""


class Change:
    """One transaction of the catalog. Made by `Catalog.change`, and valid inside its block.

    Attributes:
        number: larger than that of any earlier change, even across deletions. It becomes the
            generation of each name and alias that is changed.
    """

    def __init__(
        self, connection: sqlite3.Connection, number: int, who: Who, time: float
    ) -> None:
        """``time`` is Unix seconds, for history and aliases."""
        self.number = number
        self._db = connection
        self._who = who
        self._time = time

    # ------------------------------------------------------------------- revisions

    def publish(self, row: RevisionRow) -> None:
        """Make ``row`` the newest and the current revision of its name. A damaged row of the
        name is rewritten."""
        retain = None
        with contextlib.suppress(AdapterCorrupt):
            self._check_name(row.name)
            sql = "SELECT retain FROM names WHERE name = ?"
            (retain,) = self._db.execute(sql, (row.name,)).fetchone() or (None,)
        self.put_name(row.name, row.revision, self.number, retain)
        self.put_revision(row, self.number)

    def put_name(
        self, name: str, current: str | None, generation: int, retain: int | None
    ) -> None:
        """Insert or replace a name's row."""
        self._db.execute(
            "INSERT INTO names (name, current, generation, retain, digest) "
            "VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
            "current = excluded.current, generation = excluded.generation, "
            "retain = excluded.retain, digest = excluded.digest",
            (
                name,
                current,
                generation,
                retain,
                row_digest("names", name, current, generation, retain),
            ),
        )

    def put_revision(self, row: RevisionRow, sequence: int) -> None:
        """Insert or replace a revision's row. Its name must exist."""
        self.forget(row.name, [row.revision])
        values = (
            row.name,
            row.revision,
            row.weights,
            row.base,
            float(row.created),
            canonical_json(dict(row.labels)).decode(),
            row.bytes,
            sequence,
            text_digest(row.manifest),
        )
        self._db.execute(
            "INSERT INTO revisions (name, revision, weights, base, created, labels, bytes, "
            "sequence, manifest_sha256, digest, manifest) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, row_digest("revisions", *values), row.manifest),
        )
        self._add_labels(row.name, row.revision, row.labels)

    def make_current(self, name: str, revision: str) -> None:
        """Make one of a name's revisions the current one."""
        self._update_name(name, "current = ?", revision)

    def _update_name(self, name: str, assignment: str, *values: object) -> None:
        """Change a name's row and give it this change's number as its generation. A damaged
        row is refused: a new digest would make it look intact."""
        self._check_name(name)
        self._db.execute(
            f"UPDATE names SET {assignment}, generation = ? WHERE name = ?",  # nosec B608 # names of ours
            (*values, self.number, name),
        )
        self._db.execute(
            "UPDATE names SET digest = row_digest('names', name, current, generation, retain) "
            "WHERE name = ?",
            (name,),
        )

    def _check_name(self, name: str) -> None:
        (intact,) = self._db.execute(
            "SELECT count(*) FILTER (WHERE digest IS NOT row_digest('names', name, current, "
            "generation, retain)) = 0 FROM names WHERE name = ?",
            (name,),
        ).fetchone()
        if not intact:
            raise damaged_row(name)

    def delete_name(self, name: str) -> None:
        """Forget a name with its revisions and aliases."""
        # Not left to ON DELETE CASCADE: the name's own row may be damaged.
        for table in ("labels", "aliases", "revisions", "shared", "names"):
            self._db.execute(f"DELETE FROM {table} WHERE name = ?", (name,))  # nosec B608 # names of ours

    def delete_revisions(self, name: str, revisions: Sequence[str]) -> None:
        """Forget some revisions of a name. If the current one is among them, the name is left
        without one."""
        self.forget(name, revisions)
        self._update_name(
            name,
            "current = (SELECT revision FROM revisions r "
            "WHERE r.name = names.name AND r.revision = names.current)",
        )

    def forget(self, name: str, revisions: Iterable[str]) -> None:
        """Forget revisions that are not current; the name's generation stays."""
        self._db.executemany(
            "DELETE FROM revisions WHERE name = ? AND revision = ?",
            [(name, revision) for revision in revisions],
        )

    # ------------------------------------------------------------ labels, retention

    def set_labels(self, name: str, revision: str, labels: Mapping[str, str]) -> None:
        """Replace a revision's labels. The caller has just read its row, and it is
        undamaged."""
        self._db.execute(
            "UPDATE revisions SET labels = ?1, digest = row_digest('revisions', name, "
            "revision, weights, base, created, ?1, bytes, sequence, manifest_sha256) "
            "WHERE name = ?2 AND revision = ?3",
            (canonical_json(dict(labels)).decode(), name, revision),
        )
        self._db.execute("DELETE FROM labels WHERE name = ? AND revision = ?", (name, revision))
        self._add_labels(name, revision, labels)
        self.touch(name)

    def set_base(self, row: RevisionRow, base: str) -> None:
        """Record that the revision was checked against this base."""
        self._db.execute(
            "UPDATE revisions SET base = ?1, digest = row_digest('revisions', name, revision, "
            "weights, ?1, created, labels, bytes, sequence, manifest_sha256) "
            "WHERE name = ?2 AND revision = ?3",
            (base, row.name, row.revision),
        )

    def _add_labels(self, name: str, revision: str, labels: Mapping[str, str]) -> None:
        self._db.executemany(
            "INSERT INTO labels VALUES (?, ?, ?, ?)",
            [(name, revision, key, value) for key, value in labels.items()],
        )

    def restore_labels(self, rows: str) -> None:
        """Refill the labels table from this query."""
        self._db.execute("DELETE FROM labels")
        # A damaged database or row may have a key twice.
        self._db.execute(f"INSERT OR IGNORE INTO labels {rows}")

    def set_retain(self, name: str, retain: int) -> None:
        """Set how many superseded revisions a name keeps."""
        self._update_name(name, "retain = ?", retain)

    def set_shared(self, name: str, shared: bool) -> None:
        """Set whether other tenants may use a name."""
        self._db.execute("DELETE FROM shared WHERE name = ?", (name,))
        if shared:
            self.share(name)
        self.touch(name)

    def share(self, name: str) -> None:
        """Let other tenants use a name that is not shared. Its generation stays."""
        self._db.execute("INSERT INTO shared VALUES (?, ?)", (name, row_digest("shared", name)))

    def touch(self, name: str) -> None:
        """Give a name this change's number as its generation."""
        self._update_name(name, "generation = generation")

    # ---------------------------------------------------------------------- aliases

    def set_alias(self, row: AliasRow) -> None:
        """Create or move an alias."""
        values = (
            row.name,
            row.alias,
            _pairs(row.targets),
            _pairs(row.previous),
            row.generation,
            float(row.updated),
        )
        self._db.execute(
            "INSERT OR REPLACE INTO aliases "
            "(name, alias, targets, previous, generation, updated, digest) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*values, row_digest("aliases", *values)),
        )

    def remove_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        self._db.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (name, alias))

    # ---------------------------------------------------------------------- content

    def quarantine(self, weights: str, why: str) -> None:
        """Record that stored weights are damaged."""
        self._db.execute(
            "INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?)", (weights, self._time, why)
        )
        self.forget_files([weights])

    def release(self, weights: str) -> bool:
        """Delete the record that weights are in quarantine. Return True if there was one."""
        return (
            self._db.execute("DELETE FROM quarantine WHERE weights = ?", (weights,)).rowcount
            > 0
        )

    def add_files(self, digest: str, files: Mapping[str, str]) -> None:
        """Record stored content: file name -> SHA-256, in the folder of ``digest``."""
        self._db.executemany(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
            [(sha256, digest, name) for name, sha256 in files.items()],
        )

    def forget_files(self, digests: Iterable[str]) -> None:
        """Forget the content of these folders."""
        self._db.executemany(
            "DELETE FROM files WHERE digest = ?", [(digest,) for digest in digests]
        )

    # ---------------------------------------------------------------------- history

    def note(self, event: str, name: str, revision: str = "", detail: str = "") -> None:
        """Add a line to the history."""
        who = self._who
        self.add_line(HistoryRow(0, self._time, name, event, revision, who, detail[:_DETAIL]))
        self._db.execute(
            "DELETE FROM history WHERE name = ?1 AND sequence <= (SELECT sequence FROM history "
            "WHERE name = ?1 ORDER BY sequence DESC LIMIT 1 OFFSET ?2)",
            (name, _LINES),
        )

    def add_line(self, line: HistoryRow) -> None:
        """Add a line unchanged except for its sequence."""
        values = (
            float(line.time),
            line.name,
            line.event,
            line.revision,
            line.who.actor,
            line.who.peer,
            line.detail,
        )
        self._db.execute(
            "INSERT INTO history (time, name, event, revision, actor, peer, detail, digest) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, row_digest("history", *values)),
        )

    # ------------------------------------------------------------------------ facts

    def set_fact(self, key: str, value: str) -> None:
        """Set a fact about the whole catalog; see `Catalog.fact`."""
        self._db.execute(
            "INSERT OR REPLACE INTO facts VALUES (?, ?, ?)",
            (key, value, row_digest("facts", key, value)),
        )

    def raise_counter(self, least: int) -> None:
        """Make the numbers of later changes larger than ``least``."""
        self._db.execute("UPDATE counter SET value = max(value, ?)", (least,))


def _pairs(targets: Sequence[tuple[str, int]]) -> str:
    return canonical_json([list(target) for target in targets]).decode()
