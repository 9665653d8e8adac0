"""Compares the objects of a store with the catalog in PostgreSQL.

It changes neither, so it may run beside the servers that own them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from psycopg import sql

from veneer_registry.errors import FailedPrecondition, InvalidField
from veneer_registry.shared.objects import Objects
from veneer_registry.shared.postgres import Connection, PostgresAddress, PostgresLink
from veneer_registry.shared.tables import VERSION
from veneer_registry.upkeep import Damage, Row, Verified, check_revision, check_weights, grouped


def verify_shared(
    address: PostgresAddress,
    objects: Objects,
    progress: Callable[[int, int], None] = lambda at, of: None,
) -> Verified:
    """Fetch every stored byte and compare it with its digest. Needs local disk for the largest
    adapter.

    Args:
        progress: as for `upkeep.verify`.

    Raises:
        InvalidField: there is no catalog at the address.
        FailedPrecondition: the catalog is of another version.
        Unavailable: the database or the object store cannot be reached.
    """
    address.check()
    link = PostgresLink(address, "store verify")
    try:
        return _verify(link, address, objects, progress)
    finally:
        link.drop()


def _verify(
    link: PostgresLink,
    address: PostgresAddress,
    objects: Objects,
    progress: Callable[[int, int], None],
) -> Verified:
    found = Verified()
    with link.answering() as db:
        _check(db, address)
        rows: list[Row] = [
            (str(name), str(revision), str(weights))
            for name, revision, weights in db.execute(
                "SELECT name, revision, weights FROM revisions ORDER BY name, sequence"
            )
        ]
        found.quarantined = {
            str(weights): str(why)
            for weights, why in db.execute("SELECT weights, why FROM quarantine")
        }
        found.names = sum(1 for _ in db.execute("SELECT name FROM names"))
    by_weights, by_revision = grouped(rows, 2), grouped(rows, 1)
    found.revisions, found.weights = len(by_revision), len(by_weights)
    total, at = len(by_weights) + len(by_revision), 0
    for kind, group, check in (
        ("weights", by_weights, check_weights),
        ("revisions", by_revision, check_revision),
    ):
        for digest, users in group.items():
            if digest not in found.quarantined:
                why, size = _fetched(objects, f"{kind}/{digest}", digest, check)
                # A server may have removed it meanwhile.
                if why is not None and _still_there(link, digest):
                    found.damaged.append(Damage(kind, digest, tuple(users), why))
                found.bytes += size
            at += 1
            progress(at, total)
    for kind, group in (("weights", by_weights), ("revisions", by_revision)):
        stored = {key.split("/")[1] for key in objects.list(kind)}
        found.unreferenced += sum(
            not _still_there(link, digest) for digest in stored - group.keys()
        )
    return found


def _check(db: Connection, address: PostgresAddress) -> None:
    db.execute("SET default_transaction_read_only TO on")
    there = db.execute(
        "SELECT 1 FROM pg_tables WHERE schemaname = %s AND tablename = 'meta'",
        [address.schema],
    ).fetchone()
    if there is None:
        raise InvalidField(
            f"there is no catalog (schema {address.schema}) at --catalog; give the address "
            "that the servers have",
            metadata={"field": "catalog"},
        )
    query = sql.SQL("SELECT version FROM {}.meta").format(sql.Identifier(address.schema))
    row = db.execute(query).fetchone()
    if row is None or row[0] != VERSION:
        raise FailedPrecondition(
            f"the catalog in PostgreSQL has schema {row and row[0]}, this Veneer knows "
            f"{VERSION}; use the version that made it",
            metadata={"schema": str(row and row[0]), "known": str(VERSION)},
        )


def _fetched(
    objects: Objects, prefix: str, digest: str, check: Callable[[Path, str], str | None]
) -> tuple[str | None, int]:
    """Fetch a folder of the store. Return (what is wrong with it or None, its size)."""
    with tempfile.TemporaryDirectory(prefix="veneer-verify-") as name:
        folder, size = Path(name), 0
        for key, stat in objects.list(prefix).items():
            to = folder / key.rpartition("/")[2]
            size += stat.size if objects.get(key, to) else 0
        return check(folder, digest), size


def _still_there(link: PostgresLink, digest: str) -> bool:
    with link.answering() as db:
        row = db.execute(
            "SELECT 1 FROM revisions WHERE weights = %s OR revision = %s LIMIT 1",
            [digest, digest],
        ).fetchone()
    return row is not None
