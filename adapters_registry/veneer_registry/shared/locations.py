"""`Locations` of a registry with a catalog in PostgreSQL and content in an object store."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from veneer_registry.catalog import Catalog
from veneer_registry.disk import make_private
from veneer_registry.errors import InvalidField, VeneerError
from veneer_registry.freshness import Freshness
from veneer_registry.pairing import COPY, Sides, Survey, line_of, value_of
from veneer_registry.shared.catalog import PostgresCatalog
from veneer_registry.shared.marks import ContentMarks
from veneer_registry.shared.object_store import ObjectStore
from veneer_registry.shared.objects import Objects
from veneer_registry.shared.postgres import PostgresAddress

_log = logging.getLogger(__name__)

_CACHE: Final = "cache"


class SharedLocations:
    """A catalog and a store that several registries share. Each has its own data folder.

    The data folder can be rebuilt from them, except for uploads in progress and the list of
    adapters in memory.
    """

    def __init__(
        self, data_dir: Path, address: PostgresAddress, objects: Objects, *, cache_bytes: int
    ) -> None:
        """Connects to nothing. Raises InvalidField for a malformed address."""
        address.check()
        self._data_dir = data_dir
        self._address = address
        self._objects = objects
        self._cache_bytes = cache_bytes
        self._catalog: PostgresCatalog | None = None
        self._marks = ContentMarks(address)
        self._mark = ObjectMark(objects)
        self.sides = Sides(
            store=objects.url,
            catalog=f"the catalog in PostgreSQL (schema {address.schema})",
            metadata={"store": objects.url},
            mount="Is it the right bucket and prefix? Restore the objects and start again",
            recover="Restore the database from its newest backup. To accept that the changes "
            f"since are lost, delete {objects.url}/changes; to start afresh instead, give "
            "another prefix with --store and another database with --catalog",
            command="restore the database",
            behind="it was restored from an older backup",
        )

    def open_catalog(self) -> Catalog:
        """See `Locations`."""
        if (self._data_dir / "catalog.sqlite").exists():
            raise InvalidField(
                f"{self._data_dir} holds adapters of its own, which --store and --catalog "
                "would hide: give another folder with --data-dir, and push them again",
                metadata={"field": "data_dir"},
            )
        make_private(self._data_dir, [self._data_dir, self._data_dir / _CACHE])
        self._catalog = PostgresCatalog(
            self._address, self._data_dir / COPY, after_change=self._mark.write
        )
        return self._catalog

    @property
    def freshness(self) -> Freshness:
        """See `Locations`."""
        assert self._catalog is not None, "`open_catalog` comes first"
        return self._catalog.age

    def survey(self) -> Survey:
        """See `Locations`."""
        number, token = self._mark.read()
        survey = Survey(
            present=True,
            content=self._objects.any("weights") or self._objects.any("revisions"),
            id=_value(self._objects.read("id")),
            changes=number,
        )
        catalog = self._catalog
        if catalog is None or number is None or token is None or number > catalog.number:
            return survey
        if not catalog.has(number, token):
            raise self.sides.mismatch(
                "catalog of another history",
                f"{self.sides.catalog} made another change {number} than the one that the "
                "store knows: it was restored from a backup and has been used since",
                self.sides.recover,
            )
        return replace(survey, changes=number)

    def open_store(self) -> ObjectStore:
        """See `Locations`."""
        store = ObjectStore(
            self._objects, self._data_dir / _CACHE, self._cache_bytes, self._marks
        )
        try:
            store.adopt_marks()
            if dropped := self._objects.drop_stale_parts(time.time()):
                _log.warning("removed %d interrupted multipart uploads", dropped)
            if broken := store.mark_broken():
                _log.warning("%d folders of interrupted uploads will be removed", broken)
        except VeneerError as error:  # the store may forbid listing them
            _log.warning("interrupted uploads are not removed: %s", error)
        return store

    def write_id(self, data: bytes) -> None:
        """See `Locations`."""
        self._objects.write("id", data)

    def close(self) -> None:
        """See `Locations`."""
        if self._catalog is not None:
            self._catalog.join()
        self._mark.close()
        self._marks.close()


class ObjectMark:
    """Writes the object ``changes``: number and token of the last change, one line each. A
    thread writes it, so that no publication waits. It may lag behind the catalog; see
    `pairing`."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._new = threading.Condition()
        self._latest: tuple[int, str] | None = None
        self._ended = False
        self._thread: threading.Thread | None = None

    def read(self) -> tuple[int | None, str | None]:
        """Read (number, token); each is None if missing or damaged. Raises Unavailable."""
        lines = (self._objects.read("changes") or b"").splitlines(keepends=True)
        values = [_value(line) for line in lines[:2]]
        if len(values) < 2 or values[0] is None:
            return None, None
        return int(values[0], 16), values[1]

    def write(self, number: int, token: str) -> None:
        """Have the thread record a durable change. Returns at once."""
        with self._new:
            self._latest = (number, token)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mark", daemon=True)
                self._thread.start()
            self._new.notify()

    def close(self) -> None:
        """Write the last change, and end the thread. Idempotent."""
        with self._new:
            self._ended = True
            self._new.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._new:
                while self._latest is None and not self._ended:
                    self._new.wait()
                latest, self._latest = self._latest, None
            if latest is None:
                return
            with contextlib.suppress(VeneerError):  # it only helps to detect a loss
                self._objects.write(
                    "changes", line_of(f"{latest[0]:032x}") + line_of(latest[1])
                )


def _value(data: bytes | None) -> str | None:
    return None if data is None else value_of(data)
