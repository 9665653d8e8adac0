"""The store's quarantine: damaged weights, and whole content that no name has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from veneer_registry.disk import disk_errors, make_folder, move_away, remove, sync
from veneer_registry.store_folders import StoreFolders, size_of

__all__ = ["Quarantine"]


class Quarantine:
    """What was taken away from where it is served from, and is kept for a while."""

    def __init__(self, folders: StoreFolders) -> None:
        self._folders = folders
        self._unnamed = folders.unnamed_root

    def add(self, weights: str) -> None:
        """Take damaged weights away from where they are served from, and keep them."""
        root = self._folders.quarantine_root
        with disk_errors(self._folders.root):
            _keep(self._folders.weights_folder(weights), root / weights)
            sync(root)
            sync(self._folders.weights_root)

    def set_aside(self, weights: Iterable[str], revisions: Iterable[str]) -> None:
        """Take whole content that no name has out of the way, and keep it."""
        with disk_errors(self._folders.root):
            make_folder(self._unnamed, exist_ok=True)
            for folder, aside in self._folders.places(weights, revisions, self._unnamed):
                _keep(folder, aside)
            sync(self._folders.quarantine_root)
            self._sync_unnamed()

    def bring_back(self, weights: Iterable[str], revisions: Iterable[str]) -> int:
        """Undo `set_aside` for what of this is there. Returns how many folders came back."""
        places = self._folders.places(weights, revisions, self._unnamed)
        found = [(folder, aside) for folder, aside in places if aside.exists()]
        if found:
            with disk_errors(self._folders.root):
                for folder, aside in found:
                    aside.rename(folder)
                self._sync_unnamed()
        return len(found)

    def _sync_unnamed(self) -> None:
        """Make durable what went to `_unnamed`, or came from there."""
        sync(self._unnamed)
        sync(self._folders.weights_root)
        sync(self._folders.revisions_root)

    def held(self) -> list[Path]:
        """Folders of what is in quarantine, damaged or unnamed, oldest first."""
        root = self._folders.quarantine_root
        found = [path for path in root.iterdir() if path != self._unnamed]
        if self._unnamed.exists():
            found += self._unnamed.iterdir()
        return sorted(found, key=lambda path: (_changed(path), path.name))

    def prune(self, most_bytes: int, older_than: float) -> list[tuple[str, int]]:
        """Remove from quarantine what is there since before ``older_than`` (Unix seconds),
        and then the oldest until ``most_bytes`` are left. Returns (folder's name, bytes)."""
        held = [(path, size_of(path)) for path in self.held()]
        left = sum(size for _, size in held)
        removed = []
        for path, size in held:
            if left <= most_bytes and _changed(path) >= older_than:
                continue
            # In one step: half of it must not be taken back by `bring_back`.
            trash = self._folders.new_staging()
            path.rename(trash / path.name)
            remove(trash)
            left -= size
            removed.append((path.name, size))
        return removed


def _keep(folder: Path, to: Path) -> None:
    if to.exists():
        remove(to)
    move_away(folder, to)
    with contextlib.suppress(FileNotFoundError):
        os.utime(to)  # since when it is there


def _changed(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_mtime
    return 0.0
