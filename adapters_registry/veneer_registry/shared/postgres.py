"""A connection to PostgreSQL that turns its errors into ours."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, LiteralString
from urllib.parse import urlsplit

import psycopg
from psycopg import conninfo

from veneer_registry.errors import (
    DiskFull,
    FailedPrecondition,
    InvalidField,
    Unavailable,
    VeneerError,
)

_log = logging.getLogger(__name__)

Connection = psycopg.Connection[tuple[Any, ...]]

CONNECT_S: Final = 5
"""Seconds for one attempt to connect."""
ANSWER_S: Final = 30.0
"""Seconds within which the database must answer. After that the connection counts as lost: a
stopped server still acknowledges packets, so the kernel does not notice."""
HOLD_S: Final = 20.0
"""Seconds without a statement after which PostgreSQL ends a session that may hold a lock: its
registry may be paused. With what follows, others wait for less than 30 s."""
LOCK_S: Final = 20
"""Seconds to wait for another process to finish its change."""
RETRY_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class PostgresAddress:
    """Where the catalog is.

    Attributes:
        url: ``postgresql://...`` without a password.
        password_file: file with the password; None leaves it to ``PGPASSFILE``.
        schema: PostgreSQL's schema for the tables.
    """

    url: str
    password_file: Path | None = None
    schema: str = "veneer"

    def check(self) -> None:
        """Raise InvalidField unless ``url`` is usable. Connects to nothing."""
        try:
            scheme = urlsplit(self.url).scheme
            known = conninfo.conninfo_to_dict(self.url)
        except (ValueError, psycopg.Error):
            scheme, known = "", {}
        if scheme not in ("postgresql", "postgres"):
            raise InvalidField(
                "--catalog needs the URL of a PostgreSQL database, such as "
                "postgresql://veneer@db.example.org/veneer",
                metadata={"field": "catalog"},
            )
        if known.get("password"):
            # Every user of the machine can read command lines.
            raise InvalidField(
                "--catalog must not contain a password: put it into a file for "
                "--catalog-password-file, or into the file that PGPASSFILE names",
                metadata={"field": "catalog", "cause": "password"},
            )

    def password(self) -> str | None:
        """The password, read again for each connection; None leaves it to libpq."""
        if self.password_file is None:
            return None
        try:
            return self.password_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidField(
                "the file of --catalog-password-file cannot be read",
                metadata={"field": "catalog_password_file"},
                detail=f"{self.password_file}: {error}",
            ) from error


class PostgresLink:
    """A connection that is opened when it is first needed. Only one thread at a time may use
    it, but `wake` and `close` may be called from another."""

    def __init__(self, address: PostgresAddress, purpose: str) -> None:
        """``purpose`` is shown in ``pg_stat_activity``."""
        self._address = address
        self._purpose = purpose
        self._connection: Connection | None = None
        self._guard = threading.Lock()
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether there is a connection, which may be broken without anyone knowing."""
        return self._connection is not None

    def open(self) -> Connection:
        """Return the connection, after connecting if there is none. Raises Unavailable."""
        if self._connection is None:
            with self.errors():
                made = psycopg.connect(
                    self._address.url,
                    autocommit=True,
                    prepare_threshold=None,
                    connect_timeout=CONNECT_S,
                    application_name=f"veneer {self._purpose}",
                    keepalives_idle=5,
                    keepalives_interval=2,
                    keepalives_count=3,
                    tcp_user_timeout=15_000,
                    # Never a standby, which may lag behind.
                    target_session_attrs="read-write",
                    # Each statement is one message (see `execute_many`).
                    cursor_factory=psycopg.ClientCursor,
                    password=self._address.password(),
                )
            with self._guard:
                self._connection = made
                if self._closed:
                    made.close()
            try:
                with self.answering() as connection:
                    self._set_up(connection)
            except BaseException:
                self.drop()  # it is not set up, so it must not be used
                raise
        assert self._connection is not None
        return self._connection

    def _set_up(self, connection: Connection) -> None:
        # A session must end when its client machine is gone, since it may hold the lock.
        settings = {
            "search_path": f'"{self._address.schema}"',
            "synchronous_commit": "on",
            "lock_timeout": f"{LOCK_S}s",
            "statement_timeout": f"{ANSWER_S:.0f}s",
            "idle_in_transaction_session_timeout": f"{1000 * HOLD_S:.0f}ms",
            "tcp_keepalives_idle": "5",
            "tcp_keepalives_interval": "2",
            "tcp_keepalives_count": "3",
            "tcp_user_timeout": "15000",
            "client_connection_check_interval": "5s",
        }
        sql: LiteralString = "SELECT " + ", ".join(
            ["set_config(%s, %s, false)"] * len(settings)
        )
        connection.execute(sql, [x for pair in settings.items() for x in pair])

    @contextlib.contextmanager
    def answering(self) -> Iterator[Connection]:
        """Yield the connection, for statements that must all be answered within `ANSWER_S`.

        A broken connection is dropped. Raises the same errors as `errors`.
        """
        connection = self.open()
        timer = threading.Timer(ANSWER_S, self.wake)
        timer.daemon = True
        timer.start()
        try:
            with self.errors():
                yield connection
        except BaseException:
            if connection.broken or connection.closed:
                self.drop()
            raise
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn PostgreSQL's errors into ours."""
        try:
            yield
        except psycopg.Error as error:
            raise _translated(error) from error

    def drop(self) -> None:
        """Close the connection; whatever it was doing is rolled back, unless it was
        committing."""
        with self._guard:
            connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.close()

    def wake(self) -> None:
        """Make a thread that is waiting for the database fail now."""
        with self._guard:
            connection = self._connection
            if connection is None or connection.closed:
                return
            with contextlib.suppress(OSError, psycopg.Error):
                duplicate = socket.socket(fileno=os.dup(connection.fileno()))
                with duplicate:
                    duplicate.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Like `wake`, and close any connection that is made later."""
        with self._guard:
            self._closed = True
        self.wake()


def execute_many(
    connection: Connection, query: LiteralString, rows: Iterable[Sequence[Any]]
) -> None:
    """Execute a statement for each row, all in one message.

    PostgreSQL ends idle sessions (`HOLD_S`) only between a message that is answered and the
    end of the next one. psycopg's own cursors and its ``executemany`` send a statement as
    several messages with one answer: a registry that is paused between two of them would keep
    the lock for as long as it is paused.
    """
    cursor = psycopg.ClientCursor(connection)
    if statements := [cursor.mogrify(query, row) for row in rows]:
        connection.execute("; ".join(statements))


def unavailable(why: object, *, outcome: str = "unchanged") -> Unavailable:
    """The error for a database that cannot be reached.

    Args:
        outcome: what became of the change: ``unchanged`` or ``unknown``.
    """
    what = (
        "nothing was changed; try again"
        if outcome == "unchanged"
        else "so it is unknown whether the change was made: repeat the same "
        "call, which is idempotent"
    )
    return Unavailable(
        f"the catalog's database cannot be reached, {what}",
        metadata={"cause": "catalog", "outcome": outcome},
        retry_after_s=RETRY_S,
        detail=" ".join(str(why).split())[:300],
    )


def _translated(error: psycopg.Error) -> VeneerError:
    if isinstance(error, psycopg.errors.DiskFull | psycopg.errors.OutOfMemory):
        return DiskFull(
            "the disk of the catalog's database is full and nothing was published; free space",
            detail=str(error),
        )
    if isinstance(error, psycopg.errors.LockNotAvailable | psycopg.errors.QueryCanceled):
        return Unavailable(
            "another registry is holding the catalog's lock, nothing was changed; try again",
            metadata={"cause": "catalog", "outcome": "unchanged"},
            retry_after_s=RETRY_S,
            detail=str(error),
        )
    if isinstance(error, psycopg.DataError):
        return InvalidField(
            "text with NUL characters cannot be stored: remove them",
            metadata={"field": "text"},
            detail=str(error),
        )
    if isinstance(
        error,
        psycopg.OperationalError
        | psycopg.InterfaceError
        | psycopg.errors.IdleInTransactionSessionTimeout,
    ):
        return unavailable(error)
    return FailedPrecondition(
        "the catalog's database rejected the registry's query, nothing was changed; see the "
        "server's log",
        metadata={"cause": "catalog", "sqlstate": error.sqlstate or ""},
        detail=" ".join(str(error).split())[:300],
    )
