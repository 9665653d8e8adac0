"""The disk tier: content-addressed folders, committed atomically.

::

    store/weights/<weights digest>/   adapter_config.json  adapter_model.safetensors
    store/revisions/<revision>/       bundle.json and what else the bundle holds
    store/uploads/<upload id>/        what has arrived of an upload; it may be resumed
    store/staging/<random>/           what is being put together or removed
    store/quarantine/<digest>/        weights that were found damaged; for a look at them

``bundle.json`` is canonical: its SHA-256 is the revision. Paths are built from
digests computed here and from random hex, never from a caller's words. A commit
is: fsync files, fsync folder, rename, fsync parent; so a folder that exists under
its digest is whole, whenever the power went. Callers serialise commit and remove.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_registry.errors import AdapterCorrupt, DiskFailed, DiskFull, InternalError
from veneer_registry.format import REQUIRED_FILES, verify_weights
from veneer_registry.strict_json import canonical_json

__all__ = ["Bundle", "Store", "disk_errors"]

_log = logging.getLogger(__name__)

_HEX: Final = re.compile(r"[0-9a-f]{64}")
_BUNDLE: Final = "bundle.json"
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a revision is made of.

    Attributes:
        weights: the weights digest.
        files: name -> SHA-256 of every other file that counts.
    """

    weights: str
    files: Mapping[str, str]

    @property
    def document(self) -> bytes:
        """Text of ``bundle.json``."""
        return canonical_json({"files": dict(self.files), "weights": self.weights})

    @property
    def revision(self) -> str:
        """SHA-256 of `document`."""
        return hashlib.sha256(self.document).hexdigest()


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an operating system's error into `DiskFull` or `DiskFailed`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(folder) from error
        raise disk_failed(folder, str(error)) from error


def disk_full(folder: Path) -> DiskFull:
    """The error for a full disk."""
    return DiskFull(
        f"the disk of {folder} is full, nothing was published; delete adapters or make room",
        metadata={"folder": str(folder)},
    )


def disk_failed(folder: Path, why: str) -> DiskFailed:
    """The error for a disk that cannot be written to or read."""
    return DiskFailed(
        f"the disk of {folder} failed ({why[:200]}), nothing was changed; look at the system's "
        "log, and try again",
        metadata={"folder": str(folder), "why": why[:200]},
        retry_after_s=5.0,
    )


