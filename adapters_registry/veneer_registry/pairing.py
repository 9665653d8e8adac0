"""Checks that a catalog and a store belong together, before anything is changed.

Two files of the store show this. ``store/id`` is a random id that is also in the catalog
(`Catalog.fact`): written once, durable before any content. ``store/changes`` is the number
of the catalog's last change, written after each change without fsync. It may lag behind the
catalog after a power cut but is never ahead of it, so a catalog with a smaller number has lost
changes: it is an old copy, or its write-ahead log is gone. Both files have a checksum; a
damaged one is ignored. Rejected: a mark in the catalog alone (lost with the catalog), and
comparing only which adapters exist (a crash in the first publish looks like a lost catalog).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import sqlite3
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from veneer_registry.catalog import Catalog
from veneer_registry.disk import FILE_MODE
from veneer_registry.errors import FailedPrecondition, StoreMismatch
from veneer_registry.replacing import replace_file

_log = logging.getLogger(__name__)

_ID: Final = "id"
_CHANGES: Final = "changes"
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_LINE: Final = re.compile(r"([0-9a-f]{1,32}) ([0-9a-f]{16})\n")
STORE_FACT: Final = "store"
COPY: Final = "catalog-copy.sqlite"
"""The local copy of a catalog in PostgreSQL."""
REBUILT: Final = "catalog.sqlite.rebuilt"
"""The catalog that ``store recover`` has rebuilt but not yet put in place."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The state of a store, read without changing it.

    Attributes:
        present: its folder exists.
        content: it has committed weights or revisions.
        id: the content of ``store/id``; None if missing or damaged.
        changes: the number in ``store/changes``; None if missing or damaged.
    """

    present: bool
    content: bool
    id: str | None
    changes: int | None


@dataclass(frozen=True, slots=True)
class Sides:
    """Texts for errors about a mismatch: the names of store and catalog, and what to do.

    Attributes:
        store: name of the store.
        catalog: name of the catalog.
        metadata: added to the metadata of every such error.
        mount: what to do if the store is empty or missing.
        recover: what to do if the catalog is missing, empty, older, or from elsewhere.
        command: the command that ``recover`` names.
        behind: why a catalog may lack changes.
    """

    store: str
    catalog: str
    metadata: Mapping[str, str]
    mount: str
    recover: str
    command: str
    behind: str

    @classmethod
    def of_folder(cls, data_dir: Path) -> Sides:
        """Return the texts for a data folder."""
        return cls(
            store=str(data_dir / "store"),
            catalog=str(data_dir / "catalog.sqlite"),
            metadata={"data_dir": str(data_dir)},
            mount="Is its disk not mounted yet? Mount or restore it and start "
            f"again. To start afresh instead, move catalog.sqlite* out of {data_dir}",
            recover=_recover(data_dir),
            command=f"veneer-server store recover --data-dir {data_dir}",
            behind="it is an old copy, or its catalog.sqlite-wal is missing",
        )

    def mismatch(self, found: str, what: str, fix: str) -> StoreMismatch:
        """The error for a catalog and a store that do not belong together."""
        command = "mount the store" if found.startswith("store ") else self.command
        return StoreMismatch(
            f"{what}; nothing was changed. {fix}",
            metadata={"found": found, **self.metadata, "fix": command},
        )


def survey(root: Path) -> Survey:
    """Survey the store in this folder."""
    id_ = _read(root / _ID)
    changes = _read(root / _CHANGES)
    return Survey(
        present=root.is_dir(),
        content=any(_has_content(root / kind) for kind in ("weights", "revisions")),
        id=id_,
        changes=None if changes is None else int(changes, 16),
    )


def _has_content(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return any(_HEX.fullmatch(entry.name) for entry in entries)
    return False


def line_of(value: str) -> bytes:
    """Content of ``store/id`` or ``store/changes``: hexadecimal digits with a checksum."""
    return f"{value} {hashlib.sha256(value.encode()).hexdigest()[:16]}\n".encode()


def value_of(data: bytes) -> str | None:
    """Inverse of `line_of`; None for damaged content."""
    with contextlib.suppress(UnicodeDecodeError):
        match = _LINE.fullmatch(data.decode("ascii"))
        if match is not None and line_of(match[1]) == data:
            return match[1]
    return None


def _read(path: Path) -> str | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    value = value_of(data)
    if value is None:
        _log.warning("%s is damaged, rewriting it", path)
    return value


def _recover(data_dir: Path) -> str:
    return (
        "Restore catalog.sqlite (with catalog.sqlite-wal, if there is one) from a backup, or "
        f"run `veneer-server store recover --data-dir {data_dir}`, which rebuilds it from the "
        "stored adapters. To start afresh instead, give another folder with --data-dir"
    )


def check_catalog(data_dir: Path, found: Survey) -> None:
    """Refuse to create a new catalog beside stored adapters. Call it before the catalog is
    opened: SQLite would remove the write-ahead log of an empty one.

    Raises:
        StoreMismatch: metadata ``found`` and ``fix``.
    """
    catalog, sides = data_dir / "catalog.sqlite", Sides.of_folder(data_dir)
    if (data_dir / REBUILT).exists():
        raise sides.mismatch(
            "recovery interrupted",
            f"`veneer-server store recover` was interrupted in {data_dir}",
            f"Run it again: veneer-server store recover --data-dir {data_dir} (or, to keep the "
            f"present catalog, remove {REBUILT})",
        )
    if found.content and (what := _nothing_in(catalog)):
        raise sides.mismatch(
            f"catalog {what.removeprefix('is ')}",
            f"{catalog} {what}, but {data_dir / 'store'} holds adapters",
            sides.recover,
        )


def check_own(data_dir: Path) -> None:
    """Refuse to maintain a data folder if its catalog and content are kept elsewhere.

    Raises:
        FailedPrecondition: the message says what to use instead.
    """
    if (data_dir / COPY).exists() and not (data_dir / "catalog.sqlite").exists():
        raise FailedPrecondition(
            f"{data_dir} belongs to a server with --store and --catalog, so its adapters are "
            "not here: give `store verify` both flags; the servers verify content when they "
            "fetch it and delete unused content; restore a lost catalog from the database's "
            "backup",
            metadata={"cause": "shared", "data_dir": str(data_dir)},
        )


def _nothing_in(catalog: Path) -> str:
    """Why there is no catalog here; "" if there is one (which may be damaged)."""
    if not catalog.exists():
        return "is missing"
    if catalog.stat().st_size == 0:
        return "is empty"
    # Its tables may have been in a write-ahead log that is now gone.
    with (
        contextlib.suppress(sqlite3.Error, UnicodeDecodeError),
        contextlib.closing(
            sqlite3.connect(f"file:{quote(str(catalog))}?mode=ro", uri=True)
        ) as db,
    ):
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return "" if tables else "is empty"
    return ""


def check_pair(sides: Sides, found: Survey, catalog: Catalog) -> None:
    """Refuse a catalog and a store if one is empty, older, or from another place.

    Raises:
        StoreMismatch: metadata ``found`` and ``fix``.
    """
    own, names = catalog.fact(STORE_FACT), not catalog.empty
    strange = own is not None and found.id is not None and own != found.id
    if names and not found.content:
        is_ = "is empty" if found.present else "is missing"
        raise sides.mismatch(
            f"store {is_.removeprefix('is ')}",
            f"{sides.store} {is_}, but the catalog has adapters",
            sides.mount,
        )
    # A catalog without adapters proves nothing by its content: it must have the store's id.
    unknown = not names and ((own is None) != (found.id is None) or catalog.number == 0)
    if found.content and (strange or unknown):
        raise sides.mismatch(
            "another store's catalog",
            f"{sides.catalog} was not made for the adapters in {sides.store}",
            sides.recover,
        )
    if found.content and found.changes is not None and found.changes > catalog.number:
        raise sides.mismatch(
            "catalog older than store",
            f"{sides.catalog} lacks the last {found.changes - catalog.number} changes: "
            f"{sides.behind}",
            sides.recover,
        )


def check_vanished(sides: Sides, catalog: Catalog, unnamed: set[str]) -> None:
    """Refuse a catalog that has lost its rows for stored revisions.

    Args:
        unnamed: stored revisions that no row names.

    Raises:
        StoreMismatch: metadata ``found`` and ``fix``.
    """
    vanished = catalog.vanished(unnamed)
    if vanished:
        raise sides.mismatch(
            "catalog rows missing",
            f"{sides.catalog} has lost its rows for {len(vanished)} stored revisions that its "
            "history records",
            sides.recover,
        )


def settle_id(write: Callable[[bytes], None], found: Survey, catalog: Catalog) -> None:
    """Give catalog and store the same id if one has none yet; they must belong together.

    Args:
        write: replaces the content of ``store/id``, durably.
    """
    own = catalog.fact(STORE_FACT)
    if own is None or (found.id is not None and own != found.id):
        own = found.id or secrets.token_hex(16)
        with catalog.change() as change:
            change.set_fact(STORE_FACT, own)
    if found.id != own:
        write(line_of(own))


def write_id(root: Path, data: bytes) -> None:
    """Write ``store/id``."""
    replace_file(root / _ID, data, mode=FILE_MODE)


class ChangeMark:
    """Writes ``store/changes``."""

    def __init__(self, root: Path) -> None:
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._path = root / _CHANGES

    def write(self, number: int) -> None:
        """Record a durable change. Best effort: it only helps to detect a loss."""
        data = line_of(f"{number:032x}")
        with self._lock, contextlib.suppress(OSError):
            if self._fd is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._fd = os.open(self._path, flags, FILE_MODE)
                os.ftruncate(self._fd, len(data))
            os.pwrite(self._fd, data, 0)

    def close(self) -> None:
        """Close the file; no more changes will be written. Idempotent."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
