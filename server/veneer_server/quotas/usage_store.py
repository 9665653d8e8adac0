"""Usage by tenant and hour, in SQLite: figures for billing must survive a restart."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

from veneer_registry.database import connect, database_errors, move_aside
from veneer_registry.disk import create_file, disk_errors, sync
from veneer_registry.errors import CatalogDamaged, FailedPrecondition

from veneer_server.logs import get_logger

MAX_HOURS: Final = 2400
"""Number of hours that are kept one by one; older hours are kept as one sum. Only hours with
usage count, so that a wrong clock drops none."""

MAX_DAYS: Final = 7
"""Number of days for which uploaded bytes are kept."""

HOUR_S: Final = 3600
_BEFORE: Final = -1
"""The hour under which the sum of older hours is kept."""
_VERSION: Final = 1

_log = get_logger(__name__)


@dataclass(slots=True)
class UsageCounts:
    """A tenant's usage.

    Attributes:
        cached_prompt_tokens: the part of the prompt tokens that the prefix cache had.
        adapter_byte_hours: bytes of stored adapters, times hours.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    adapter_byte_hours: float = 0.0

    def __add__(self, other: UsageCounts) -> UsageCounts:
        return UsageCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: UsageCounts) -> UsageCounts:
        return UsageCounts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


_NAMES: Final = tuple(field.name for field in fields(UsageCounts))
_COLUMNS: Final = ", ".join(_NAMES)
_SUMS: Final = ", ".join(f"sum({name})" for name in _NAMES)
_ADDED: Final = (
    f"ON CONFLICT (tenant, hour) DO UPDATE SET "  # nosec B608 # columns of ours
    f"{', '.join(f'{name} = {name} + excluded.{name}' for name in _NAMES)}"
)

