"""A bounded cache of weights on the local disk."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from veneer_registry.disk import move_away
from veneer_registry.store_folders import StoreFolders, size_of

_log = logging.getLogger(__name__)


class SharedWeightsCache:
    """Bounded cache of weights on the local disk. It evicts the least recently used weights
    that no request needs. Thread-safe."""

    def __init__(self, folders: StoreFolders, there: Iterable[str], most_bytes: int) -> None:
        """``there``: digests of the weights that an earlier run left, kept within the bound."""
        self._folders = folders
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._turn = itertools.count()
        self._sizes: dict[str, int] = {}
        self._used: dict[str, int] = {}
        self.leases: Callable[[str], int] = lambda digest: 0
        found = map(folders.weights_folder, there)
        for folder in sorted(found, key=lambda path: (path.stat().st_mtime, path.name)):
            self._sizes[folder.name] = size_of(folder)
            self._used[folder.name] = next(self._turn)
        self.trim()

    @property
    def bytes(self) -> int:
        """Bytes of all weights on the local disk."""
        return sum(self._sizes.values())

    def has(self, weights: str) -> bool:
        """Whether the weights are on the local disk. Counts as a use."""
        with self._lock:
            if weights not in self._sizes:
                return False
            self._used[weights] = next(self._turn)
            return True

    def add(self, weights: str) -> None:
        """Register weights whose folder is in place, and evict others to make room."""
        with self._lock:
            self._sizes[weights] = size_of(self._folders.weights_folder(weights))
            self._used[weights] = next(self._turn)
        self.trim(but=weights)

    def remove(self, weights: str, trash: Path | None = None) -> None:
        """Remove weights from the local disk. Idempotent.

        Args:
            trash: a staging folder to which they are moved.
        """
        with self._lock:
            self._sizes.pop(weights, None)
            self._used.pop(weights, None)
            own = trash or self._folders.new_staging()
            move_away(self._folders.weights_folder(weights), own / f"w-{weights}")
        if trash is None:
            self._folders.drop_staging(own)

    def trim(self, but: str = "") -> None:
        """Evict weights until the cache is within its bound or requests need all the rest.

        Args:
            but: weights to keep.
        """
        while True:
            with self._lock:
                if self.bytes <= self._most_bytes:
                    return
                oldest = sorted(self._sizes, key=self._used.__getitem__)
            free = next((d for d in oldest if d != but and not self.leases(d)), None)
            if free is None:
                _log.warning(
                    "requests need more weights (%d bytes) than the local cache may hold (%d)",
                    self.bytes,
                    self._most_bytes,
                )
                return
            self.remove(free)
