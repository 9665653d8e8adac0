"""The digest that every row of the catalog carries.

SQLite's pages have no checksums: a value with a flipped bit is returned as if it had been
written. The digest covers every meaningful column of a row. A revision's manifest is covered
by its own SHA-256, so that start-up need not read megabytes of manifests.
"""

from __future__ import annotations

import hashlib
import sqlite3


def row_digest(table: str, *values: object) -> str:
    """SHA-256 of a row's values. A changed type changes it too: ``b'a'`` is not ``a``."""
    text = "\x1f".join(map(str, (table, *values)))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def text_digest(text: object) -> str | None:
    """SHA-256 of a string; None for anything else."""
    if not isinstance(text, str):
        return None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def add_functions(connection: sqlite3.Connection) -> None:
    """Make `row_digest` and `text_digest` available in SQL."""
    connection.create_function("row_digest", -1, row_digest, deterministic=True)
    connection.create_function("text_digest", 1, text_digest, deterministic=True)
