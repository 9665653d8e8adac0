"""What the registries of a catalog tell each other about stored content, in its database.

``marks``: content that no name has any more (`UNNEEDED`), or had when a registry started
(`ASIDE`). It is deleted later. ``claims``: content that a registry is storing; it stays until
it has a name or the claim ends. ``deleting``: content that a registry is deleting; whoever
wants to store it waits. So nothing is asked of the object store under the catalog's lock.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, LiteralString

from veneer_registry.errors import Unavailable, VeneerError
from veneer_registry.shared.postgres import (
    Connection,
    PostgresAddress,
    PostgresLink,
    execute_many,
)
from veneer_registry.shared.tables import create_missing

_log = logging.getLogger(__name__)

UNNEEDED: Final = "unneeded"
ASIDE: Final = "aside"

CLAIM_S: Final = 24 * 3600
"""Seconds after which the claim of a registry that is gone ends."""
DELETING_S: Final = 300
"""Seconds after which a registry that has not said that it goes on deleting counts as gone."""
WAIT_S: Final = 90.0
"""Seconds to wait for a deletion by another registry."""
_PAUSE_S: Final = 0.1

_TABLES: Final[LiteralString] = """
CREATE TABLE IF NOT EXISTS marks (
    kind TEXT NOT NULL,            -- weights or revisions
    digest TEXT NOT NULL,
    why TEXT NOT NULL,
    since TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (kind, digest, why)
);
CREATE TABLE IF NOT EXISTS claims (
    id TEXT NOT NULL,
    digest TEXT NOT NULL,
    until TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (digest, id)
);
CREATE TABLE IF NOT EXISTS deleting (
    digest TEXT PRIMARY KEY,
    id TEXT NOT NULL,
    until TIMESTAMPTZ NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class Mark:
    """Marked content. ``age_s`` is the time since it was marked."""

    kind: str
    digest: str
    why: str
    age_s: float


class ContentMarks:
    """The three tables of one catalog. Thread-safe; all methods block.

    Raises Unavailable if the database cannot be reached.
    """

    def __init__(self, address: PostgresAddress) -> None:
        """Does not connect."""
        self._link = PostgresLink(address, "marks")
        self._lock = threading.Lock()
        self._made = False
        self._own = secrets.token_hex(8)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[Connection]:
        """A transaction that no other registry's overlaps. They are short."""
        with self._lock, self._link.answering() as connection, connection.transaction():
            connection.execute(
                "SELECT pg_advisory_xact_lock("
                "hashtextextended(current_schema() || ' marks', 0))"
            )
            if not self._made:
                create_missing(connection, "deleting", _TABLES)
            yield connection
        self._made = True
        # There is one of these for each tenant, and it is rarely needed.
        with self._lock:
            self._link.drop()

    def mark(self, why: str, kind: str, digests: Iterable[str]) -> None:
        """Mark content. Marking it again renews the mark's time."""
        with self._alone() as connection:
            execute_many(
                connection,
                "INSERT INTO marks (kind, digest, why) VALUES (%s, %s, %s) "
                "ON CONFLICT (kind, digest, why) DO UPDATE SET since = now()",
                [(kind, digest, why) for digest in digests],
            )

    def marked(self) -> list[Mark]:
        """All marks, oldest first."""
        with self._alone() as connection:
            rows = connection.execute(
                "SELECT kind, digest, why, extract(epoch FROM now() - since)::float "
                "FROM marks ORDER BY since"
            ).fetchall()
        return [Mark(*row) for row in rows]

    def forget(self, digests: Iterable[str]) -> None:
        """Remove all marks of content that is needed."""
        with self._alone() as connection:
            connection.execute("DELETE FROM marks WHERE digest = ANY(%s)", [list(digests)])

    @contextlib.contextmanager
    def claim(self, digests: Sequence[str]) -> Iterator[None]:
        """Keep all registries from deleting content within the block, whether or not it is
        there. Removes its marks. Waits for a deletion that has begun."""
        claim, end = secrets.token_hex(8), time.monotonic() + WAIT_S
        try:
            while not self._claimed(claim, list(digests)):
                if time.monotonic() > end:
                    raise Unavailable(
                        "the same content is being deleted from the object store: try again",
                        metadata={"cause": "deleting"},
                        retry_after_s=5.0,
                    )
                time.sleep(_PAUSE_S)
            yield
        finally:
            self._unclaim(claim)

    def _claimed(self, claim: str, digests: list[str]) -> bool:
        with self._alone() as connection:
            connection.execute("DELETE FROM claims WHERE until < now()")
            connection.execute("DELETE FROM deleting WHERE until < now()")
            connection.execute(
                "INSERT INTO claims SELECT %s, unnest(%s::text[]), "
                "now() + make_interval(secs => %s) ON CONFLICT DO NOTHING",
                [claim, digests, CLAIM_S],
            )
            connection.execute("DELETE FROM marks WHERE digest = ANY(%s)", [digests])
            found = connection.execute(
                "SELECT 1 FROM deleting WHERE digest = ANY(%s) LIMIT 1", [digests]
            ).fetchone()
        return found is None

    def _unclaim(self, claim: str) -> None:
        try:
            with self._alone() as connection:
                connection.execute("DELETE FROM claims WHERE id = %s", [claim])
        except VeneerError as error:
            _log.warning("content stays claimed for a day: %s", error)

    def begin_deleting(self, digests: Iterable[str]) -> set[str]:
        """Return those that no registry claims or is deleting: nobody stores them again until
        `deleted`. They keep their marks until then."""
        with self._alone() as connection:
            connection.execute("DELETE FROM deleting WHERE until < now()")
            rows = connection.execute(
                "INSERT INTO deleting SELECT d, %s, now() + make_interval(secs => %s) "
                "FROM unnest(%s::text[]) AS d WHERE NOT EXISTS "
                "(SELECT 1 FROM claims WHERE claims.digest = d AND until > now()) "
                "ON CONFLICT DO NOTHING RETURNING digest",
                [self._own, DELETING_S, sorted(set(digests))],
            ).fetchall()
        return {digest for (digest,) in rows}

    def go_on_deleting(self, digests: Iterable[str]) -> None:
        """Say that this registry is still deleting. Raises Unavailable if that took too long
        since the last time: another registry may be storing the content again."""
        wanted = sorted(set(digests))
        with self._alone() as connection:
            rows = connection.execute(
                "UPDATE deleting SET until = now() + make_interval(secs => %s) "
                "WHERE id = %s AND digest = ANY(%s) AND until > now() RETURNING digest",
                [DELETING_S, self._own, wanted],
            ).fetchall()
        if len(rows) < len(wanted):
            raise Unavailable(
                "this registry was paused while it deleted content: it goes on later"
            )

    def deleted(self, digest: str) -> None:
        """Note that content is gone."""
        with self._alone() as connection:
            connection.execute("DELETE FROM marks WHERE digest = %s", [digest])
            connection.execute(
                "DELETE FROM deleting WHERE digest = %s AND id = %s", [digest, self._own]
            )

    def close(self) -> None:
        """Close the connection."""
        self._link.close()
        with self._lock:
            self._link.drop()