class Store:
    """The folders under ``root``. No names here: the catalog has them."""

    def __init__(self, root: Path) -> None:
        """Make the folders and empty staging: whatever lies there was never committed.

        Uploads that broke off stay, to be resumed; see `stale_uploads`.
        """
        self._root = root
        self._weights = root / "weights"
        self._revisions = root / "revisions"
        self._staging = root / "staging"
        self._uploads = root / "uploads"
        self._quarantine = root / "quarantine"
        folders = (
            *(self._weights, self._revisions),
            *(self._staging, self._uploads, self._quarantine),
        )
        with disk_errors(root):
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            for left in self._staging.iterdir():
                _remove(left)
            _sync_folder(root)
            _sync_folder(root.parent)

    def weights_folder(self, digest: str) -> Path:
        """Folder of committed weights; it need not exist."""
        return self._weights / _checked(digest)

    def revision_folder(self, revision: str) -> Path:
        """Folder of a committed revision; it need not exist."""
        return self._revisions / _checked(revision)

    def present(self) -> tuple[set[str], set[str]]:
        """(weights digests, revisions) on disk. Strange entries are left out."""
        return _digests(self._weights), _digests(self._revisions)

    def free_bytes(self) -> int:
        """Bytes that the disk has left for us."""
        return shutil.disk_usage(self._root).free

    def new_staging(self) -> Path:
        """A new empty folder for one upload."""
        folder = self._staging / secrets.token_hex(16)
        with disk_errors(self._root):
            folder.mkdir()
        return folder

    def drop_staging(self, folder: Path) -> None:
        """Remove a folder of staging, of an upload or of quarantine. May be called again."""
        if folder.parent not in (self._staging, self._uploads, self._quarantine):
            raise InternalError(f"{folder.name!r} is not a staging folder")
        _remove(folder)

    # --------------------------------------------------------------------- uploads

    def upload_folder(self, upload_id: str) -> Path:
        """Folder of an upload, made if missing."""
        folder = self._uploads / _checked(upload_id)
        with disk_errors(self._root):
            folder.mkdir(exist_ok=True)
        return folder

    def received(self, upload_id: str) -> dict[str, int]:
        """Bytes of each file that arrived of an upload; empty if there is none."""
        folder = self._uploads / _checked(upload_id)
        with contextlib.suppress(FileNotFoundError):
            return {
                entry.name: entry.stat().st_size
                for entry in os.scandir(folder)
                if entry.is_file(follow_symlinks=False)
            }
        return {}

    def stale_uploads(self, older_than: float) -> list[Path]:
        """Folders of uploads into which nothing came since ``older_than`` (Unix seconds)."""
        stale = []
        for folder in self._uploads.iterdir():
            with contextlib.suppress(FileNotFoundError):
                times = [folder.stat().st_mtime]
                times += [path.stat().st_mtime for path in folder.iterdir()]
                if max(times) < older_than:
                    stale.append(folder)
        return stale

    def has(self, digest: str, file: str) -> bool:
        """This file of committed content is there."""
        parents = (self._weights, self._revisions)
        return any((parent / _checked(digest) / file).is_file() for parent in parents)

    def link(self, digest: str, file: str, to: Path) -> bool:
        """Let ``to`` be a stored file, without copying it; False if it is not there."""
        for parent in (self._weights, self._revisions):
            with contextlib.suppress(FileNotFoundError):
                _link(parent / _checked(digest) / file, to)
                return True
        return False

    # ------------------------------------------------------------------- quarantine

    def quarantine(self, weights: str) -> None:
        """Take damaged weights away from where they are served from, and keep them."""
        kept = self._quarantine / _checked(weights)
        with disk_errors(self._root):
            if kept.exists():
                _remove(kept)
            self._move_away(self.weights_folder(weights), kept)
            _sync_folder(self._quarantine)
            _sync_folder(self._weights)

    def quarantined(self) -> list[Path]:
        """Folders of weights that were found damaged."""
        return sorted(self._quarantine.iterdir())

    # ---------------------------------------------------------------------- commit

    def commit(self, staged: Path, bundle: Bundle) -> bool:
        """Publish the staged files. On return they are on disk, whole and durable.
        True if the staged weights were taken, False if the same were there.

        Content that is there already is verified; damaged content is replaced by
        the staged one, so that pushing again repairs.

        Raises:
            DiskFull: nothing was published (weights without a revision may remain;
                nothing refers to them).
        """
        with disk_errors(self._root):
            intact = self._weights_intact(bundle.weights)
            if not intact:
                self._place(staged, self.weights_folder(bundle.weights), REQUIRED_FILES)
            if not self._revision_intact(bundle):
                _write(staged / _BUNDLE, bundle.document)
                names = (_BUNDLE, *bundle.files)
                self._place(staged, self.revision_folder(bundle.revision), names)
        return not intact

    def discard(self, weights: Iterable[str], revisions: Iterable[str]) -> Path:
        """Take committed folders away in one rename each; `drop_staging` the result."""
        trash = self.new_staging()
        try:
            for digest in weights:
                self._move_away(self.weights_folder(digest), trash / f"w-{digest}")
            for revision in revisions:
                self._move_away(self.revision_folder(revision), trash / f"r-{revision}")
        except BaseException:
            _remove(trash)
            raise
        return trash

    def _move_away(self, folder: Path, to: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            folder.rename(to)

    def _weights_intact(self, digest: str) -> bool:
        folder = self.weights_folder(digest)
        if not folder.exists():
            return False
        try:
            verify_weights(folder, digest)
        except AdapterCorrupt as error:
            _log.warning("replacing damaged weights: %s", error)
            return False
        return True

    def _revision_intact(self, bundle: Bundle) -> bool:
        folder = self.revision_folder(bundle.revision)
        expected = {**bundle.files, _BUNDLE: bundle.revision}
        return all(_sha256_or_none(folder / name) == sha for name, sha in expected.items())

    def _place(self, staged: Path, target: Path, names: Iterable[str]) -> None:
        ready = staged / secrets.token_hex(8)
        ready.mkdir()
        for name in names:
            # Linked, so that an upload whose server is killed now need not be sent again.
            _link(staged / name, ready / name)
            _sync_file(ready / name)
        _sync_folder(ready)
        if target.exists():
            target.rename(staged / secrets.token_hex(8))
        ready.rename(target)
        _sync_folder(target.parent)


def _checked(digest: str) -> str:
    if not _HEX.fullmatch(digest):
        raise InternalError(f"{digest[:80]!r} is not a digest, so no path is made of it")
    return digest


def _digests(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if _HEX.fullmatch(entry.name)}


def _sha256_or_none(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_sync_folder = _sync_file


def _link(source: Path, to: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK):
            raise
        shutil.copyfile(source, to)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