_SCHEMA: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE facts (since REAL NOT NULL, batch INTEGER NOT NULL);
CREATE TABLE usage (
    tenant TEXT NOT NULL,
    hour INTEGER NOT NULL,     -- since 1970; {_BEFORE}: all before the hours that are kept
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_prompt_tokens INTEGER NOT NULL,
    generated_tokens INTEGER NOT NULL,
    adapter_byte_hours REAL NOT NULL,
    PRIMARY KEY (tenant, hour)
) WITHOUT ROWID;
CREATE INDEX usage_by_hour ON usage (hour);
CREATE TABLE uploaded (
    day INTEGER NOT NULL,      -- since 1970
    account TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (day, account)
) WITHOUT ROWID;
PRAGMA user_version = {_VERSION};
"""


class Batch(NamedTuple):
    """Changes that are written together, once.

    Attributes:
        number: the last batch's number, plus 1.
        added: counts to add to the hour's counts, by tenant.
        uploaded: total bytes so far by day and account; these replace the stored values.
    """

    number: int
    hour: int
    added: Mapping[str, UsageCounts]
    uploaded: Mapping[tuple[int, str], int]


class UsageFound(NamedTuple):
    """The result of `UsageStore.report`.

    Attributes:
        batch: number of the last batch that the counts include.
        oldest: the first hour that is kept by itself, if older ones have been summed; else
            None.
    """

    counts: dict[str, UsageCounts]
    batch: int
    oldest: int | None


class UsageStore:
    """The usage database. May be used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create the database. A damaged one is moved aside and replaced by a new one.

        Raises:
            FailedPrecondition: the database is from a newer Veneer.
            DiskFull, DiskFailed: the database cannot be opened.
        """
        self._path = path
        try:
            self._db, self.since, self.batch = _open(path)
        except CatalogDamaged as error:
            aside = move_aside(path)
            why = str(error.__cause__ or error)
            _log.error("usage file damaged, starting a new one", file=aside.name, why=why)
            self._db, self.since, self.batch = _open(path)
        self._hour: int | None = None
        """The hour of the last batch."""

    def write(self, batch: Batch) -> None:
        """Write a batch unless it has been written already. Raises DiskFull, DiskFailed."""
        with database_errors(self._path), self._transaction():
            ((last,),) = self._db.execute("SELECT batch FROM facts")
            if last >= batch.number:
                return  # an error was reported after it had been written
            self._db.execute("UPDATE facts SET batch = ?", (batch.number,))
            self._db.executemany(
                f"INSERT INTO usage (tenant, hour, {_COLUMNS}) "  # nosec B608 # columns of ours
                f"VALUES (?, ?, {', '.join('?' * len(_NAMES))}) {_ADDED}",
                [(name, batch.hour, *astuple(each)) for name, each in batch.added.items()],
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO uploaded (day, account, bytes) VALUES (?, ?, ?)",
                [(day, account, size) for (day, account), size in batch.uploaded.items()],
            )
            if batch.hour != self._hour:
                self._forget()
        self._hour = batch.hour

    def report(self, tenant: str | None, start: int | None, end: int) -> UsageFound:
        """Return the counts by tenant.

        Args:
            tenant: None for all.
            start, end: hours since 1970, ``end`` excluded; ``start`` None for all before
                ``end``.
        """
        where, values = "hour < ?", [end]
        if start is not None:
            where, values = "hour >= ? AND hour < ?", [start, end]
        given: list[Any] = [*values]
        if tenant is not None:
            where, given = f"tenant = ? AND {where}", [tenant, *values]
        with database_errors(self._path), self._transaction():
            rows = self._db.execute(
                f"SELECT tenant, {_SUMS} FROM usage WHERE {where} GROUP BY tenant",  # nosec B608 # columns of ours
                given,
            ).fetchall()
            ((batch,),) = self._db.execute("SELECT batch FROM facts")
            ((summed,),) = self._db.execute(
                "SELECT EXISTS (SELECT 1 FROM usage WHERE hour = ?)", (_BEFORE,)
            )
            ((oldest,),) = self._db.execute("SELECT min(hour) FROM usage WHERE hour >= 0")
        counts = {name: UsageCounts(*numbers) for name, *numbers in rows}
        return UsageFound(counts, batch, oldest if summed else None)

    def uploaded(self) -> dict[tuple[int, str], int]:
        """Uploaded bytes by day and account."""
        with database_errors(self._path):
            rows = self._db.execute("SELECT day, account, bytes FROM uploaded").fetchall()
        # A flipped bit may have changed a value's type.
        return {
            (day, account): size
            for day, account, size in rows
            if isinstance(day, int) and isinstance(account, str) and isinstance(size, int)
        }

    def close(self) -> None:
        self._db.close()

    def _forget(self) -> None:
        oldest = self._db.execute(
            "SELECT DISTINCT hour FROM usage WHERE hour >= 0 "
            "ORDER BY hour DESC LIMIT 1 OFFSET ?",
            (MAX_HOURS - 1,),
        ).fetchone()
        if oldest is not None:
            self._db.execute(
                f"INSERT INTO usage (tenant, hour, {_COLUMNS}) "  # nosec B608 # columns of ours
                f"SELECT tenant, {_BEFORE}, {_SUMS} "
                f"FROM usage WHERE hour >= 0 AND hour < ? GROUP BY tenant {_ADDED}",
                oldest,
            )
            self._db.execute("DELETE FROM usage WHERE hour >= 0 AND hour < ?", oldest)
        self._db.execute(
            "DELETE FROM uploaded WHERE day NOT IN "
            "(SELECT DISTINCT day FROM uploaded ORDER BY day DESC LIMIT ?)",
            (MAX_DAYS,),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


def _open(path: Path) -> tuple[sqlite3.Connection, float, int]:
    if not path.exists():
        with disk_errors(path.parent):
            create_file(path)  # private, as SQLite's other files will be
            sync(path.parent)
    with database_errors(path):
        db = connect(path)
        try:
            ((version,),) = db.execute("PRAGMA user_version")
            if version > _VERSION:
                raise FailedPrecondition(
                    f"{path} was written by a newer Veneer: start that version, or move the "
                    "file away to start counting from zero",
                    metadata={"file": str(path)},
                )
            if version == 0:
                db.executescript(_SCHEMA)
                db.execute("INSERT INTO facts VALUES (?, 0)", (time.time(),))
                db.execute("COMMIT")
            facts = db.execute("SELECT since, batch FROM facts").fetchall()
            ((sound,),) = db.execute("PRAGMA quick_check(1)")
        except BaseException:
            db.close()
            raise
        if sound != "ok" or len(facts) != 1 or list(map(type, facts[0])) != [float, int]:
            db.close()
            raise CatalogDamaged(f"quick_check: {sound}; facts: {facts[:2]}")
    return db, *facts[0]
