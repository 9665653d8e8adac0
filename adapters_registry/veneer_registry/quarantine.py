"""The store's quarantine: damaged weights, and intact content without a name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from veneer_registry.disk import disk_errors, make_folder, move_away, remove, sync
from veneer_registry.store_folders import StoreFolders, size_of


@dataclass(frozen=True, slots=True)
class Removal:
    """Content that is to be removed.

    Attributes:
        trash: the staging folder that it is in; None if it is elsewhere.
    """

    name: str
    bytes: int = 0
    trash: Path | None = None


class Quarantine:
    """Content that was moved out of the served folders and is kept for a while."""

    def __init__(self, folders: StoreFolders) -> None:
        self._folders = folders
        self._unnamed = folders.unnamed_root

    @property
    def place(self) -> str:
        """Where `set_aside` puts content, for the log."""
        return str(self._unnamed)

    def add(self, weights: str) -> None:
        """Move damaged weights out of the served folders."""
        root = self._folders.quarantine_root
        with disk_errors(self._folders.root):
            _keep(self._folders.weights_folder(weights), root / weights)
            sync(root)
            sync(self._folders.weights_root)

    def set_aside(self, weights: Iterable[str], revisions: Iterable[str]) -> None:
        """Move intact content that no name has into quarantine."""
        with disk_errors(self._folders.root):
            make_folder(self._unnamed, exist_ok=True)
            for folder, aside in self._folders.places(weights, revisions, self._unnamed):
                _keep(folder, aside)
            sync(self._folders.quarantine_root)
            self._sync_unnamed()

    def bring_back(self, weights: Iterable[str], revisions: Iterable[str]) -> int:
        """Undo `set_aside` for those of these folders that are in quarantine. Return how
        many."""
        places = self._folders.places(weights, revisions, self._unnamed)
        found = [(folder, aside) for folder, aside in places if aside.exists()]
        if found:
            with disk_errors(self._folders.root):
                for folder, aside in found:
                    aside.rename(folder)
                self._sync_unnamed()
        return len(found)

    def _sync_unnamed(self) -> None:
        """Make moves to and from `_unnamed` durable."""
        sync(self._unnamed)
        sync(self._folders.weights_root)
        sync(self._folders.revisions_root)

    def held(self) -> list[Path]:
        """Folders in quarantine, damaged or unnamed, oldest first."""
        root = self._folders.quarantine_root
        found = [path for path in root.iterdir() if path != self._unnamed]
        if self._unnamed.exists():
            found += self._unnamed.iterdir()
        return sorted(found, key=lambda path: (_changed(path), path.name))

    def choose(self, most_bytes: int, older_than: float) -> list[Removal]:
        """Choose content to remove: what was quarantined before ``older_than`` (Unix seconds),
        then the oldest until at most ``most_bytes`` are left. Nobody can bring it back from now
        on; the caller must `remove` it."""
        held = [(path, size_of(path)) for path in self.held()]
        left = sum(size for _, size in held)
        chosen = []
        for path, size in held:
            if left <= most_bytes and _changed(path) >= older_than:
                continue
            # Rename first: `bring_back` must never see a partly removed folder.
            trash = self._folders.new_staging()
            path.rename(trash / path.name)
            left -= size
            chosen.append(Removal(path.name, size, trash))
        return chosen

    def remove(self, chosen: Iterable[Removal]) -> list[tuple[str, int]]:
        """Remove content that was chosen. It may take long, and needs no lock. Return (name,
        bytes) of each."""
        removed = []
        for each in chosen:
            assert each.trash is not None, "it is from `choose`"
            remove(each.trash)
            removed.append((each.name, each.bytes))
        return removed


def _keep(folder: Path, to: Path) -> None:
    if to.exists():
        remove(to)
    move_away(folder, to)
    with contextlib.suppress(FileNotFoundError):
        os.utime(to)  # records when it was quarantined


def _changed(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_mtime
    return 0.0
