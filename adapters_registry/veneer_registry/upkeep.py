"""Maintenance of a data folder from outside a server: verify stored content, remove unneeded
content. Needs no base model.

`verify` only reads, so it may run beside the server that owns the folder. `collect`
takes the folder's lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

from veneer_registry.catalog import Catalog
from veneer_registry.errors import AdapterCorrupt, FailedPrecondition, InvalidField
from veneer_registry.lock import OwnerLock
from veneer_registry.pairing import Sides, check_catalog, check_own, check_pair, survey
from veneer_registry.rows import Who
from veneer_registry.schema import VERSION, damaged
from veneer_registry.store import Store
from veneer_registry.store_folders import size_of
from veneer_registry.stored_adapter import verify_weights
from veneer_registry.strict_json import parse_object

COMMAND: Final = Who("veneer-server store", "command line")


@dataclass(frozen=True, slots=True)
class Damage:
    """Stored content that does not match its digest.

    Attributes:
        digest: weights digest or revision.
        adapters: ``name@revision`` of the adapters that need it.
        why: one sentence.
    """

    kind: str
    digest: str
    adapters: tuple[str, ...]
    why: str


@dataclass(slots=True)
class Verified:
    """What `verify` found; sizes in bytes.

    Attributes:
        quarantined: weights that were found damaged earlier and are not served.
        unreferenced: content that no adapter needs; `collect` removes it.
    """

    names: int = 0
    revisions: int = 0
    weights: int = 0
    bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    unreferenced: int = 0
    uploads: int = 0


@dataclass(slots=True)
class Collected:
    """What `collect` removed, or would remove; bytes as they were on disk."""

    unreferenced: int = 0
    uploads: int = 0
    quarantined: int = 0
    bytes: int = 0


Row = tuple[str, str, str]
"""(name, revision, weights digest)"""


@contextlib.contextmanager
def _reading(data_dir: Path) -> Iterator[sqlite3.Connection]:
    path = data_dir / "catalog.sqlite"
    check_own(data_dir)
    if not path.exists():
        raise InvalidField(
            f"{data_dir} is not a data folder (it has no catalog.sqlite); give the one of a "
            "server with --data-dir",
            metadata={"field": "data_dir"},
        )
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None)
        ) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != VERSION:
                raise FailedPrecondition(
                    f"{path} has schema {version}, this Veneer knows {VERSION}; start a server "
                    "of this version on it once, which upgrades it",
                    metadata={"schema": str(version), "known": str(VERSION)},
                )
            yield connection
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise damaged(path, str(error)) from error


def verify(
    data_dir: Path, progress: Callable[[int, int], None] = lambda at, of: None
) -> Verified:
    """Read every stored byte and compare it with its digest.

    Args:
        progress: called after each weights or revision folder with the number done and the
            total.

    Raises:
        InvalidField: ``data_dir`` is not a data folder.
        FailedPrecondition: the catalog is damaged, or of another version.
    """
    found = Verified()
    root = data_dir / "store"
    with _reading(data_dir) as db:
        problems = [row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
        if problems:
            raise damaged(data_dir / "catalog.sqlite", problems[0])
        rows: list[Row] = db.execute("SELECT name, revision, weights FROM revisions").fetchall()
        found.quarantined = dict(db.execute("SELECT weights, why FROM quarantine"))
        (found.names,) = db.execute("SELECT count(*) FROM names").fetchone()
        by_weights, by_revision = grouped(rows, 2), grouped(rows, 1)
        found.revisions, found.weights = len(by_revision), len(by_weights)
        total, at = len(by_weights) + len(by_revision), 0
        for kind, group, check in (
            ("weights", by_weights, check_weights),
            ("revisions", by_revision, check_revision),
        ):
            for digest, users in group.items():
                folder = root / kind / digest
                if digest not in found.quarantined:
                    why = check(folder, digest)
                    # The server that owns the folder may have removed it meanwhile.
                    if why is not None and _still_there(db, digest):
                        found.damaged.append(Damage(kind, digest, tuple(users), why))
                found.bytes += size_of(folder)
                at += 1
                progress(at, total)
        for kind, group in (("weights", by_weights), ("revisions", by_revision)):
            found.unreferenced += sum(
                path.name not in group and not _still_there(db, path.name)
                for path in _entries(root / kind)
            )
    found.uploads = len(_entries(root / "uploads"))
    return found


def grouped(rows: list[Row], by: int) -> dict[str, list[str]]:
    """Group the rows by the digest in column ``by``: digest -> ``name@revision`` of each."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row[by], []).append(f"{row[0]}@{row[1][:12]}")
    return groups


