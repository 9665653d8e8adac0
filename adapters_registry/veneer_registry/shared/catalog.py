"""The catalog in PostgreSQL, which several registries may change.

Each registry keeps a local copy in SQLite (`mirror`), and lookups read the copy: no request
waits for the network, and known adapters are still served while the database is away. The copy
is not authoritative: it is rebuilt at each start.

A change is made to the copy, as in `Catalog`, and the rows that it touched are written to
PostgreSQL in one transaction before the copy's own commit. Meanwhile `SharedExclusive` keeps
the other registries out, so that numbers are assigned and become visible in the same order, and
a registry that reads changes by number misses none. Each change adds a row to ``changes``: its
number, a random token, and the keys of the rows it touched. NOTIFY wakes the other registries,
and they read the changes after the last one they know. That one must still be in the log with
the same token. If not, the database was restored from a backup, or the log has been cut since,
and everything is read again.

A registry that is paused while it holds the lock loses it after `postgres.HOLD_S`: PostgreSQL
ends its session. Its change then fails, or is made if nobody else has made one meanwhile.

If the connection is lost before COMMIT was sent, nothing was changed. If it is lost after that,
the token tells whether the commit was made; it can be read once the lock shows that the old
session has ended.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from psycopg.types.json import Jsonb

from veneer_registry.catalog import Catalog
from veneer_registry.checked_rows import history_row
from veneer_registry.errors import Unavailable, VeneerError
from veneer_registry.freshness import HEARTBEAT_S, CopyAge
from veneer_registry.rows import Foreign, HistoryRow
from veneer_registry.shared import mirror, postgres
from veneer_registry.shared.exclusive import SharedExclusive
from veneer_registry.shared.postgres import (
    Connection,
    PostgresAddress,
    PostgresLink,
    unavailable,
)
from veneer_registry.shared.tables import KEPT_CHANGES, TABLES, create
from veneer_registry.shared.transfer import keys_of, read_rows, residents_of, write_rows

_log = logging.getLogger(__name__)

FIND_OUT_S: Final = 15.0
"""Seconds to keep asking whether a commit was made after its answer was lost."""
_PAUSE_S: Final = 0.2
_AT_ONCE: Final = 2000
_HISTORY: Final = next(table for table in TABLES if table.name == "history")

Follower = Callable[[Foreign], None]


class PostgresCatalog(Catalog):
    """The catalog at ``address``. Its local copy at ``path`` is replaced.

    Attributes:
        age: how old the copy is. The log of changes is read at least every `HEARTBEAT_S`.
    """

    def __init__(
        self, address: PostgresAddress, path: Path, *, after_change: Callable[[int, str], None]
    ) -> None:
        """Connect, create the tables if they are missing, and read everything.

        Args:
            after_change: called with number and token of each change once it is durable.

        Raises:
            Unavailable: the database cannot be reached.
            FailedPrecondition: the catalog is from another version, or permissions are missing.
            DiskFull: no space for the copy.
        """
        residents = residents_of(path)
        for suffix in ("", "-wal", "-shm", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        super().__init__(path, after_change=self._committed)
        self._tell = after_change
        self._address = address
        key = hashlib.sha256(b"veneer catalog " + address.schema.encode()).digest()
        self.lock_key = int.from_bytes(key[:8], "big", signed=True)
        self._channel = f"veneer_{key.hex()[:16]}"
        self._link = PostgresLink(address, "registry")
        self._listening = PostgresLink(address, "watcher")
        self.age = CopyAge("its catalog in PostgreSQL")
        self._follower: Follower | None = None
        self._known: tuple[int, str] = (-1, "")
        """Number and token of the last change that the copy has."""
        self._sent: tuple[int, str] | None = None
        self._sent_at = 0.0
        """When the last change of this registry was sent, on the clock of `age`."""
        self._told = -1
        self._line = 0
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None
        self.exclusive: SharedExclusive = SharedExclusive(self._enter, self._leave)
        try:
            # The copy is rebuilt at each start, so it need not survive a power cut.
            self._writer.execute("PRAGMA synchronous=OFF")
            with self._link.answering() as connection:
                self._lock(connection)
                create(connection, address.schema)
                self._unlock()
            with self.exclusive.here():
                self._catch_up(self._link)
            mirror.capture(self._writer)
            self.set_residents(residents)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the watcher, and close the connections. Idempotent."""
        self._ended.set()
        self._listening.close()
        self._link.drop()
        super().close()

    def join(self) -> None:
        """Wait until the watcher thread ends. Must not be called inside `exclusive`."""
        if self._watcher is not None:
            self._watcher.join()

    def follow(self, follower: Follower) -> None:
        """See `Catalog.follow`. Starts the watcher thread. The caller holds `exclusive`."""
        self._follower = follower
        self._watcher = threading.Thread(
            target=self._watch, name="catalog-watcher", daemon=True
        )
        self._watcher.start()

    def has(self, number: int, token: str) -> bool:
        """Whether the change with this number has this token. True also if the log no longer
        has that change."""
        with self._link.answering() as connection:
            row = connection.execute(
                "SELECT token FROM changes WHERE number = %s", [number]
            ).fetchone()
        return row is None or row[0] == token

    def _enter(self) -> None:
        used = self._link.connected
        try:
            self._take()
        except Unavailable:
            if not used:
                raise
            # The database may have been restarted since the last change.
            self._link.drop()
            self._take()

    def _take(self) -> None:
        """Lock the catalog, and apply the changes of other registries."""
        with self._link.answering() as connection:
            self._lock(connection)
        try:
            self._catch_up(self._link)
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        self._told = self._known[0]  # own changes are in the index by now
        try:
            with self._link.answering():
                self._unlock()
        except VeneerError as error:  # the lock ends with the session
            _log.warning("the connection to the catalog was lost: %s", error)
            self._link.drop()

    def _lock(self, connection: Connection) -> None:
        # First: this process may be paused while it waits for the lock.
        self._may_idle(connection, postgres.HOLD_S)
        connection.execute("SELECT pg_advisory_lock(%s)", [self.lock_key])

    def _unlock(self) -> None:
        if self._link.connected:
            connection = self._link.open()
            connection.execute("SELECT pg_advisory_unlock(%s)", [self.lock_key])
            self._may_idle(connection, 0)

    def _may_idle(self, connection: Connection, seconds: float) -> None:
        """Set after how many seconds without a statement the session ends; 0: never. PostgreSQL
        13 cannot do that."""
        if connection.info.server_version >= 140000:
            milliseconds = str(round(1000 * seconds))
            connection.execute(
                "SELECT set_config('idle_session_timeout', %s, false)", [milliseconds]
            )

    def _begin(self) -> None:
        assert self.exclusive.held, "a change needs `exclusive`"
        self._sent = None
        mirror.begin(self._writer)

    def _before_commit(self, number: int) -> None:
        keys = mirror.touched(self._writer)
        if not keys:
            self._writer.execute("UPDATE counter SET value = value - 1")
            return
        self._sent_at = self.age.now
        there, gone = mirror.values(self._writer, keys)
        token = secrets.token_hex(16)
        with self._link.answering() as connection:
            connection.execute("BEGIN")
            counted = connection.execute(
                "UPDATE counter SET value = %s WHERE value = %s", [number, number - 1]
            )
            if counted.rowcount != 1:
                self._link.drop()
                raise unavailable("another registry made a change while this one was cut off")
            write_rows(connection, there, gone)
            connection.execute(
                "INSERT INTO changes (number, token, touched) VALUES (%s, %s, %s)",
                [number, token, Jsonb(keys)],
            )
            connection.execute(
                "DELETE FROM changes WHERE number <= %s", [number - KEPT_CHANGES]
            )
            connection.execute("SELECT pg_notify(%s, %s)", [self._channel, str(number)])
        try:
            with self._link.answering() as connection:
                connection.execute("COMMIT")
        except VeneerError as error:
            self.find_out(number, token, error)
        self._sent = (number, token)

    def find_out(self, number: int, token: str, error: VeneerError) -> None:
        """Find out whether a COMMIT was made after its answer was lost. Return if it was.

        Raises:
            Unavailable: it was not made, or this cannot be found out.
        """
        deadline = time.monotonic() + FIND_OUT_S
        while True:
            self._link.drop()
            try:
                with self._link.answering() as connection:
                    # The old session holds the lock until its commit has come to an end.
                    self._lock(connection)
                    row = connection.execute(
                        "SELECT token FROM changes WHERE number = %s", [number]
                    ).fetchone()
                break
            except Unavailable as again:
                if time.monotonic() > deadline or self._ended.wait(_PAUSE_S):
                    raise unavailable(again, outcome="unknown") from error
        if row is None or row[0] != token:
            raise unavailable(error) from error

    def _committed(self, number: int) -> None:
        """Record that the copy has committed this registry's own change, and report it."""
        if self._sent is not None:
            self._known = self._sent
            self.age.current(self._sent_at)
            ((self._line,),) = self._reader.rows(
                "SELECT coalesce(max(sequence), 0) FROM history"
            )
            self._tell(*self._sent)

    def _watch(self) -> None:
        try:
            self._watch_until_ended()
        finally:
            self._listening.drop()

    def _watch_until_ended(self) -> None:
        away = False
        while not self._ended.is_set():
            try:
                connection = self._listening.open()
                with self._listening.answering():
                    connection.execute(f"LISTEN {self._channel}")
                if away:
                    _log.warning("the catalog's database is reachable again")
                away = False
                self._listen(connection)
            except VeneerError as error:
                self._listening.drop()
                self.age.cut()
                if not away and not self._ended.is_set():
                    _log.warning("changes from other registries are delayed: %s", error)
                away = True
                self._ended.wait(1.0)
            except Exception:
                _log.exception("the catalog watcher failed; retrying")
                self._listening.drop()
                self._ended.wait(1.0)

    def _listen(self, connection: Connection) -> None:
        while not self._ended.is_set():
            if not self._is_current(connection):
                with self.exclusive.here():
                    if self._ended.is_set():
                        return
                    self._catch_up(self._listening)
            with self._listening.errors():
                for _ in connection.notifies(timeout=HEARTBEAT_S, stop_after=1):
                    pass

    def _is_current(self, connection: Connection) -> bool:
        """Whether the copy has all changes. Waits for no change of this registry, which may be
        waiting for the lock."""
        asked, known = self.age.now, self._known
        with self._listening.answering():
            row = connection.execute(
                "SELECT number, token FROM changes ORDER BY number DESC LIMIT 1"
            ).fetchone()
        if row is None or tuple(row) != known:
            return False
        self.age.current(asked)
        return True

    @property
    def told(self) -> int:
        """Number of the last change that the index has."""
        return self._told

    def _catch_up(self, link: PostgresLink) -> None:
        """Apply the changes after the last known one. The caller holds `exclusive.here`."""
        names: frozenset[str]
        asked = self.age.now
        with link.answering() as connection, connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            changes = connection.execute(
                "SELECT number, token, touched FROM changes WHERE number >= %s ORDER BY number",
                [self._known[0]],
            ).fetchall()
            goes_on = bool(changes) and tuple(changes[0][:2]) == self._known
            if goes_on:
                keys = keys_of(touched for _, _, touched in changes[1:])
                there = read_rows(connection, keys)
                last = (changes[-1][0], changes[-1][1])
            else:
                last, names = self._read_all(connection)
        if goes_on and last == self._known:
            self.age.current(asked)
            return
        if goes_on:
            names = self._apply(there, keys, last[0])
        lines = self._lines(last[0])
        if self._follower is not None:
            self._follower(Foreign(names, lines))
        # Only now: if the follower failed, all this is done again.
        self._known = last
        self._told = last[0]
        self.age.current(asked)
        if lines:
            self._line = lines[-1].sequence

    def _apply(
        self, there: mirror.Rows, keys: dict[str, set[mirror.Key]], number: int
    ) -> frozenset[str]:
        """Write changed rows to the copy. Return the names that they belong to."""
        gone: dict[str, list[mirror.Key]] = {}
        for table in TABLES:
            found = {row[: len(table.key)] for row in there.get(table.name, ())}
            if missing := keys.get(table.name, set()) - found:
                gone[table.name] = sorted(missing)
        names = frozenset(
            row[0]
            for table in ("names", "revisions", "aliases", "shared", "labels")
            for row in (*there.get(table, ()), *gone.get(table, ()))
        )
        # Superseded revisions go last: a request that found one in the index before must find
        # the new one when it looks again.
        late: dict[str, list[mirror.Key]] = {
            table: gone.pop(table) for table in ("revisions", "labels") if table in gone
        }
        if late and there.get("names"):
            with self._own() as writer:
                mirror.apply(writer, there, gone)
                writer.execute("UPDATE counter SET value = ?", [number])
            if self._follower is not None:
                self._follower(Foreign(names, ()))
        with self._own() as writer:
            mirror.apply(writer, there, {**gone, **late})
            writer.execute("UPDATE counter SET value = ?", [number])
        return names

    def _lines(self, number: int) -> tuple[HistoryRow, ...]:
        """Return the history lines after the last known one. After a restored backup there are
        none: its lines are old."""
        if number < self._known[0] or self._known[0] < 0:
            ((self._line,),) = self._reader.rows(
                "SELECT coalesce(max(sequence), 0) FROM history"
            )
            return ()
        rows = self._reader.rows(
            f"SELECT {', '.join(_HISTORY.columns)} FROM history "  # nosec B608 # names of ours
            "WHERE sequence > ? ORDER BY sequence",
            [self._line],
        )
        return tuple(map(history_row, rows))

    def _read_all(self, connection: Connection) -> tuple[tuple[int, str], frozenset[str]]:
        """Replace the whole copy: at the start, after a long absence, or if the database was
        restored from a backup. Return the last change, and all names from before and after."""
        before = {name for (name,) in self._reader.rows("SELECT name FROM names")}
        ((number, token),) = connection.execute(
            "SELECT number, token FROM changes ORDER BY number DESC LIMIT 1"
        ).fetchall()
        if number < self._known[0]:
            _log.error(
                "the catalog's database has change %d at most, but %d was made: it was "
                "restored from an older backup, and everything published since is lost",
                number,
                self._known[0],
            )
        elif self._known[0] >= 0:
            _log.warning(
                "reading the catalog again: its change log does not continue from the known "
                "state"
            )
        with self._own() as writer:
            mirror.empty(writer)
            for table in TABLES:
                query = f"SELECT {', '.join(table.columns)} FROM {table.name}"  # nosec B608 # names of ours
                with connection.cursor(f"all_{table.name}") as cursor:
                    cursor.itersize = _AT_ONCE
                    cursor.execute(query)
                    while rows := cursor.fetchmany(_AT_ONCE):
                        writer.executemany(table.upsert("?"), rows)
            writer.execute("UPDATE counter SET value = ?", [number])
        after = {name for (name,) in self._reader.rows("SELECT name FROM names")}
        return (number, token), frozenset(before | after)
