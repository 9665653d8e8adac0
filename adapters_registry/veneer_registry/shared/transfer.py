"""Moves rows between PostgreSQL and the local copy."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from veneer_registry.rows import ResidentRow
from veneer_registry.shared import mirror
from veneer_registry.shared.postgres import Connection, execute_many
from veneer_registry.shared.tables import TABLES


def keys_of(touched: Iterable[dict[str, Any]]) -> dict[str, set[mirror.Key]]:
    """Merge the keys that several changes touched: table -> keys."""
    keys: dict[str, set[mirror.Key]] = {}
    for each in touched:
        for table, found in each.items():
            keys.setdefault(table, set()).update(map(tuple, found))
    return keys


def read_rows(connection: Connection, keys: dict[str, set[mirror.Key]]) -> dict[str, list[Any]]:
    """Read the rows with these keys; keys without a row are skipped."""
    found: dict[str, list[Any]] = {}
    for table in TABLES:
        if wanted := sorted(keys.get(table.name, ())):
            columns = [list(column) for column in zip(*wanted, strict=True)]
            found[table.name] = connection.execute(table.chosen(), columns).fetchall()
    return found


def write_rows(connection: Connection, there: mirror.Rows, gone: mirror.Rows) -> None:
    for table in reversed(TABLES):
        execute_many(connection, table.delete("%s"), gone.get(table.name, ()))
    for table in TABLES:
        execute_many(connection, table.upsert("%s"), there.get(table.name, ()))


def residents_of(path: Path) -> Sequence[ResidentRow]:
    """Weights that the last run had in memory. Only the local copy records them."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT weights, tier, pin FROM residents ORDER BY place").fetchall()
        return [ResidentRow(*row) for row in rows]
    return []
