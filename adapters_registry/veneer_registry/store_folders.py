"""The store's folders; see `store` for the layout."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from veneer_registry.disk import FOLDER_MODE, disk_errors, make_folder, remove, sync
from veneer_registry.errors import InternalError

_HEX: Final = re.compile(r"[0-9a-f]{64}")


class StoreFolders:
    """The folders under ``root``.

    Attributes:
        unnamed_root: the part of the quarantine for intact content that no name had.
    """

    def __init__(self, root: Path) -> None:
        """Create the folders, and empty staging, whose content was never committed.

        Interrupted uploads stay, to be resumed; see `UploadFolders.stale`.
        """
        self.root = root
        self.weights_root = root / "weights"
        self.revisions_root = root / "revisions"
        self.staging_root = root / "staging"
        self.uploads_root = root / "uploads"
        self.quarantine_root = root / "quarantine"
        self.unnamed_root = self.quarantine_root / "unnamed"
        with disk_errors(root):
            root.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            for folder in self.roots:
                make_folder(folder, exist_ok=True)
            for left in self.staging_root.iterdir():
                remove(left)
            sync(root)
            sync(root.parent)

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders right below the root."""
        return (
            self.weights_root,
            self.revisions_root,
            self.staging_root,
            self.uploads_root,
            self.quarantine_root,
        )

    def weights_folder(self, digest: str) -> Path:
        """Path of committed weights, which need not exist."""
        return self.weights_root / checked_digest(digest)

    def revision_folder(self, revision: str) -> Path:
        """Path of a committed revision, which need not exist."""
        return self.revisions_root / checked_digest(revision)

    def places(
        self, weights: Iterable[str], revisions: Iterable[str], to: Path
    ) -> list[tuple[Path, Path]]:
        """Return (folder, its path in ``to``) pairs, to move committed content there or
        back."""
        return [
            *((self.weights_folder(digest), to / f"w-{digest}") for digest in weights),
            *((self.revision_folder(digest), to / f"r-{digest}") for digest in revisions),
        ]

    def present(self) -> tuple[set[str], set[str]]:
        """(weights digests, revisions) on disk. Unknown entries are ignored."""
        return _digests(self.weights_root), _digests(self.revisions_root)

    def free_bytes(self) -> int:
        """Free bytes on the disk that we may use."""
        return shutil.disk_usage(self.root).free

    def new_staging(self) -> Path:
        """Create an empty folder in staging."""
        folder = self.staging_root / secrets.token_hex(16)
        with disk_errors(self.root):
            make_folder(folder)
        return folder

    def drop_staging(self, folder: Path) -> None:
        """Remove a folder in staging, uploads or quarantine. Idempotent."""
        parents = (
            self.staging_root,
            self.uploads_root,
            self.quarantine_root,
            self.unnamed_root,
        )
        if folder.parent not in parents or folder == self.unnamed_root:
            raise InternalError(f"{folder.name!r} is not a staging folder")
        remove(folder)


def checked_digest(digest: str) -> str:
    """Return ``digest`` if it is a valid digest, and so can be part of a path. Raises
    InternalError."""
    if not _HEX.fullmatch(digest):
        raise InternalError(f"{digest[:80]!r} is not a digest, so it cannot be part of a path")
    return digest


def _digests(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if _HEX.fullmatch(entry.name)}


def size_of(folder: Path) -> int:
    """Total bytes of the files directly in a folder."""
    size = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                size += path.lstat().st_size
    return size