def _still_there(db: sqlite3.Connection, digest: str) -> bool:
    sql = "SELECT 1 FROM revisions WHERE weights = ?1 OR revision = ?1 LIMIT 1"
    return db.execute(sql, (digest,)).fetchone() is not None


def check_weights(folder: Path, digest: str) -> str | None:
    try:
        verify_weights(folder, digest)
    except AdapterCorrupt as error:
        return str(error)
    return None


def check_revision(folder: Path, revision: str) -> str | None:
    try:
        data = (folder / "bundle.json").read_bytes()
        if hashlib.sha256(data).hexdigest() != revision:
            return "bundle.json differs from the published one; push the adapter again"
        bundle = parse_object(data, file="bundle.json")
        files = bundle["files"]
        assert isinstance(files, dict)
        for name, expected in files.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return f"{name} differs from the published one; push the adapter again"
    except OSError as error:
        return f"it cannot be read ({error.strerror}); push the adapter again"
    return None


def quarantine(data_dir: Path, damaged: list[Damage]) -> int:
    """Stop serving damaged weights until they are pushed again. Returns how many.

    Raises:
        StoreLocked: a server owns the folder; it will do this itself, at the next load.
    """
    weights = [damage for damage in damaged if damage.kind == "weights"]
    with (
        OwnerLock(data_dir),
        contextlib.closing(Catalog(data_dir / "catalog.sqlite")) as catalog,
    ):
        store = Store(data_dir / "store")
        rows = tuple(catalog.names())
        for damage in weights:
            with catalog.change(COMMAND, time.time()) as change:
                change.quarantine(damage.digest, damage.why)
                for row in rows:
                    for revision, digest, _ in row.revisions:
                        if digest == damage.digest:
                            change.note("quarantined", row.name, revision, damage.why)
            store.quarantine.add(damage.digest)
    return len(weights)


def collect(
    data_dir: Path, *, uploads_older_than: float, quarantine: bool, dry_run: bool
) -> Collected:
    """Remove content that no adapter needs, old interrupted uploads, and (with ``quarantine``)
    the content in quarantine.

    Args:
        uploads_older_than: Unix seconds of their last byte.

    Raises:
        StoreLocked: a server owns the folder; it removes such content itself.
        StoreMismatch, CatalogDamaged: content that the catalog does not name may be needed.
        FailedPrecondition: the catalog is damaged, or of another version.
    """
    with _reading(data_dir), OwnerLock(data_dir):
        needed = _needed(data_dir)
        store = Store(data_dir / "store")
        weights, revisions = store.present()
        unneeded = (weights - needed, revisions - needed)
        folders = [store.weights_folder(digest) for digest in unneeded[0]]
        folders += [store.revision_folder(revision) for revision in unneeded[1]]
        stale = store.uploads.stale(uploads_older_than)
        held = store.quarantine.held() if quarantine else []
        collected = Collected(
            unreferenced=len(folders),
            uploads=len(stale),
            quarantined=len(held),
            bytes=sum(size_of(folder) for folder in (*folders, *stale, *held)),
        )
        if not dry_run:
            store.drop_staging(store.discard(*unneeded))
            for folder in (*stale, *held):
                store.drop_staging(folder)
    return collected


def _needed(data_dir: Path) -> set[str]:
    """Return the weights and revisions that the catalog names. Fails if any row is damaged,
    since all other content is about to be removed."""
    found = survey(data_dir / "store")
    check_catalog(data_dir, found)
    with contextlib.closing(Catalog(data_dir / "catalog.sqlite")) as catalog:
        check_pair(Sides.of_folder(data_dir), found, catalog)
        rows = tuple(catalog.names())
    if wrong := sum(row.damaged for row in rows):
        raise damaged(data_dir / "catalog.sqlite", f"{wrong} rows do not match their digests")
    return {
        digest
        for row in rows
        for revision, weights, _ in row.revisions
        for digest in (revision, weights)
    }


def _entries(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return list(folder.iterdir())
    return []
