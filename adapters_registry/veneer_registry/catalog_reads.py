"""The catalog's queries: names, revisions, aliases, history. See `catalog`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Set
from typing import Any, Final

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
from veneer_registry.database import Reader
from veneer_registry.integrity import row_digest
from veneer_registry.rows import (
    BEGINNINGS,
    ENDS,
    AliasRow,
    HistoryRow,
    NameRow,
    ResidentRow,
    RevisionRow,
    damaged_row,
)

_log = logging.getLogger(__name__)

_FEW: Final = 1000
"""Limit when counting the revisions with each label, to find the rarest label."""

_HEX: Final = re.compile(r"[0-9a-f]{64}")


class CatalogReads:
    """The catalog's queries. Thread-safe; they never wait for a change."""

    _reader: Reader
    _urgent: Reader

    def fact(self, key: str) -> str | None:
        """A fact about the whole catalog; None if it is missing or damaged."""
        for value, digest in self._reader.rows(
            "SELECT value, digest FROM facts WHERE key = ?", [key]
        ):
            if digest == row_digest("facts", key, value):
                return str(value)
        return None

    @property
    def number(self) -> int:
        """Number of the last change."""
        ((number,),) = self._reader.rows("SELECT value FROM counter")
        return int(number)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all revisions; weights shared by several count once."""
        query = "SELECT max(bytes) FROM revisions GROUP BY weights"
        return sum(size for (size,) in self._reader.rows(query))

    @property
    def empty(self) -> bool:
        """Whether the catalog has neither names nor revisions."""
        ((some,),) = self._reader.rows(
            "SELECT EXISTS (SELECT 1 FROM names) OR EXISTS (SELECT 1 FROM revisions)"
        )
        return not some

    def names(self, only: Collection[str] | None = None) -> Iterator[NameRow]:
        """Yield names for the index: all, or only those in ``only``. Names come in order,
        followed by any whose own row is missing or damaged. A damaged row counts towards the
        name that it seems to be about, or towards an empty name."""
        chosen = _among(only)
        aliases, damage = self._aliases(only)
        shared = self._shared(only)
        # Dominates start-up time: tens of thousands of rows, most names with one revision.
        revisions: dict[str, list[tuple[Any, ...]]] = {}
        for row in self._reader.rows(f"SELECT digest, {REVISION} FROM revisions{chosen}", only):  # nosec B608 # names of ours
            if row[0] != row_digest("revisions", *row[1:]):
                damage[sound_name(row[1])] += 1
            elif row[1] in revisions:
                revisions[row[1]].append(row)
            else:
                revisions[row[1]] = [row]
        nothing: list[tuple[Any, ...]] = []
        for row in self._reader.rows(
            "SELECT digest, name, current, generation, retain "  # nosec B608 # names of ours
            f"FROM names{chosen} ORDER BY name",
            only,
        ):
            if row[0] != row_digest("names", *row[1:]):
                damage[sound_name(row[1])] += 1
                continue
            _, name, current, generation, retain = row
            kept = newest_first(revisions.pop(name, nothing))
            also = tuple(aliases.pop(name, ())) if name in aliases else ()
            bad = damage.pop(name, 0) if damage else 0
            open_ = name in shared
            yield NameRow(name, current, generation, kept, retain, also, bad, open_)
        # The rest belongs to names whose own row is damaged or missing.
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
                f"SELECT digest, {columns} FROM {table} WHERE name = ?",  # nosec B608 # names of ours
                (name,),
            ):
                count += digest != row_digest(table, *values)
        return count

    def aliases(self) -> tuple[AliasRow, ...]:
        """Return every alias with an undamaged row, ordered by name and alias."""
        return tuple(alias for group in self._aliases()[0].values() for alias in group)

    def _aliases(
        self, only: Collection[str] | None = None
    ) -> tuple[dict[str, list[AliasRow]], Counter[str]]:
        rows = self._reader.rows(
            f"SELECT * FROM aliases{_among(only)} ORDER BY name, alias",  # nosec B608 # names of ours
            only,
        )
        damage = Counter[str]()
        found: dict[str, list[AliasRow]] = {}
        for each in rows:
            if (row := alias_row(each)) is None:
                damage[sound_name(each[0])] += 1
            else:
                found.setdefault(row.name, []).append(row)
        return found, damage

    def _shared(self, only: Collection[str] | None = None) -> set[str]:
        """Names that other tenants may use. A damaged row shares nothing."""
        rows = self._reader.rows(f"SELECT name, digest FROM shared{_among(only)}", only)  # nosec B608 # names of ours
        found = {name for name, digest in rows if digest == row_digest("shared", name)}
        if len(found) < len(rows):
            lost = len(rows) - len(found)
            _log.error("rows of %d shared names are damaged: share them again", lost)
        return found

    def quarantined(self) -> dict[str, str]:
        """Weights digest -> why it is damaged."""
        return dict(self._reader.rows("SELECT weights, why FROM quarantine", ()))

    def file(self, sha256: str) -> tuple[str, str] | None:
        """(digest of the folder, file name) of stored content with this SHA-256."""
        rows = self._reader.rows("SELECT digest, file FROM files WHERE sha256 = ?", (sha256,))
        return (rows[0][0], rows[0][1]) if rows else None

    def residents(self) -> tuple[ResidentRow, ...]:
        """The resident adapters as last recorded, most recently used first."""
        rows = self._reader.rows("SELECT weights, tier, pin FROM residents ORDER BY place", ())
        return tuple(ResidentRow(*row) for row in rows)

    def history(self, name: str, before: int | None, limit: int) -> tuple[HistoryRow, ...]:
        """History of a name (of all names if empty), newest first; only lines older than
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
            "SELECT sequence, time, name, event, revision, actor, peer, detail, digest "  # nosec B608 # names of ours
            f"FROM history WHERE {' AND '.join(where)} ORDER BY sequence DESC LIMIT ?",
            [*parameters, limit],
        )
        return tuple(history_row(row) for row in rows)

    def vanished(self, revisions: Set[str]) -> set[str]:
        """Return those of ``revisions`` (none of them is in a row) that should have a row: the
        history records that they were published, and not that they ended."""
        last: dict[tuple[str, str], str] = {}
        events = ", ".join(f"'{event}'" for event in (*ENDS, *BEGINNINGS))
        for name, revision, event in self._reader.rows(
            "SELECT name, revision, event FROM history "  # nosec B608 # names of ours
            f"WHERE event IN ({events}) ORDER BY sequence"
        ):
            if revision in revisions:
                last[name, revision] = event
        return {revision for (_, revision), event in last.items() if event in BEGINNINGS}

    def revisions_of(self, name: str) -> set[str]:
        """Return all revisions of a name, including those in damaged rows and those that were
        published and have not ended according to the history."""
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
        """One revision, or None if it is gone.

        Args:
            urgent: for callers such as the event loop that must not wait for other queries.
                Only they may set it, since urgent queries wait for each other.

        Raises:
            AdapterCorrupt: its row is damaged.
        """
        reader = self._urgent if urgent else self._reader
        rows = reader.rows(
            f"SELECT {COLUMNS} FROM revisions r JOIN names n ON n.name = r.name "  # nosec B608 # names of ours
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
        """Return all revisions of a name that have an undamaged row, newest first."""
        rows = self._reader.rows(
            f"SELECT {COLUMNS} FROM revisions r JOIN names n ON n.name = r.name "  # nosec B608 # names of ours
            "WHERE r.name = ? ORDER BY r.sequence DESC",
            (name,),
        )
        return revision_rows(rows)

    def page(
        self, prefix: str, labels: Mapping[str, str], after: str, limit: int
    ) -> tuple[RevisionRow, ...]:
        """Return up to ``limit`` current revisions that carry all of ``labels``, in name order,
        for names that start with ``prefix`` and come after ``after``. Damaged rows are left
        out."""
        pairs = self._rarest_first(labels)
        first, at = "names n", "n"
        if pairs:
            # CROSS JOIN fixes the order: start with the labels' index, since SQLite by itself
            # would scan all names.
            first = "labels l CROSS JOIN names n ON n.name = l.name AND n.current = l.revision"
            at = "l"
        sql = (
            f"SELECT {COLUMNS} FROM {first} CROSS JOIN revisions r ON r.name = n.name "  # nosec B608 # names of ours
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
        if len(found) < len(rows) == limit:  # a short page would mean the end
            beyond = self.page(prefix, labels, str(rows[-1][0]), limit - len(found))
            return found + beyond
        return found

    def _rarest_first(self, labels: Mapping[str, str]) -> list[tuple[str, str]]:
        """Return the filter's pairs, the one that the fewest revisions have first."""
        if len(labels) < 2:
            return list(labels.items())

        def count(pair: tuple[str, str]) -> int:
            sql = "SELECT 1 FROM labels WHERE key = ? AND value = ? LIMIT ?"
            ((found,),) = self._reader.rows(f"SELECT count(*) FROM ({sql})", (*pair, _FEW))  # nosec B608 # names of ours
            return int(found)

        return sorted(labels.items(), key=count)


def _among(names: Collection[str] | None) -> str:
    """SQL condition for rows with these names, which are its parameters; "" if None."""
    return "" if names is None else f" WHERE name IN ({', '.join('?' * len(names))})"
