"""Reads what can still be read of a damaged catalog. It never writes to that catalog."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from veneer_registry.adapter import check_name
from veneer_registry.errors import VeneerError
from veneer_registry.integrity import row_digest, text_digest
from veneer_registry.manifest_json import manifest_from_json
from veneer_registry.pairing import STORE_FACT, Survey
from veneer_registry.rows import (
    BEGINNINGS,
    ENDS,
    AliasRow,
    HistoryRow,
    ResidentRow,
    RevisionRow,
    Who,
)
from veneer_registry.schema import VERSION, version_of

_log = logging.getLogger(__name__)

_DIGESTS: Final = 4
"""The first version whose rows have digests; rows of older versions are trusted."""
_SHARED: Final = 5
"""The first version in which names may be shared."""


@dataclass(frozen=True, slots=True)
class SalvagedName:
    """A row of the names table."""

    current: str | None
    generation: int
    retain: int | None
    shared: bool = False


@dataclass(slots=True)
class Salvaged:
    """The undamaged part of a catalog.

    Attributes:
        whole: the catalog exists, belongs to the store, and passes SQLite's checks. It may
            be of an older version, which the next start upgrades.
        damaged: number of rows that are damaged or could not be read.
        behind: it lacks changes that the store has recorded.
        begun: (name, revision) that were published and kept, according to the history.
        ended: (name, revision) that were deleted or superseded, according to the history.
        sequences: (name, revision) -> order of publishing.
    """

    whole: bool = False
    behind: bool = False
    damaged: int = 0
    number: int = 0
    names: dict[str, SalvagedName] = field(default_factory=dict)
    rows: dict[tuple[str, str], RevisionRow] = field(default_factory=dict)
    sequences: dict[tuple[str, str], int] = field(default_factory=dict)
    aliases: list[AliasRow] = field(default_factory=list)
    history: list[HistoryRow] = field(default_factory=list)
    begun: set[tuple[str, str]] = field(default_factory=set)
    ended: set[tuple[str, str]] = field(default_factory=set)
    quarantined: dict[str, str] = field(default_factory=dict)
    residents: list[ResidentRow] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing in the catalog is damaged or missing."""
        return self.whole and not self.behind and not self.damaged

    def misses(self, name: str, revision: str) -> bool:
        """Whether a revision without a row should have one. For a healthy catalog the history
        must say so: a revision that it never recorded was never acknowledged."""
        if self.healthy:
            return (name, revision) in self.begun
        return (name, revision) not in self.ended

    def sequence(self, row: RevisionRow) -> float:
        """Order of publishing; infinity for a revision that the catalog did not have."""
        return self.sequences.get((row.name, row.revision), float("inf"))


def salvage(path: Path, found: Survey) -> Salvaged:
    """Read as much of a catalog as possible; nothing if it belongs to another store."""
    old = Salvaged()
    if not path.exists() or path.stat().st_size == 0:
        return old
    try:
        uri = f"file:{quote(str(path))}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as db:
            db.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
            version = version_of(db, path)
            if not 1 <= version <= VERSION:
                _log.warning("%s has schema %s; it is ignored", path, version)
                return old
            reader = _Reader(db, old, version)
            own = reader.store_id()
            if own is not None and found.id is not None and own != found.id:
                _log.warning("%s was made for another store; it is ignored", path)
                return old
            reader.read()
            old.whole = not any(
                line != ("ok",) for line in db.execute("PRAGMA integrity_check")
            )
    except (sqlite3.Error, UnicodeDecodeError, VeneerError) as error:
        _log.warning("%s can be read only in part: %s", path, error)
        old.whole = False
    old.behind = found.changes is not None and found.changes > old.number
    return old


