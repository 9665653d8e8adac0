"""The registries that share a catalog, and how far each of them and its followers are.

Two tables in the default tenant's schema. A registry writes its row about once a second, so a
row that is older than a lease belongs to one that is gone or cut off. Times are the database's.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, LiteralString

from veneer_registry.shared.postgres import PostgresAddress, PostgresLink, execute_many
from veneer_registry.shared.tables import create_missing

_TABLES: Final[LiteralString] = """
CREATE TABLE IF NOT EXISTS registries (
    id TEXT PRIMARY KEY,
    heard TIMESTAMPTZ NOT NULL,
    followers BIGINT NOT NULL      -- whose lease has not expired
);
CREATE TABLE IF NOT EXISTS reached ( -- the change of a tenant's catalog that a registry has
    id TEXT NOT NULL REFERENCES registries ON DELETE CASCADE,
    tenant TEXT NOT NULL,
    number BIGINT NOT NULL,
    PRIMARY KEY (id, tenant)
);
"""

_FORGET_S: Final = 3600
"""Seconds after which the row of a registry that is gone is deleted."""


@dataclass(frozen=True, slots=True)
class Others:
    """The other registries with their followers: how many there are, and how many of them have
    a change. A registry and its followers count as having it once all of them do."""

    live: int
    applied: int


class RegistryPeers:
    """One registry's row, and those of the others. Thread-safe; all methods block.

    Raises Unavailable if the database cannot be reached.
    """

    def __init__(self, address: PostgresAddress, own: str, lease_s: float) -> None:
        """Does not connect.

        Args:
            address: of the default tenant's catalog.
            own: id of this registry's run.
        """
        self._link = PostgresLink(address, "peers")
        self._own = own
        self._lease_s = lease_s
        self._lock = threading.Lock()
        self._made = False

    def announce(self, followers: int, reached: Mapping[str, int]) -> None:
        """Write this registry's row.

        Args:
            followers: number of its live followers.
            reached: by tenant, the change that this registry and all of them have.
        """
        with self._lock, self._link.answering() as connection:
            if not self._made:
                with connection.transaction():
                    # Two registries that start at once must not both create them.
                    connection.execute("SELECT pg_advisory_xact_lock(hashtext('veneer peers'))")
                    create_missing(connection, "reached", _TABLES)
                self._made = True
            with connection.transaction():
                connection.execute(
                    "INSERT INTO registries VALUES (%s, now(), %s) ON CONFLICT (id) "
                    "DO UPDATE SET heard = excluded.heard, followers = excluded.followers",
                    [self._own, followers],
                )
                execute_many(
                    connection,
                    "INSERT INTO reached VALUES (%s, %s, %s) ON CONFLICT (id, tenant) "
                    "DO UPDATE SET number = excluded.number",
                    [(self._own, tenant, number) for tenant, number in reached.items()],
                )
                connection.execute(
                    "DELETE FROM registries WHERE heard < now() - make_interval(secs => %s)",
                    [_FORGET_S],
                )

    def others(self, tenant: str, number: int) -> Others:
        """The other live registries and their followers, and how many of them have a change."""
        with self._lock, self._link.answering() as connection:
            rows = connection.execute(
                "SELECT followers, coalesce(number, -1) >= %s FROM registries "
                "LEFT JOIN reached ON reached.id = registries.id AND tenant = %s "
                "WHERE registries.id <> %s AND heard > now() - make_interval(secs => %s)",
                [number, tenant, self._own, self._lease_s],
            ).fetchall()
        return Others(
            sum(1 + followers for followers, _ in rows),
            sum(1 + followers for followers, has in rows if has),
        )

    def leave(self) -> None:
        """Delete this registry's row: nobody needs to wait for it."""
        with self._lock, self._link.answering() as connection:
            connection.execute("DELETE FROM registries WHERE id = %s", [self._own])

    def close(self) -> None:
        """Close the connection."""
        self._link.close()
        with self._lock:
            self._link.drop()
