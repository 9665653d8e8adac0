"""Content as objects, in the layout of the folder store, and a local cache of weights.

::

    weights/<weights digest>/   adapter_config.json, and last adapter_model.safetensors
    revisions/<revision>/       the bundle's other files, and last bundle.json
    id  changes                 as in the folder store

A folder counts as present if its last file exists, so a partly written one is never seen, and
the next push completes it. Keys contain the content's digest, so writing twice writes the
same. Content is compared with its digest when it is read. Damaged weights stay until a push
overwrites them.

What no name has any more is deleted an hour later, since another registry may be about to read
it. Who stores, who deletes and what is marked stands in the catalog's database (`marks`), so no
object is read, written or deleted under the catalog's lock while a registry serves.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from veneer_registry.bundle import Bundle
from veneer_registry.bundle_files import REQUIRED_FILES
from veneer_registry.disk import FOLDER_MODE, disk_errors, link, remove
from veneer_registry.errors import AdapterCorrupt, InvalidField, QueueFull
from veneer_registry.shared.marks import ASIDE, UNNEEDED, ContentMarks
from veneer_registry.shared.objects import Objects
from veneer_registry.shared.unneeded import ObjectQuarantine
from veneer_registry.store import Store
from veneer_registry.store_folders import checked_digest
from veneer_registry.weights_cache import WeightsCache

_log = logging.getLogger(__name__)

_BUNDLE: Final = "bundle.json"
_LAST: Final = REQUIRED_FILES[-1]
_BROKEN_S: Final = 24 * 3600.0
"""Age of a folder without its last file after which no upload is going on."""
_READS: Final = 3
"""How often an object is read before it counts as damaged: a read may be damaged on its way."""


class ObjectStore(Store):
    """Committed content is in ``objects``; uploads, staging and the cache are in ``root``."""

    remote = True
    quarantine: ObjectQuarantine

    def __init__(
        self, objects: Objects, root: Path, cache_bytes: int, marks: ContentMarks
    ) -> None:
        """``cache_bytes``: bound on the weights on the local disk; see `WeightsCache`."""
        super().__init__(root)
        self.objects = objects
        self._marks = marks
        self.quarantine = ObjectQuarantine(self, objects, marks)
        self._leases: Callable[[str], int] = lambda digest: 0
        self.cache = WeightsCache(
            root,
            cache_bytes,
            lambda digest: self._leases(digest) > 0,
            flag="--store-cache-bytes",
        )
        self.cache.open()
        self._fetching: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        """A lock lives as long as a thread holds it or waits for it."""
        self._guard = threading.Lock()

    # ------------------------------------------------------------------ stored content

    def present(self) -> tuple[set[str], set[str]]:
        """See `Store`."""
        whole = {kind: self._listed(kind)[0] for kind in ("weights", "revisions")}
        return whole["weights"], whole["revisions"]

    def _listed(self, kind: str) -> tuple[set[str], dict[str, float]]:
        """Return the digests of complete folders, and those of the others, each with the time
        of its last write."""
        last = _LAST if kind == "weights" else _BUNDLE
        newest: dict[str, float] = {}
        whole: set[str] = set()
        for key, stat in self.objects.list(kind).items():
            parts = key.split("/")
            if len(parts) != 3 or len(parts[1]) != 64:
                continue  # not ours
            _, digest, name = parts
            newest[digest] = max(newest.get(digest, 0.0), stat.modified)
            if name == last:
                whole.add(digest)
        return whole, {digest: newest[digest] for digest in newest.keys() - whole}

    def mark_broken(self) -> int:
        """Mark folders as unneeded whose upload broke off long ago. Return how many."""
        marked = 0
        for kind in ("weights", "revisions"):
            before = time.time() - _BROKEN_S
            broken = [digest for digest, when in self._listed(kind)[1].items() if when < before]
            if broken:
                self._marks.mark(UNNEEDED, kind, broken)
            marked += len(broken)
        return marked

    def adopt_marks(self) -> None:
        """Take over the marks of versions before December 2026, which were objects."""
        for why in (UNNEEDED, ASIDE):
            for key in self.objects.list(why):
                parts = key.split("/")
                if len(parts) == 3 and parts[1] in ("weights", "revisions"):
                    self._marks.mark(why, parts[1], [parts[2]])
                    self.objects.delete([key])

    def has(self, digest: str, file: str) -> bool:
        """See `Store`."""
        return self._find(digest, file) is not None

    def _find(self, digest: str, file: str) -> str | None:
        checked_digest(digest)
        kinds = ("weights",) if file in REQUIRED_FILES else ("revisions",)
        for kind in kinds:
            if self.objects.stat(f"{kind}/{digest}/{file}") is not None:
                return f"{kind}/{digest}/{file}"
        return None

    def link(self, digest: str, file: str, to: Path) -> bool:
        """See `Store`."""
        if file in REQUIRED_FILES and self.is_local(digest):
            return super().link(digest, file, to)
        key = self._find(digest, file)
        return key is not None and self.objects.get(key, to)

    # ------------------------------------------------------------------------- commit

    def claim(self, bundle: Bundle) -> AbstractContextManager[None]:
        """See `Store`."""
        return self._marks.claim([bundle.weights, bundle.revision])

    def prepare(self, staged: Path, bundle: Bundle, *, damaged: bool) -> bool:
        """Upload the files that are missing. See `Store`. Stored files are not read: their size
        must match."""
        weights, revision = f"weights/{bundle.weights}", f"revisions/{bundle.revision}"
        document = f"{revision}/{_BUNDLE}"
        sizes = {f"{weights}/{name}": (staged / name).stat().st_size for name in REQUIRED_FILES}
        sizes |= {f"{revision}/{name}": (staged / name).stat().st_size for name in bundle.files}
        sizes[document] = len(bundle.document)
        calls = [partial(self._lacks, key, size) for key, size in sizes.items()]
        lacking = {key for key in self.objects.at_once(calls) if key}
        if damaged:
            lacking |= {key for key in sizes if key.startswith(weights)}
        # Those that make a folder count as present come last.
        last = {f"{weights}/{_LAST}", document}
        for key in sorted(lacking, key=lambda each: (each in last, each)):
            # In this thread: large files must not take all of those that `at_once` has.
            if key == document:
                self.objects.write(key, bundle.document)
            else:
                self.objects.put(key, staged / key.rpartition("/")[2])
        self._cache(staged, bundle.weights)
        return any(key.startswith(weights) for key in lacking)

    def _lacks(self, key: str, size: int) -> str:
        """Return the key if the store has no such object of that size, otherwise ""."""
        there = self.objects.stat(key)
        return "" if there is not None and there.size == size else key

    def commit(
        self, staged: Path, bundle: Bundle, registration: tuple[str, bytes] | None = None
    ) -> bool:
        """Do nothing: `prepare` has stored everything, and this is called under the lock."""
        return False

    def _cache(self, staged: Path, weights: str) -> None:
        """Put pushed weights into the cache, if it has room: they need not be fetched then."""
        if weights in self.cache and self.cache.check(weights):
            return
        size = sum((staged / name).stat().st_size for name in REQUIRED_FILES)
        with self._alone(weights), suppress(QueueFull, InvalidField):
            self._fill(weights, size, lambda name, to: link(staged / name, to))

    def bundle(self, revision: str) -> Bundle:
        """See `Store`."""
        data = self.objects.read(f"revisions/{checked_digest(revision)}/{_BUNDLE}")
        if data is None:
            raise ValueError("it is gone")
        document = json.loads(data)
        return Bundle(document["weights"], document["files"])

    # ------------------------------------------------------------------ registrations
    # There are none: a lost catalog comes from the database's backup.

    def registered(self, revision: str) -> bool:
        """True: what a damaged row of the catalog may refer to stays."""
        return True

    def keep_registered(self, revision: str, name: str, data: bytes) -> None:
        """Do nothing."""

    def register(self, revision: str, name: str, data: bytes) -> None:
        """Do nothing."""

    def complete(self, weights: str, revision: str, name: str, data: bytes) -> None:
        """Do nothing."""

    def unregister(self, revision: str, name: str) -> None:
        """Do nothing."""

    def discard(self, weights: Iterable[str], revisions: Iterable[str]) -> Path:
        """Mark content, and move cached weights to a staging folder; see `Store`."""
        weights = tuple(weights)
        trash = self.new_staging()
        try:
            self._marks.mark(UNNEEDED, "weights", weights)
            self._marks.mark(UNNEEDED, "revisions", revisions)
            for digest in weights:
                self.cache.remove(digest)
        except BaseException:
            remove(trash)
            raise
        return trash

    # ------------------------------------------------------------------------ cache

    def keep_while(self, leases: Callable[[str], int], named: Callable[[str], bool]) -> None:
        """See `Store`."""
        self._leases = leases
        self.quarantine.needed = lambda digest: named(digest) or leases(digest) > 0

    def is_local(self, weights: str) -> bool:
        """See `Store`."""
        return self.cache.use(weights) is True

    def fetch(self, weights: str) -> bool:
        """See `Store`. Concurrent calls for the same weights share one download."""
        with self._alone(weights):
            if self.cache.has(weights):
                return False
            key = f"weights/{checked_digest(weights)}"
            looks = [partial(self.objects.stat, f"{key}/{name}") for name in REQUIRED_FILES]
            found = self.objects.at_once(looks)
            size = sum(stat.size for stat in found if stat is not None)

            def get(name: str, to: Path) -> None:
                if not self.objects.get(f"{key}/{name}", to):
                    raise _gone(weights)

            self._fill(weights, size, get)
            return True

    def _fill(self, weights: str, size: int, get: Callable[[str, Path], None]) -> None:
        """Put weights into the cache. The caller holds their lock.

        Args:
            get: brings a file, by name, to a path that does not exist.
        """
        folder = self.cache.partial_folder(weights)
        remove(folder)
        self.cache.make_room(weights, size)
        try:
            with disk_errors(self.root):
                folder.mkdir(FOLDER_MODE)
                for name in REQUIRED_FILES:
                    get(name, folder / name)
            self.cache.commit(weights)
        finally:
            self.cache.release(weights)
            remove(folder)

    @contextmanager
    def files_of(self, bundle: Bundle) -> Iterator[Mapping[str, Path]]:
        """See `Store`."""
        self.fetch(bundle.weights)
        weights = self.weights_folder(bundle.weights)
        found = {name: weights / name for name in REQUIRED_FILES}
        staged = self.new_staging()
        try:
            for name in sorted(bundle.files):
                if not self.objects.get(f"revisions/{bundle.revision}/{name}", staged / name):
                    raise _gone(bundle.weights)
                found[name] = staged / name
            yield found
        finally:
            remove(staged)

    def heal(self, weights: str) -> bool:
        """See `Store`. The local copy may be damaged while the object is intact."""
        self.cache.remove(weights)
        for _ in range(_READS):
            try:
                self.fetch(weights)
            except AdapterCorrupt as error:
                why = error
            except QueueFull:  # the next request fetches them, once others need no more room
                return True
            else:
                return True
        _log.error("the stored object is also damaged: %s", why)
        return False

    @contextmanager
    def _alone(self, weights: str) -> Iterator[None]:
        with self._guard:
            lock = self._fetching.setdefault(weights, threading.Lock())
        with lock:
            yield


def _gone(weights: str) -> AdapterCorrupt:
    return AdapterCorrupt(
        f"stored weights {weights[:12]} are missing from the object store; push the adapter "
        "again",
        metadata={"weights_digest": weights, "why": "gone", "cause": "files"},
    )