class _Reader:
    def __init__(self, db: sqlite3.Connection, old: Salvaged, version: int) -> None:
        self._db = db
        self._old = old
        self._checked = version >= _DIGESTS
        self._first = version == 1
        self._shares = version >= _SHARED

    def store_id(self) -> str | None:
        for key, value in self._rows("facts", "key, value") if self._checked else ():
            if key == STORE_FACT:
                return str(value)
        return None

    def read(self) -> None:
        old = self._old
        for (number,) in self._plain("SELECT value FROM counter"):
            old.number = int(number) if isinstance(number, int) else 0
        shared = {name for (name,) in self._rows("shared", "name")} if self._shares else set()
        retained = "NULL" if self._first else "retain"
        for name, current, generation, retain in self._rows(
            "names", f"name, current, generation, {retained}"
        ):
            with self._sound():
                old.names[check_name(name)] = SalvagedName(
                    current, generation, retain, name in shared
                )
        self._revisions()
        if self._first:
            return
        for name, alias, targets, previous, generation, updated in self._rows(
            "aliases", "name, alias, targets, previous, generation, updated"
        ):
            with self._sound():
                pairs = [tuple((r, w) for r, w in json.loads(t)) for t in (targets, previous)]
                old.aliases.append(
                    AliasRow(check_name(name), alias, pairs[0], pairs[1], generation, updated)
                )
        for time, name, event, revision, actor, peer, detail in self._rows(
            "history", "time, name, event, revision, actor, peer, detail", " ORDER BY sequence"
        ):
            old.history.append(
                HistoryRow(0, time, name, event, revision, Who(actor, peer), detail)
            )
            if event in ENDS:
                old.ended.add((name, revision))
                old.begun.discard((name, revision))
            elif event in BEGINNINGS:
                old.begun.add((name, revision))
                old.ended.discard((name, revision))
        for weights, why in self._plain("SELECT weights, why FROM quarantine"):
            old.quarantined[weights] = why
        for row in self._plain("SELECT weights, tier, pin FROM residents ORDER BY place"):
            old.residents.append(ResidentRow(*row))

    def _revisions(self) -> None:
        columns = "name, revision, weights, base, created, labels, bytes, sequence"
        sha = "manifest_sha256" if self._checked else "'-'"
        for *values, expected, manifest in self._rows(
            "revisions", f"{columns}, {sha}", manifest=True
        ):
            name, revision, weights, base, created, labels, size, sequence = values
            if self._checked and text_digest(manifest) != expected:
                self._old.damaged += 1
                continue
            with self._sound():
                manifest_from_json(manifest)
                row = RevisionRow(
                    check_name(name),
                    revision,
                    weights,
                    base,
                    manifest,
                    created,
                    labels=json.loads(labels),
                    bytes=size,
                )
                self._old.rows[name, revision] = row
                self._old.sequences[name, revision] = sequence

    @contextlib.contextmanager
    def _sound(self) -> Iterator[None]:
        """Count a row whose values have wrong types as damaged."""
        try:
            yield
        except (ValueError, TypeError, KeyError, VeneerError):
            self._old.damaged += 1

    def _rows(
        self, table: str, columns: str, order: str = "", *, manifest: bool = False
    ) -> Iterator[list[Any]]:
        """Yield the rows of a table that match their digest. Count the others as damaged."""
        more = ", manifest" if manifest else ""
        digest = "digest" if self._checked else "''"
        sql = f"SELECT {columns}, {digest}{more} FROM {table}{order}"  # nosec B608 # names of ours
        for row in self._plain(sql):
            values = list(row[: -2 if manifest else -1])
            if self._checked and row[len(values)] != row_digest(table, *values):
                self._old.damaged += 1
                continue
            yield [*values, row[-1]] if manifest else values

    def _plain(self, sql: str) -> Iterator[tuple[Any, ...]]:
        """Yield the rows that SQLite can read."""
        try:
            yield from self._db.execute(sql)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            _log.warning("the catalog is damaged (%s): %s", sql.partition(" FROM ")[2], error)
            self._old.damaged += 1
            self._old.whole = False
