"""Reads rows of the catalog and leaves out damaged ones, whose digest does not match."""

from __future__ import annotations

import json
import logging
import operator
from typing import Any, Final

from veneer_registry.adapter import check_name
from veneer_registry.errors import InvalidField
from veneer_registry.integrity import row_digest, text_digest
from veneer_registry.rows import SERVER, AliasRow, HistoryRow, RevisionRow, Who

_log = logging.getLogger(__name__)

REVISION: Final = (
    "name, revision, weights, base, created, labels, bytes, sequence, manifest_sha256"
)
"""The columns that a revision's digest covers, in that order."""
COLUMNS: Final = (
    ", ".join(f"r.{column}" for column in REVISION.split(", "))
    + ", r.digest, r.manifest, n.current IS r.revision, n.generation"
)
"""The columns that `revision_row` reads, of a revision ``r`` and its name ``n``."""

_sequence: Final = operator.itemgetter(8)


def newest_first(rows: list[tuple[Any, ...]]) -> tuple[tuple[str, str, str], ...]:
    """Return (revision, weights, base) of each row, newest first. A row has the digest and then
    the columns of `REVISION`. Sorts ``rows`` in place."""
    if len(rows) > 1:
        rows.sort(key=_sequence, reverse=True)
    return tuple([(row[2], row[3], row[4]) for row in rows])


def revision_rows(rows: list[tuple[Any, ...]]) -> tuple[RevisionRow, ...]:
    """Parse rows of `COLUMNS`. Damaged ones are logged and left out."""
    found = tuple(row for row in map(revision_row, rows) if row is not None)
    if len(found) < len(rows):
        _log.error(
            "skipped %d damaged catalog rows in a listing; stop the server and run "
            "`veneer-server store recover`",
            len(rows) - len(found),
        )
    return found


def revision_row(row: tuple[Any, ...]) -> RevisionRow | None:
    """Parse a row of `COLUMNS`; None if it is damaged."""
    *values, digest, manifest, current, generation = row
    if digest != row_digest("revisions", *values) or values[-1] != text_digest(manifest):
        return None
    name, revision, weights, base, created, labels, size, _, _ = values
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


def history_row(row: tuple[Any, ...]) -> HistoryRow:
    """Parse a line of the history. A damaged line keeps its number and says that it is
    damaged."""
    number, *values, digest = row
    if digest != row_digest("history", *values):
        return HistoryRow(number, 0.0, "", "damaged", "", SERVER, "this line is damaged")
    time, name, event, revision, actor, peer, detail = values
    return HistoryRow(number, time, name, event, revision, Who(actor, peer), detail)


def alias_row(row: tuple[Any, ...]) -> AliasRow | None:
    """Parse a row of the aliases table (all columns); None if it is damaged."""
    *values, digest = row
    if digest != row_digest("aliases", *values):
        return None
    name, alias, targets, previous, generation, updated = values
    return AliasRow(name, alias, _targets(targets), _targets(previous), generation, updated)


def _targets(text: str) -> tuple[tuple[str, int], ...]:
    return tuple((revision, weight) for revision, weight in json.loads(text))


def sound_name(value: object) -> str:
    """Return the name in a possibly damaged row, or "" if no adapter can have that name."""
    try:
        return check_name(value) if isinstance(value, str) else ""
    except InvalidField:
        return ""
