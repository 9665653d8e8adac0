"""What one transaction of the catalog may do; all of it happens, or nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from veneer_registry.rows import AliasRow, ResidentRow, RevisionRow, Who
from veneer_registry.strict_json import canonical_json

__all__ = ["Change"]

_DETAIL: Final = 500
"""Characters of a history line's detail."""
_LINES: Final = 1000
"""History lines kept of each name."""


class Change:
    """Made by `Catalog.change`, and valid inside it.

    Attributes:
        number: larger than that of any change before, also over deletions. Names and
            aliases that are changed get it as their generation.
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
        """Make ``row`` the newest revision of its name, and the current one."""
        self._db.execute(
            "INSERT INTO names (name, current, generation) VALUES (?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE "
            "SET current = excluded.current, generation = excluded.generation",
            (row.name, row.revision, self.number),
        )
        self.forget(row.name, [row.revision])
        self._db.execute(
            "INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(row.name, row.revision, row.weights, row.base, row.manifest, row.created),
                *(canonical_json(dict(row.labels)).decode(), row.bytes, self.number),
            ),
        )
        self._add_labels(row.name, row.revision, row.labels)

    def make_current(self, name: str, revision: str) -> None:
        """Let a name mean one of its revisions."""
        self._db.execute(
            "UPDATE names SET current = ?, generation = ? WHERE name = ?",
            (revision, self.number, name),
        )

    def delete_name(self, name: str) -> None:
        """Forget a name with its revisions and aliases."""
        self._db.execute("DELETE FROM names WHERE name = ?", (name,))

    def delete_revisions(self, name: str, revisions: Sequence[str]) -> None:
        """Forget some revisions of a name, which stays without a current one if that
        was among them."""
        self.forget(name, revisions)
        self._db.execute(
            "UPDATE names SET generation = ?, current = (SELECT revision FROM revisions r "
            "WHERE r.name = names.name AND r.revision = names.current) WHERE name = ?",
            (self.number, name),
        )

    def forget(self, name: str, revisions: Iterable[str]) -> None:
        """Forget revisions that are not current; the generation stays."""
        self._db.executemany(
            "DELETE FROM revisions WHERE name = ? AND revision = ?",
            [(name, revision) for revision in revisions],
        )

    # ------------------------------------------------------------ labels, retention

    def set_labels(self, name: str, revision: str, labels: Mapping[str, str]) -> None:
        """Give a revision these labels, and no others."""
        self._db.execute(
            "UPDATE revisions SET labels = ? WHERE name = ? AND revision = ?",
            (canonical_json(dict(labels)).decode(), name, revision),
        )
        self._db.execute("DELETE FROM labels WHERE name = ? AND revision = ?", (name, revision))
        self._add_labels(name, revision, labels)
        self.touch(name)

    def _add_labels(self, name: str, revision: str, labels: Mapping[str, str]) -> None:
        self._db.executemany(
            "INSERT INTO labels VALUES (?, ?, ?, ?)",
            [(name, revision, key, value) for key, value in labels.items()],
        )

    def set_retain(self, name: str, retain: int) -> None:
        """How many superseded revisions a name keeps."""
        self._db.execute("UPDATE names SET retain = ? WHERE name = ?", (retain, name))
        self.touch(name)

    def touch(self, name: str) -> None:
        """Give a name this change's number as its generation."""
        self._db.execute("UPDATE names SET generation = ? WHERE name = ?", (self.number, name))

    # ---------------------------------------------------------------------- aliases

    def set_alias(self, row: AliasRow) -> None:
        """Make or move an alias."""
        self._db.execute(
            "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(row.name, row.alias, _pairs(row.targets), _pairs(row.previous)),
                *(row.generation, row.updated),
            ),
        )

    def remove_alias(self, name: str, alias: str) -> None:
        """End an alias."""
        self._db.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (name, alias))

    # ---------------------------------------------------------------------- content

    def quarantine(self, weights: str, why: str) -> None:
        """Note that stored weights are damaged."""
        self._db.execute(
            "INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?)", (weights, self._time, why)
        )
        self.forget_files([weights])

    def release(self, weights: str) -> bool:
        """The weights are whole (again). True if they were in quarantine."""
        return (
            self._db.execute("DELETE FROM quarantine WHERE weights = ?", (weights,)).rowcount
            > 0
        )

    def add_files(self, digest: str, files: Mapping[str, str]) -> None:
        """Note where content lies: file name -> SHA-256, in the folder of ``digest``."""
        self._db.executemany(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
            [(sha256, digest, name) for name, sha256 in files.items()],
        )

    def forget_files(self, digests: Iterable[str]) -> None:
        """The content of these folders is gone."""
        self._db.executemany(
            "DELETE FROM files WHERE digest = ?", [(digest,) for digest in digests]
        )

    def set_residents(self, residents: Sequence[ResidentRow]) -> None:
        """What is in memory now, most recently used first."""
        self._db.execute("DELETE FROM residents")
        self._db.executemany(
            "INSERT INTO residents VALUES (?, ?, ?, ?)",
            [(place, r.weights, r.tier, r.pin) for place, r in enumerate(residents)],
        )

    # ---------------------------------------------------------------------- history

    def note(self, event: str, name: str, revision: str = "", detail: str = "") -> None:
        """Add a line to the history."""
        self._db.execute(
            "INSERT INTO history (time, name, event, revision, actor, peer, detail) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                *(self._time, name, event, revision, self._who.actor, self._who.peer),
                detail[:_DETAIL],
            ),
        )
        self._db.execute(
            "DELETE FROM history WHERE name = ?1 AND sequence <= (SELECT sequence FROM history "
            "WHERE name = ?1 ORDER BY sequence DESC LIMIT 1 OFFSET ?2)",
            (name, _LINES),
        )


def _pairs(targets: Sequence[tuple[str, int]]) -> str:
    return canonical_json([list(target) for target in targets]).decode()
