"""The local copy of the shared catalog: finds the rows that a change touched, and applies rows
from other registries."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from veneer_registry.shared.tables import TABLES

Key = tuple[Any, ...]
Rows = Mapping[str, Sequence[tuple[Any, ...]]]
"""Table -> rows, or table -> keys."""

_WIDEST: Final = max(len(table.key) for table in TABLES)


def capture(connection: sqlite3.Connection) -> None:
    """Record the key of every row that this connection changes, including by a cascade."""
    keys = ", ".join(f"k{n}" for n in range(_WIDEST))
    connection.execute(f"CREATE TEMP TABLE touched (tbl, {keys})")
    for table in TABLES:
        for event, sides in (
            ("INSERT", ("NEW",)),
            ("DELETE", ("OLD",)),
            ("UPDATE", ("OLD", "NEW")),
        ):
            inserts = "".join(
                "INSERT INTO touched VALUES ("  # nosec B608 # names of ours
                + ", ".join(
                    [
                        f"'{table.name}'",
                        *(f"{side}.{column}" for column in table.key),
                        *["NULL"] * (_WIDEST - len(table.key)),
                    ]
                )
                + "); "
                for side in sides
            )
            connection.execute(
                f"CREATE TEMP TRIGGER touched_{table.name}_{event} AFTER {event} "  # nosec B608 # names of ours
                f"ON main.{table.name} BEGIN {inserts} END"
            )


def begin(connection: sqlite3.Connection) -> None:
    """Clear the recorded keys."""
    connection.execute("DELETE FROM temp.touched")


def touched(connection: sqlite3.Connection) -> dict[str, list[Key]]:
    """Table -> keys of the rows that were changed since `begin`."""
    width = {table.name: len(table.key) for table in TABLES}
    found: dict[str, list[Key]] = {}
    for name, *key in connection.execute("SELECT DISTINCT * FROM temp.touched"):
        found.setdefault(name, []).append(tuple(key[: width[name]]))
    return found


def values(connection: sqlite3.Connection, keys: Rows) -> tuple[Rows, Rows]:
    """Look up these keys. Return (rows that exist, keys without a row)."""
    there: dict[str, list[tuple[Any, ...]]] = {}
    gone: dict[str, list[Key]] = {}
    for table in TABLES:
        where = " AND ".join(f"{column} = ?" for column in table.key)
        sql = f"SELECT {', '.join(table.columns)} FROM {table.name} WHERE {where}"  # nosec B608 # names of ours
        for key in keys.get(table.name, ()):
            row = connection.execute(sql, key).fetchone()
            if row is None:
                gone.setdefault(table.name, []).append(tuple(key))
            else:
                there.setdefault(table.name, []).append(row)
    return there, gone


def apply(connection: sqlite3.Connection, there: Rows, gone: Rows) -> None:
    """Write the rows ``there``, and delete those with the keys ``gone``."""
    for table in reversed(TABLES):
        connection.executemany(table.delete("?"), gone.get(table.name, ()))
    for table in TABLES:
        connection.executemany(table.upsert("?"), there.get(table.name, ()))


def empty(connection: sqlite3.Connection, kept: Iterable[str] = ()) -> None:
    """Delete all rows, except those of the tables ``kept``."""
    for table in reversed(TABLES):
        if table.name not in kept:
            connection.execute(f"DELETE FROM {table.name}")  # nosec B608 # names of ours
