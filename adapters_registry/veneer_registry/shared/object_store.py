"""Content as objects, in the layout of the folder store, and a local cache of weights.

::

    weights/<weights digest>/   adapter_config.json, and last adapter_model.safetensors
    revisions/<revision>/       the bundle's other files, registrations, and last bundle.json
    unneeded/<kind>/<digest>    marks content that no name has any more; deleted an hour later
    aside/<kind>/<digest>       marks content that no name had at start-up; kept like quarantine
    quarantine/<digest>/        weights that were found damaged
    id  changes                 as in the folder store

A folder counts as present if its last file exists, so a partly written one is never seen, and
the next push completes it. Keys contain the content's digest, so writing twice writes the same.
Content is compared with its digest when it is read.

Deletion is delayed because another registry may be about to read the content. A registry that
stores content again removes its mark. This and the deletion of marked content both happen under
the catalog's lock.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from veneer_registry.bundle import Bundle
from veneer_registry.bundle_files import REQUIRED_FILES
from veneer_registry.disk import disk_errors, remove
from veneer_registry.errors import AdapterCorrupt
from veneer_registry.shared.cache import SharedWeightsCache
from veneer_registry.shared.objects import Objects
from veneer_registry.shared.unneeded import UNNEEDED, ObjectQuarantine
from veneer_registry.store import REGISTRATION, Store
from veneer_registry.store_folders import checked_digest
from veneer_registry.stored_adapter import verify_weights

_log = logging.getLogger(__name__)

_BUNDLE: Final = "bundle.json"
_LAST: Final = REQUIRED_FILES[-1]
_BROKEN_S: Final = 24 * 3600.0
"""Age of a folder without its last file after which no upload is going on."""
_READS: Final = 3
"""How often an object is read before it counts as damaged: a read may be damaged on its way."""


class ObjectStore(Store):
    """Committed content is in ``objects``; uploads, staging and the cache are in ``root``."""

    quarantine: ObjectQuarantine

    def __init__(self, objects: Objects, root: Path, cache_bytes: int) -> None:
        """``cache_bytes``: bound on the weights on the local disk; see `SharedWeightsCache`."""
        super().__init__(root)
        self.objects = objects
        self.quarantine = ObjectQuarantine(self, objects)
        self.cache = SharedWeightsCache(self, super().present()[0], cache_bytes)
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
            for digest, when in self._listed(kind)[1].items():
                if when < time.time() - _BROKEN_S:
                    self.objects.write(f"{UNNEEDED}/{kind}/{checked_digest(digest)}", b"")
                    marked += 1
        return marked

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

    def prepare(self, staged: Path, bundle: Bundle) -> bool:
        """Upload the content while others commit, since it may be large. See `Store`."""
        return self._send(staged, bundle)

    def commit(
        self, staged: Path, bundle: Bundle, registration: tuple[str, bytes] | None = None
    ) -> bool:
        """See `Store`. Stored weights are not read: their size must match."""
        fresh = self._send(staged, bundle, registration, unmark=True)
        with disk_errors(self.root):
            if not self._weights_intact(bundle.weights):
                self._place(staged, self.weights_folder(bundle.weights), REQUIRED_FILES)
            self.cache.add(bundle.weights)
        return fresh

    def _send(
        self,
        source: Path,
        bundle: Bundle,
        registration: tuple[str, bytes] | None = None,
        *,
        unmark: bool = False,
    ) -> bool:
        """Upload the files that are missing. Return True if any weights file was. Under the
        lock nearly all are there, and the rest takes one round trip, since others wait.

        Args:
            registration: name and content of the revision's registration, to be written, too.
            unmark: also remove the content's marks.
        """
        weights, revision = f"weights/{bundle.weights}", f"revisions/{bundle.revision}"
        document = f"{revision}/{_BUNDLE}"
        sizes = {f"{weights}/{name}": (source / name).stat().st_size for name in REQUIRED_FILES}
        sizes |= {f"{revision}/{name}": (source / name).stat().st_size for name in bundle.files}
        sizes[document] = len(bundle.document)
        calls = [partial(self._lacks, key, size) for key, size in sizes.items()]
        if unmark:
            calls.append(partial(self._unmark, bundle))
        if registration is not None:
            name, data = registration
            calls.append(partial(self._write, f"{revision}/{name}", data))
        lacking = [key for key in self.objects.at_once(calls) if key]
        # Those that make a folder count as present come last.
        last = {f"{weights}/{_LAST}", document}
        for key in sorted(lacking, key=lambda each: each in last):
            # In this thread: large files must not take all of those that `at_once` has.
            if key == document:
                self.objects.write(key, bundle.document)
            else:
                self.objects.put(key, source / key.rpartition("/")[2])
        return any(key.startswith(weights) for key in lacking)

    def _lacks(self, key: str, size: int) -> str:
        """Return the key if the store has no such object of that size, otherwise ""."""
        there = self.objects.stat(key)
        return "" if there is not None and there.size == size else key

    def _unmark(self, bundle: Bundle) -> str:
        self.quarantine.unmark([bundle.weights], [bundle.revision])
        return ""

    def _write(self, key: str, data: bytes) -> str:
        self.objects.write(key, data)
        return ""

    def still_there(self, staged: Path, bundle: Bundle) -> None:
        """See `Store`."""
        self._send(staged, bundle, unmark=True)

    def bundle(self, revision: str) -> Bundle:
        """See `Store`."""
        data = self.objects.read(f"revisions/{checked_digest(revision)}/{_BUNDLE}")
        if data is None:
            raise ValueError("it is gone")
        document = json.loads(data)
        return Bundle(document["weights"], document["files"])

    # ------------------------------------------------------------------ registrations

    def registered(self, revision: str) -> bool:
        """See `Store`."""
        folder = f"revisions/{checked_digest(revision)}"
        return any(REGISTRATION in key for key in self.objects.list(folder))

    def register(self, revision: str, name: str, data: bytes) -> None:
        """See `Store`."""
        if self.has(revision, _BUNDLE):
            self.objects.write(f"revisions/{revision}/{name}", data)

    def complete(self, weights: str, revision: str, name: str, data: bytes) -> None:
        """Do nothing: no older version of Veneer wrote objects."""

    def unregister(self, revision: str, name: str) -> None:
        """See `Store`."""
        self.objects.delete([f"revisions/{checked_digest(revision)}/{name}"])

    def discard(self, weights: Iterable[str], revisions: Iterable[str]) -> Path:
        """Mark content, and move cached weights to a staging folder; see `Store`."""
        weights = tuple(weights)
        trash = self.new_staging()
        try:
            self.quarantine.mark(UNNEEDED, weights, revisions)
            for digest in weights:
                self.cache.remove(digest, trash)
        except BaseException:
            remove(trash)
            raise
        return trash

    # ------------------------------------------------------------------------ cache

    def keep_while(self, leases: Callable[[str], int], named: Callable[[str], bool]) -> None:
        """See `Store`."""
        self.cache.leases = leases
        self.quarantine.needed = lambda digest: named(digest) or leases(digest) > 0

    def is_local(self, weights: str) -> bool:
        """See `Store`."""
        return self.cache.has(weights)

    def fetch(self, weights: str) -> None:
        """See `Store`. Concurrent calls for the same weights share one download."""
        with self._alone(weights):
            if self.cache.has(weights):
                return
            staged = self.new_staging()
            try:
                for name in REQUIRED_FILES:
                    if not self.objects.get(
                        f"weights/{checked_digest(weights)}/{name}", staged / name
                    ):
                        raise _gone(weights)
                verify_weights(staged, weights)
                with disk_errors(self.root):
                    self._place(staged, self.weights_folder(weights), REQUIRED_FILES)
                self.cache.add(weights)
            finally:
                remove(staged)

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
