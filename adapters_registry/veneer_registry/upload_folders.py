"""Folders of uploads: the received part of each, so that it can be resumed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from veneer_registry.disk import disk_errors, make_folder
from veneer_registry.store_folders import StoreFolders, checked_digest


class UploadFolders:
    """The folders of uploads in a store."""

    def __init__(self, folders: StoreFolders) -> None:
        self._folders = folders

    def folder(self, upload_id: str) -> Path:
        """Folder of an upload, created if missing."""
        folder = self._folders.uploads_root / checked_digest(upload_id)
        with disk_errors(self._folders.root):
            make_folder(folder, exist_ok=True)
        return folder

    def received(self, upload_id: str) -> dict[str, int]:
        """Bytes of each file that was received for an upload; empty if there is no upload."""
        folder = self._folders.uploads_root / checked_digest(upload_id)
        with contextlib.suppress(FileNotFoundError):
            return {
                entry.name: entry.stat().st_size
                for entry in os.scandir(folder)
                if entry.is_file(follow_symlinks=False)
            }
        return {}

    def stale(self, older_than: float) -> list[Path]:
        """Folders of uploads that received nothing since ``older_than`` (Unix seconds)."""
        stale = []
        for folder in self._folders.uploads_root.iterdir():
            with contextlib.suppress(FileNotFoundError):
                times = [folder.stat().st_mtime]
                times += [path.stat().st_mtime for path in folder.iterdir()]
                if max(times) < older_than:
                    stale.append(folder)
        return stale

    def kept(self) -> list[tuple[float, int, Path]]:
        """(time of the last byte, bytes of its own, folder) of each upload, oldest first."""
        kept = []
        for folder in self._folders.uploads_root.iterdir():
            with contextlib.suppress(FileNotFoundError):
                files = [path.stat(follow_symlinks=False) for path in folder.iterdir()]
                last = max((file.st_mtime for file in files), default=folder.stat().st_mtime)
                # A hard link is content of the store, not bytes of this upload.
                size = sum(file.st_size for file in files if file.st_nlink == 1)
                kept.append((last, size, folder))
        return sorted(kept)
