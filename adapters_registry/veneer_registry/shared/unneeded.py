"""Quarantine in the object store: marks unneeded content, moves damaged content, and deletes
both later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from veneer_registry.bundle_files import REQUIRED_FILES
from veneer_registry.quarantine import Quarantine
from veneer_registry.shared.objects import Objects
from veneer_registry.store_folders import StoreFolders, checked_digest

UNNEEDED: Final = "unneeded"
ASIDE: Final = "aside"
GRACE_S: Final = 3600.0
"""How long unneeded content stays: another registry may be about to read it."""


class ObjectQuarantine(Quarantine):
    """The quarantine of an `ObjectStore`; see `object_store` for its keys. Everything except
    `needed` is called under the catalog's lock."""

    def __init__(self, folders: StoreFolders, objects: Objects) -> None:
        super().__init__(folders)
        self._objects = objects
        self.needed: Callable[[str], bool] = lambda digest: True
        self.check_held: Callable[[], None] = lambda: None
        """Raises Unavailable if this registry no longer has the catalog's lock."""

    @property
    def place(self) -> str:
        """See `Quarantine`."""
        return f"{self._objects.url}/{ASIDE} (as marks)"

    def mark(self, why: str, weights: Iterable[str], revisions: Iterable[str]) -> None:
        """Mark content with the reason ``why``. Marking it again renews the mark's time."""
        for kind, digests in (("weights", weights), ("revisions", revisions)):
            for digest in digests:
                self._objects.write(f"{why}/{kind}/{checked_digest(digest)}", b"")

    def unmark(self, weights: Iterable[str], revisions: Iterable[str]) -> None:
        """Remove all marks from content that is needed. Idempotent."""
        self._objects.delete(
            f"{why}/{kind}/{checked_digest(digest)}"
            for why in (UNNEEDED, ASIDE)
            for kind, digests in (("weights", tuple(weights)), ("revisions", tuple(revisions)))
            for digest in digests
        )

    def add(self, weights: str) -> None:
        """See `Quarantine`."""
        for name in REQUIRED_FILES:
            key = f"weights/{checked_digest(weights)}/{name}"
            if self._objects.stat(key) is not None:
                self._objects.copy(key, f"quarantine/{weights}/{name}")
        self._objects.delete(f"weights/{weights}/{name}" for name in REQUIRED_FILES)

    def set_aside(self, weights: Iterable[str], revisions: Iterable[str]) -> None:
        """See `Quarantine`. The content is marked, not moved."""
        self.mark(ASIDE, weights, revisions)

    def bring_back(self, weights: Iterable[str], revisions: Iterable[str]) -> int:
        """See `Quarantine`. Nothing to do: content that was set aside was not moved."""
        return 0

    def held(self) -> list[Path]:
        """See `Quarantine`. Empty, since nothing here has a local path."""
        return []

    def prune(self, most_bytes: int, older_than: float) -> list[tuple[str, int]]:
        """See `Quarantine`; also delete content that has been unneeded for `GRACE_S`."""
        removed: list[tuple[str, int]] = []
        for why, before in ((UNNEEDED, time.time() - GRACE_S), (ASIDE, older_than)):
            for mark, stat in self._objects.list(why).items():
                _, kind, digest = mark.split("/")
                if self.needed(digest):
                    self._objects.delete([mark])
                elif stat.modified < before:
                    removed.append((f"{kind}/{digest}", self._delete(f"{kind}/{digest}")))
                    self._objects.delete([mark])
        held = self._objects.list("quarantine")
        left = sum(stat.size for stat in held.values())
        for key, stat in sorted(held.items(), key=lambda item: item[1].modified):
            if left > most_bytes or stat.modified < older_than:
                self._objects.delete([key])
                left -= stat.size
                removed.append((key, stat.size))
        return removed

    def _delete(self, folder: str) -> int:
        found = self._objects.list(folder)
        self.check_held()  # or another registry may be storing it again
        # The file that makes the folder count as present goes first.
        last = [key for key in found if key.endswith(("bundle.json", REQUIRED_FILES[-1]))]
        self._objects.delete(last)
        self._objects.delete(set(found) - set(last))
        return sum(stat.size for stat in found.values())
