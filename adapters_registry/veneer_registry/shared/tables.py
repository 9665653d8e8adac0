"""The catalog's tables in PostgreSQL: those of `schema`, and a log of changes.

Text is compared by its bytes (``COLLATE "C"``), as SQLite does. Rows carry the same digests.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, LiteralString

from psycopg import sql

from veneer_registry.errors import FailedPrecondition
from veneer_registry.shared.postgres import Connection

VERSION: Final = 1
KEPT_CHANGES: Final = 10_000
"""Changes in the log. A registry that was away for longer reads the whole catalog again."""

_TABLES: Final[LiteralString] = """
CREATE TABLE meta (version INTEGER NOT NULL, incarnation TEXT NOT NULL);
CREATE TABLE counter (value BIGINT NOT NULL);
INSERT INTO counter VALUES (0);
CREATE TABLE changes (             -- what each change touched, for the other registries
    number BIGINT PRIMARY KEY,
    token TEXT NOT NULL,           -- random: tells a restored backup that went on differently
    time TIMESTAMPTZ NOT NULL DEFAULT now(),
    touched JSONB NOT NULL         -- {table: [key, ...]}
);
CREATE TABLE names (
    name TEXT COLLATE "C" PRIMARY KEY,
    current TEXT COLLATE "C",
    generation BIGINT NOT NULL,
    retain BIGINT,
    digest TEXT COLLATE "C" NOT NULL
);
CREATE TABLE revisions (
    name TEXT COLLATE "C" NOT NULL REFERENCES names DEFERRABLE INITIALLY DEFERRED,
    revision TEXT COLLATE "C" NOT NULL,
    weights TEXT COLLATE "C" NOT NULL,
    base TEXT COLLATE "C" NOT NULL,
    created DOUBLE PRECISION NOT NULL,
    labels TEXT COLLATE "C" NOT NULL,
    bytes BIGINT NOT NULL,
    sequence BIGINT NOT NULL,
    manifest_sha256 TEXT COLLATE "C" NOT NULL,
    digest TEXT COLLATE "C" NOT NULL,
    manifest TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (name, revision)
);
CREATE TABLE labels (
    name TEXT COLLATE "C" NOT NULL,
    revision TEXT COLLATE "C" NOT NULL,
    key TEXT COLLATE "C" NOT NULL,
    value TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (name, revision, key),
    FOREIGN KEY (name, revision) REFERENCES revisions DEFERRABLE INITIALLY DEFERRED
);
CREATE INDEX labels_of_value ON labels (key, value, name, revision);
CREATE TABLE aliases (
    name TEXT COLLATE "C" NOT NULL REFERENCES names DEFERRABLE INITIALLY DEFERRED,
    alias TEXT COLLATE "C" NOT NULL,
    targets TEXT COLLATE "C" NOT NULL,
    previous TEXT COLLATE "C" NOT NULL,
    generation BIGINT NOT NULL,
    updated DOUBLE PRECISION NOT NULL,
    digest TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (name, alias)
);
CREATE TABLE shared (
    name TEXT COLLATE "C" PRIMARY KEY REFERENCES names DEFERRABLE INITIALLY DEFERRED,
    digest TEXT COLLATE "C" NOT NULL
);
CREATE TABLE quarantine (
    weights TEXT COLLATE "C" PRIMARY KEY,
    time DOUBLE PRECISION NOT NULL,
    why TEXT COLLATE "C" NOT NULL
);
CREATE TABLE files (
    sha256 TEXT COLLATE "C" PRIMARY KEY,
    digest TEXT COLLATE "C" NOT NULL,
    file TEXT COLLATE "C" NOT NULL
);
CREATE INDEX files_of_digest ON files (digest);
CREATE TABLE facts (
    key TEXT COLLATE "C" PRIMARY KEY,
    value TEXT COLLATE "C" NOT NULL,
    digest TEXT COLLATE "C" NOT NULL
);
CREATE TABLE history (
    sequence BIGINT PRIMARY KEY,
    time DOUBLE PRECISION NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    event TEXT COLLATE "C" NOT NULL,
    revision TEXT COLLATE "C" NOT NULL,
    actor TEXT COLLATE "C" NOT NULL,
    peer TEXT COLLATE "C" NOT NULL,
    detail TEXT COLLATE "C" NOT NULL,
    digest TEXT COLLATE "C" NOT NULL
);
CREATE INDEX history_of_name ON history (name, sequence);
"""


@dataclass(frozen=True, slots=True)
class Table:
    """A table that both databases (PostgreSQL and SQLite) have. The key columns come first."""

    name: str
    key: tuple[str, ...]
    rest: tuple[str, ...]
    key_type: str = "text"

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, the key first."""
        return self.key + self.rest

    def upsert(self, mark: str) -> str:
        """SQL to insert or update one row; ``mark`` is the database's placeholder. (``OR
        REPLACE`` would first delete the row, and with it the rows that refer to it.)"""
        into = f"INSERT INTO {self.name} ({', '.join(self.columns)}) VALUES "  # nosec B608 # names of ours
        values = f"({', '.join([mark] * len(self.columns))})"
        changes = ", ".join(f"{column} = excluded.{column}" for column in self.rest)
        return f"{into}{values} ON CONFLICT ({', '.join(self.key)}) DO UPDATE SET {changes}"  # nosec B608 # names of ours

    def delete(self, mark: str) -> str:
        """SQL to delete the row with a key."""
        where = " AND ".join(f"{column} = {mark}" for column in self.key)
        return f"DELETE FROM {self.name} WHERE {where}"  # nosec B608 # names of ours

    def chosen(self) -> str:
        """PostgreSQL query for the rows with given keys. Its parameters are arrays, one for
        each key column."""
        arrays = ", ".join([f"%s::{self.key_type}[]"] * len(self.key))
        columns = ", ".join(f"t.{column}" for column in self.columns)
        on = " AND ".join(f"t.{column} = k.{column}" for column in self.key)
        return (
            f"SELECT {columns} FROM {self.name} t "  # nosec B608 # names of ours
            f"JOIN unnest({arrays}) AS k({', '.join(self.key)}) ON {on}"
        )


