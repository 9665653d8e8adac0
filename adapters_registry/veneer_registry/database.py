"""Connections to the catalog's database that turn SQLite's errors into ours."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from veneer_registry.disk import disk_failed, disk_full
from veneer_registry.schema import damaged

_FULL_BYTES: Final = 1 << 20
"""A disk with less free space than this counts as full."""

_DAMAGE: Final = re.compile(r"no such (table|column)|malformed")
"""SQLite's errors for a database whose own tables are damaged."""


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection that any thread may use, one at a time."""
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into `DiskFull`, `DiskFailed` or `CatalogDamaged`."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        folder = path.parent
        if code == sqlite3.SQLITE_FULL:
            raise disk_full(folder) from error
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            # SQLite does not report the errno.
            full = shutil.disk_usage(folder).free < _FULL_BYTES
            failed = disk_full(folder) if full else disk_failed(folder, error)
            raise failed from error
        if code == sqlite3.SQLITE_READONLY and not os.access(path, os.W_OK):
            raise disk_failed(folder, error) from error
        if code == sqlite3.SQLITE_READONLY:  # its header forbids writing
            raise damaged(path, str(error)) from error
        if type(error) is sqlite3.DatabaseError or _DAMAGE.search(str(error)):
            raise damaged(path, str(error)) from error
        raise
    except UnicodeDecodeError as error:
        # SQLite's error quotes the damaged schema, which Python cannot decode.
        raise damaged(path, "the SQL of its schema is not valid UTF-8") from error


def move_aside(path: Path) -> Path:
    """Rename a damaged database, which must be closed; return its new path."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    for end in ("", "-wal", "-shm"):
        file = path.with_name(path.name + end)
        if file.exists():
            file.rename(aside.with_name(aside.name + end))
    return aside


class Reader:
    """A read connection. One query at a time: a second one waits for the first."""

    def __init__(self, path: Path) -> None:
        """Raises sqlite3.Error."""
        self._path = path
        self._connection = connect(path)
        self._lock = threading.Lock()

    def rows(
        self, sql: str, parameters: Collection[object] | None = None
    ) -> list[tuple[Any, ...]]:
        """Return all rows of a query. Raises the errors of `database_errors`."""
        parameters = tuple(parameters or ())
        with self._lock, database_errors(self._path):
            try:
                return self._connection.execute(sql, parameters).fetchall()
            except sqlite3.OperationalError as error:
                if "UTF-8" not in str(error):
                    raise
            # A bit flipped inside a text: decode leniently, and let the row's digest find it.
            self._connection.text_factory = _lenient
            try:
                return self._connection.execute(sql, parameters).fetchall()
            finally:
                self._connection.text_factory = str

    def close(self) -> None:
        """Close once the running query has ended. Idempotent."""
        with self._lock:
            self._connection.close()


def _lenient(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
