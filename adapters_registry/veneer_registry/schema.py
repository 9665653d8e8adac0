"""The catalog's tables, as migrations from each schema version to the next."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Final

from veneer_registry.disk import create_file, sync
from veneer_registry.errors import CatalogDamaged, FailedPrecondition
from veneer_registry.integrity import add_functions

STEPS: Final = (
    """
    CREATE TABLE counter (value INTEGER NOT NULL);
    INSERT INTO counter VALUES (0);
    CREATE TABLE names (
        name TEXT PRIMARY KEY,
        current TEXT,              -- NULL: its content was lost
        generation INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE revisions (
        name TEXT NOT NULL REFERENCES names(name) ON DELETE CASCADE,
        revision TEXT NOT NULL,
        weights TEXT NOT NULL,
        base TEXT NOT NULL,        -- identity of the base it was checked against
        manifest TEXT NOT NULL,
        created REAL NOT NULL,
        labels TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        sequence INTEGER NOT NULL, -- order of publishing
        PRIMARY KEY (name, revision)
    );
    CREATE TABLE labels (
        name TEXT NOT NULL,
        revision TEXT NOT NULL,
        key TEXT NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (name, revision, key),
        FOREIGN KEY (name, revision) REFERENCES revisions(name, revision) ON DELETE CASCADE
    ) WITHOUT ROWID;
    """,
    """
    ALTER TABLE names ADD COLUMN retain INTEGER;  -- NULL: the server's default
    CREATE TABLE aliases (
        name TEXT NOT NULL REFERENCES names(name) ON DELETE CASCADE,
        alias TEXT NOT NULL,
        targets TEXT NOT NULL,     -- JSON: [[revision, weight], ...]
        previous TEXT NOT NULL,    -- the same, before its last move
        generation INTEGER NOT NULL,
        updated REAL NOT NULL,
        PRIMARY KEY (name, alias)
    ) WITHOUT ROWID;
    CREATE TABLE history (         -- outlives the names that it tells of
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        time REAL NOT NULL,
        name TEXT NOT NULL,
        event TEXT NOT NULL,
        revision TEXT NOT NULL,
        actor TEXT NOT NULL,
        peer TEXT NOT NULL,
        detail TEXT NOT NULL
    );
    CREATE INDEX history_of_name ON history (name, sequence);
    CREATE TABLE quarantine (
        weights TEXT PRIMARY KEY,
        time REAL NOT NULL,
        why TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE files (           -- content on disk, by the SHA-256 of the file
        sha256 TEXT PRIMARY KEY,
        digest TEXT NOT NULL,      -- weights digest or revision: the folder's name
        file TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX files_of_digest ON files (digest);
    CREATE TABLE residents (
        place INTEGER PRIMARY KEY, -- most recently used first
        weights TEXT NOT NULL,
        tier TEXT NOT NULL,
        pin TEXT
    );
    """,
    """
    -- Listing by a label must not look at every name.
    CREATE INDEX labels_of_value ON labels (key, value, name, revision);
    """,
    """
    -- Every row that says what is served or shown gets a digest (`integrity`). The manifest
    -- moves to the end of its row: start-up reads all rows, but no manifest.
    ALTER TABLE names ADD COLUMN digest TEXT NOT NULL DEFAULT '';
    UPDATE names SET digest = row_digest('names', name, current, generation, retain);
    CREATE TABLE new_revisions (
        name TEXT NOT NULL REFERENCES names(name) ON DELETE CASCADE,
        revision TEXT NOT NULL,
        weights TEXT NOT NULL,
        base TEXT NOT NULL,            -- "": recovered, not checked against any base yet
        created REAL NOT NULL,
        labels TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        manifest_sha256 TEXT NOT NULL,
        digest TEXT NOT NULL,
        manifest TEXT NOT NULL,
        PRIMARY KEY (name, revision)
    );
    INSERT INTO new_revisions
        SELECT name, revision, weights, base, created, labels, bytes, sequence, sha,
            row_digest('revisions', name, revision, weights, base, created, labels, bytes,
                sequence, sha),
            manifest
        FROM (SELECT *, text_digest(manifest) AS sha FROM revisions);
    DROP TABLE revisions;
    ALTER TABLE new_revisions RENAME TO revisions;
    ALTER TABLE aliases ADD COLUMN digest TEXT NOT NULL DEFAULT '';
    UPDATE aliases SET digest =
        row_digest('aliases', name, alias, targets, previous, generation, updated);
    ALTER TABLE history ADD COLUMN digest TEXT NOT NULL DEFAULT '';
    UPDATE history SET digest =
        row_digest('history', time, name, event, revision, actor, peer, detail);
    CREATE TABLE facts (
        key TEXT PRIMARY KEY,          -- store: the id of the store that this belongs to
        value TEXT NOT NULL,
        digest TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
    """
    CREATE TABLE shared (              -- names that other tenants may use
        name TEXT PRIMARY KEY REFERENCES names(name) ON DELETE CASCADE,
        digest TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
)

VERSION: Final = len(STEPS)


def damaged(path: Path, why: str) -> CatalogDamaged:
    """The error for a catalog that cannot be read."""
    return CatalogDamaged(
        f"the server's {path.name} is damaged ({why[:200]}); nothing was changed. Restore it "
        "from a backup, or stop the server and run `veneer-server store recover`: it keeps "
        "what can still be read and takes the rest from the stored adapters",
        metadata={"file": path.name, "why": why[:200], "fix": "veneer-server store recover"},
        detail=f"{path}; veneer-server store recover --data-dir {path.parent}",
    )


def version_of(connection: sqlite3.Connection, path: Path) -> int:
    """The schema's version; 0 for a database without tables.

    Raises:
        CatalogDamaged: it has tables but claims version 0.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables:
            raise damaged(path, f"it has {tables} tables and indexes, but no version")
    return int(version)


def upgrade(connection: sqlite3.Connection, path: Path) -> None:
    """Bring an empty or older database to `VERSION`, in one transaction.

    An older database is first copied to ``<path>.v<version>``, so that the user can go back
    to the older Veneer.

    Raises:
        FailedPrecondition: the database is from a newer Veneer.
        CatalogDamaged: see `version_of`.
    """
    add_functions(connection)
    version = version_of(connection, path)
    if version > VERSION:
        raise FailedPrecondition(
            f"{path} has schema {version}, this Veneer knows {VERSION}; start the version that "
            "made it, or give another folder with --data-dir (if no newer version was ever "
            "used here, the file is damaged: run `veneer-server store recover`)",
            metadata={"schema": str(version), "known": str(VERSION)},
        )
    if version == VERSION:
        return
    if version:
        _keep_copy(connection, path.with_name(f"{path.name}.v{version}"))
    steps = "".join(STEPS[version:])
    # A referenced table is replaced, which must not cascade to the rows that refer to it.
    connection.execute("PRAGMA foreign_keys=OFF")
    try:
        connection.executescript(
            f"BEGIN IMMEDIATE; {steps} PRAGMA user_version={VERSION}; COMMIT;"
        )
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    finally:
        connection.execute("PRAGMA foreign_keys=ON")


def _keep_copy(connection: sqlite3.Connection, copy: Path) -> None:
    if copy.exists():
        return
    partial = copy.with_name(copy.name + ".partial")
    partial.unlink(missing_ok=True)
    create_file(partial)  # makes it private; SQLite would leave its mode to the umask
    with contextlib.closing(sqlite3.connect(partial)) as target:
        connection.backup(target)
    sync(partial)
    partial.replace(copy)
    sync(copy.parent)