TABLES: Final = (
    Table("names", ("name",), ("current", "generation", "retain", "digest")),
    Table(
        "revisions",
        ("name", "revision"),
        (
            "weights",
            "base",
            "created",
            "labels",
            "bytes",
            "sequence",
            "manifest_sha256",
            "digest",
            "manifest",
        ),
    ),
    Table("labels", ("name", "revision", "key"), ("value",)),
    Table(
        "aliases",
        ("name", "alias"),
        ("targets", "previous", "generation", "updated", "digest"),
    ),
    Table("shared", ("name",), ("digest",)),
    Table("quarantine", ("weights",), ("time", "why")),
    Table("files", ("sha256",), ("digest", "file")),
    Table("facts", ("key",), ("value", "digest")),
    Table(
        "history",
        ("sequence",),
        ("time", "name", "event", "revision", "actor", "peer", "detail", "digest"),
        "bigint",
    ),
)
"""In the order in which rows may be inserted. `residents` is not one of them: each registry has
its own."""


def create_missing(connection: Connection, last: str, tables: LiteralString) -> None:
    """Create further tables unless ``last``, which is created last, is there: the right to
    create is only needed once."""
    if connection.execute("SELECT to_regclass(%s)", [last]).fetchone() == (None,):
        connection.execute(tables)


def create(connection: Connection, schema: str) -> None:
    """Create the tables unless they exist; the caller holds the lock of the catalog.

    Raises:
        FailedPrecondition: they are from another version of Veneer.
    """
    found: Sequence[Any] | None = connection.execute(
        "SELECT 1 FROM pg_tables WHERE schemaname = %s AND tablename = 'meta'", [schema]
    ).fetchone()
    if found is None:
        with connection.transaction():
            name = sql.Identifier(schema)
            connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(name))
            connection.execute(_TABLES)
            connection.execute(
                "INSERT INTO meta VALUES (%s, %s)", [VERSION, secrets.token_hex(16)]
            )
            connection.execute(
                "INSERT INTO changes (number, token, touched) VALUES (0, %s, '{}')",
                [secrets.token_hex(16)],
            )
    rows = connection.execute("SELECT version FROM meta").fetchall()
    version = rows[0][0] if rows else 0
    if version != VERSION:
        raise FailedPrecondition(
            f"the catalog in PostgreSQL has schema {version}, this Veneer knows {VERSION}; "
            "start the version that made it, or name another database with --catalog",
            metadata={"schema": str(version), "known": str(VERSION)},
        )
