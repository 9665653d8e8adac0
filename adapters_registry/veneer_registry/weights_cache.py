"""Copies on this machine's disk of weights that are kept elsewhere: by digest, bounded in
bytes, and fetched again when lost. A follower has one, and a registry with an object store.

::

    weights/<weights digest>/   adapter_config.json  adapter_model.safetensors
    partial/<weights digest>/   the same files of a running or interrupted fetch
    trash/<random>/             folders being removed

A folder appears below ``weights/`` by one rename, after its files are durable. Weights left by
an earlier run are compared with their digest before use: a disk may have lost writes that it
had acknowledged.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from veneer_registry.bundle_files import REQUIRED_FILES
from veneer_registry.disk import FOLDER_MODE, disk_errors, remove, sync
from veneer_registry.errors import AdapterCorrupt, InvalidField, QueueFull
from veneer_registry.store_folders import checked_digest, size_of
from veneer_registry.stored_adapter import verify_weights

_TOUCH_S: Final = 60.0
"""Seconds between updates of a folder's time of use: the accuracy of the order of use after a
restart."""

_log = logging.getLogger(__name__)


class WeightsCache:
    """Disk cache of weights, with LRU eviction. Thread-safe. Call `open`, `commit`, `check` and
    `make_room` from worker threads.

    Attributes:
        most_bytes: maximum size of all weights; weights in use may leave no room for others,
            see `make_room`.
        evictions, damaged_found: counts since the start.
    """

    def __init__(
        self,
        root: Path,
        most_bytes: int,
        leased: Callable[[str], bool],
        in_memory: Callable[[str], bool] = lambda digest: False,
        clock: Callable[[], float] = time.time,
        flag: str = "--adapter-cache-bytes",
    ) -> None:
        """Args:
        leased: whether a request uses a weights digest, so that its files must stay.
        in_memory: whether the engine has these weights in memory and may need their files
            again: such files are evicted only if no others can be, and the next request then
            fetches them again.
        clock: Unix seconds.
        flag: sets ``most_bytes``; for errors.
        """
        self.most_bytes = most_bytes
        self.evictions = 0
        self.damaged_found = 0
        self._weights = root / "weights"
        self._partial = root / "partial"
        self._trash = root / "trash"
        self._leased = leased
        self._in_memory = in_memory
        self._clock = clock
        self._flag = flag
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """By weights digest, least recently used first."""
        self._touched: dict[str, float] = {}
        self._unchecked: set[str] = set()
        self._reserved: dict[str, int] = {}
        """Bytes reserved for weights that are being fetched, by digest."""

    def open(self) -> None:
        """Create the folders, and find the weights that earlier runs left."""
        for folder in (self._weights, self._partial, self._trash):
            with disk_errors(folder.parent):
                folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        remove(self._trash)
        self._trash.mkdir(FOLDER_MODE, exist_ok=True)
        found = []
        for folder in self._weights.iterdir():
            if all((folder / name).is_file() for name in REQUIRED_FILES):
                found.append((folder.stat().st_mtime, folder.name, size_of(folder)))
            else:
                self._discard(folder)
        with self._lock:
            for used, digest, size in sorted(found):
                self._sizes[digest] = size
                self._touched[digest] = used
                self._unchecked.add(digest)
        self._evict(0, keep="")

    # -------------------------------------------------------------------- look-ups

    @property
    def bytes(self) -> int:
        """Total bytes of complete weights."""
        with self._lock:
            return sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, digest: object) -> bool:
        return digest in self._sizes

    def weights_folder(self, digest: str) -> Path:
        """The folder of fetched weights, whether or not they are there yet."""
        return self._weights / checked_digest(digest)

    def partial_folder(self, digest: str) -> Path:
        """The folder for weights while they are fetched."""
        return self._partial / checked_digest(digest)

    def use(self, digest: str) -> bool | None:
        """Mark weights as used now. Returns whether they are here; None if `check` must verify
        them first."""
        with self._lock:
            if digest not in self._sizes:
                return False
            self._sizes.move_to_end(digest)
            if digest in self._unchecked:
                return None
            now = self._clock()
            if now - self._touched.get(digest, 0.0) < _TOUCH_S:
                return True
            self._touched[digest] = now
        with suppress(OSError):  # gone behind our back: the loader will say so
            os.utime(self.weights_folder(digest), (now, now))
        return True

    # -------------------------------------------------------------------- contents

    def check(self, digest: str) -> bool:
        """Compare weights of an earlier run with their digest; return False and drop them if
        they differ."""
        try:
            verify_weights(self.weights_folder(digest), digest)
        except AdapterCorrupt as error:
            self.drop(digest, str(error))
            return False
        with self._lock:
            self._unchecked.discard(digest)
            return digest in self._sizes

    def make_room(self, digest: str, size: int) -> None:
        """Reserve bytes for weights that are about to be fetched; evict the least recently used
        weights without a lease until they fit.

        Raises:
            InvalidField: the weights are larger than the cache.
            QueueFull: weights in use leave no room now.
        """
        if size > self.most_bytes:
            raise InvalidField(
                f"the adapter's files have {size} bytes, more than this server's disk cache "
                f"holds: start it with a larger {self._flag}",
                metadata={"field": "adapter", "limit": str(self.most_bytes)},
            )
        with self._lock:
            before = self._reserved.get(digest, 0)
            self._reserved[digest] = size
        if not self._evict(0, keep=digest):
            with self._lock:
                self._reserved[digest] = before
                if not before:
                    del self._reserved[digest]
            raise QueueFull(
                "all adapters in this server's disk cache are in use: retry, or start it with "
                f"a larger {self._flag}",
                metadata={"limit": str(self.most_bytes), "cause": "adapter_cache"},
                retry_after_s=1.0,
            )

    def give_way(self, digest: str) -> bool:
        """Evict one entry because the disk is full although the cache is not. Returns False if
        nothing could be evicted."""
        with self._lock:
            trash = self._evicted(digest)
        if trash is None:
            return False
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def release(self, digest: str) -> None:
        """Drop the reservation of a fetch that has ended; committed weights count by their size
        on disk."""
        with self._lock:
            self._reserved.pop(digest, None)

    def commit(self, digest: str) -> None:
        """Verify fetched weights, make them durable, and move them to `weights_folder`.

        Raises:
            AdapterCorrupt: they do not match the digest; they have been removed.
            DiskFull, DiskFailed: the disk is full or fails.
        """
        partial, target = self.partial_folder(digest), self.weights_folder(digest)
        try:
            verify_weights(partial, digest)
        except AdapterCorrupt:
            self._discard(partial)
            raise
        with disk_errors(partial.parent):
            for name in REQUIRED_FILES:
                sync(partial / name)
            sync(partial)
            size = size_of(partial)
            with self._lock:
                trash = self._moved(target)
                partial.rename(target)
                self._reserved.pop(digest, None)
                self._sizes[digest] = size
                self._sizes.move_to_end(digest)
                self._touched[digest] = self._clock()
                self._unchecked.discard(digest)
            sync(target.parent)
        shutil.rmtree(trash, ignore_errors=True)

    def drop(self, digest: str, why: str) -> None:
        """Remove weights that are damaged; the next request fetches them again."""
        if self.remove(digest):
            self.damaged_found += 1
            _log.error("damaged weights %s dropped from the cache: %s", digest, why)

    def remove(self, digest: str) -> bool:
        """Remove weights; return whether they were there."""
        with self._lock:
            known = self._sizes.pop(digest, None)
            self._unchecked.discard(digest)
            trash = self._moved(self.weights_folder(digest))
        shutil.rmtree(trash, ignore_errors=True)
        return known is not None

    def has(self, digest: str) -> bool:
        """Whether weights are here and intact; those of an earlier run are verified now. Counts
        as a use."""
        used = self.use(digest)
        return self.check(digest) if used is None else used

    def trim_partial(self, keep: set[str], most_bytes: int) -> None:
        """Remove interrupted fetches beyond ``most_bytes``, oldest first, except ``keep``."""
        found = []
        for folder in self._partial.iterdir():
            if folder.name not in keep:
                found.append((folder.stat().st_mtime, folder, size_of(folder)))
        total = sum(size for _, _, size in found)
        for _, folder, size in sorted(found, key=lambda each: each[0]):
            if total <= most_bytes:
                break
            self._discard(folder)
            total -= size

    def _evict(self, size: int, *, keep: str) -> bool:
        """Evict until ``size`` more bytes fit; return False if weights in use prevent that."""
        while True:
            with self._lock:
                taken = sum(self._sizes.values()) + sum(self._reserved.values())
                if taken + size <= self.most_bytes:
                    return True
                trash = self._evicted(keep)
            if trash is None:
                return False
            shutil.rmtree(trash, ignore_errors=True)

    def _evicted(self, keep: str) -> Path | None:
        """Move the least recently used weights without a lease to the trash and return their
        folder there; None if all are in use. The caller holds the lock."""
        may_go = [d for d in self._sizes if d != keep and not self._leased(d)]
        if not may_go:
            return None
        digest = next((d for d in may_go if not self._in_memory(d)), may_go[0])
        del self._sizes[digest]
        self._unchecked.discard(digest)
        self._touched.pop(digest, None)
        self.evictions += 1
        # A request that takes a lease now asks for the weights afterwards, and finds them gone.
        # The folder moves under the lock: later, it might be a newer one.
        return self._moved(self.weights_folder(digest))

    def _moved(self, folder: Path) -> Path:
        """Move a folder to the trash, if it exists, and return its path there; the caller
        removes it."""
        trash = self._trash / secrets.token_hex(8)
        with suppress(FileNotFoundError):
            folder.rename(trash)
        return trash

    def _discard(self, folder: Path) -> None:
        shutil.rmtree(self._moved(folder), ignore_errors=True)
