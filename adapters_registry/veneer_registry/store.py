"""The disk tier: content-addressed folders, committed atomically.

::

    store/weights/<weights digest>/   adapter_config.json  adapter_model.safetensors
    store/revisions/<revision>/       bundle.json, what else the bundle holds, and for each
                                      name that has it its registration (`registration`)
    store/uploads/<upload id>/        what has arrived of an upload; it may be resumed
    store/staging/<random>/           what is being put together or removed
    store/quarantine/<digest>/        weights that were found damaged; for a look at them
    store/quarantine/unnamed/         whole content that no row of the catalog named at a start
    store/id  store/changes           what ties it to its catalog (`pairing`)

``bundle.json`` is canonical: its SHA-256 is the revision. Paths are built from
digests computed here and from random hex, never from a caller's words. A commit
is: fsync files, fsync folder, rename, fsync parent; so a folder that exists under
its digest is whole, whenever the power went. Callers serialise commit and remove.
Folders are 0700 and files 0600, whatever the umask.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_registry.disk import (
    FOLDER_MODE,
    disk_errors,
    link,
    make_folder,
    make_private,
    remove,
    sync,
    write_file,
)
from veneer_registry.errors import AdapterCorrupt, InternalError
from veneer_registry.format import REQUIRED_FILES, verify_weights
from veneer_registry.strict_json import canonical_json

__all__ = ["REGISTRATION", "Bundle", "Store", "size_of"]

_log = logging.getLogger(__name__)

_HEX: Final = re.compile(r"[0-9a-f]{64}")
_BUNDLE: Final = "bundle.json"
REGISTRATION: Final = "registered-"
"""What the name of a registration's file begins with."""


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


class Store:
    """The folders under ``root``. No names here: the catalog has them."""

    def __init__(self, root: Path) -> None:
        """Make the folders and empty staging: what is there was never committed.

        Interrupted uploads stay, to be resumed; see `stale_uploads`.
        """
        self.root = root
        self._weights = root / "weights"
        self._revisions = root / "revisions"
        self._staging = root / "staging"
        self._uploads = root / "uploads"
        self._quarantine = root / "quarantine"
        self._unnamed = self._quarantine / "unnamed"
        with disk_errors(root):
            root.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            for folder in self.folders:
                make_folder(folder, exist_ok=True)
            for left in self._staging.iterdir():
                _remove(left)
            _sync_folder(root)
            _sync_folder(root.parent)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders right below the root."""
        return (
            *(self._weights, self._revisions),
            *(self._staging, self._uploads, self._quarantine),
        )

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
        return shutil.disk_usage(self.root).free

    def new_staging(self) -> Path:
        """A new empty folder for one upload."""
        folder = self._staging / secrets.token_hex(16)
        with disk_errors(self.root):
            make_folder(folder)
        return folder

    def drop_staging(self, folder: Path) -> None:
        """Remove a folder of staging, of an upload or of quarantine. May be called again."""
        parents = (self._staging, self._uploads, self._quarantine, self._unnamed)
        if folder.parent not in parents or folder == self._unnamed:
            raise InternalError(f"{folder.name!r} is not a staging folder")
        _remove(folder)

    # --------------------------------------------------------------------- uploads

    def upload_folder(self, upload_id: str) -> Path:
        """Folder of an upload, made if missing."""
        folder = self._uploads / _checked(upload_id)
        with disk_errors(self.root):
            make_folder(folder, exist_ok=True)
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

    def kept_uploads(self) -> list[tuple[float, int, Path]]:
        """(time of the last byte, bytes of its own, folder) of each upload, oldest first."""
        kept = []
        for folder in self._uploads.iterdir():
            with contextlib.suppress(FileNotFoundError):
                files = [path.stat(follow_symlinks=False) for path in folder.iterdir()]
                last = max((file.st_mtime for file in files), default=folder.stat().st_mtime)
                # What the store has is only linked here.
                size = sum(file.st_size for file in files if file.st_nlink == 1)
                kept.append((last, size, folder))
        return sorted(kept)

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
        with disk_errors(self.root):
            self._set_aside(self.weights_folder(weights), self._quarantine / weights)
            _sync_folder(self._quarantine)
            _sync_folder(self._weights)

    def set_aside(self, weights: Iterable[str], revisions: Iterable[str]) -> None:
        """Take whole content that no name has out of the way, and keep it."""
        with disk_errors(self.root):
            make_folder(self._unnamed, exist_ok=True)
            for digest in weights:
                self._set_aside(self.weights_folder(digest), self._unnamed / f"w-{digest}")
            for revision in revisions:
                self._set_aside(self.revision_folder(revision), self._unnamed / f"r-{revision}")
            for folder in (self._quarantine, self._unnamed, self._weights, self._revisions):
                _sync_folder(folder)

    def _set_aside(self, folder: Path, to: Path) -> None:
        if to.exists():
            _remove(to)
        self._move_away(folder, to)
        with contextlib.suppress(FileNotFoundError):
            os.utime(to)  # since when it is there

    def bring_back(self, weights: Iterable[str], revisions: Iterable[str]) -> int:
        """Undo `set_aside` for what of this is there. Returns how many folders came back."""
        found = [(self._unnamed / f"w-{d}", self.weights_folder(d)) for d in weights]
        found += [(self._unnamed / f"r-{r}", self.revision_folder(r)) for r in revisions]
        found = [(aside, folder) for aside, folder in found if aside.exists()]
        if found:
            with disk_errors(self.root):
                for aside, folder in found:
                    aside.rename(folder)
                for parent in (self._unnamed, self._weights, self._revisions):
                    _sync_folder(parent)
        return len(found)

    def quarantined(self) -> list[Path]:
        """Folders of what is in quarantine, damaged or unnamed, oldest first."""
        found = [path for path in self._quarantine.iterdir() if path != self._unnamed]
        if self._unnamed.exists():
            found += self._unnamed.iterdir()
        return sorted(found, key=lambda path: (_changed(path), path.name))

    def prune_quarantine(self, most_bytes: int, older_than: float) -> list[tuple[str, int]]:
        """Remove from quarantine what is there since before ``older_than`` (Unix seconds),
        and then the oldest until ``most_bytes`` are left. Returns (folder's name, bytes)."""
        held = [(path, size_of(path)) for path in self.quarantined()]
        left = sum(size for _, size in held)
        removed = []
        for path, size in held:
            if left <= most_bytes and _changed(path) >= older_than:
                continue
            # In one step: half of it must not be taken back by `bring_back`.
            trash = self.new_staging()
            path.rename(trash / path.name)
            _remove(trash)
            left -= size
            removed.append((path.name, size))
        return removed

    # ---------------------------------------------------------------------- commit

    def commit(
        self, staged: Path, bundle: Bundle, registration: tuple[str, bytes] | None = None
    ) -> bool:
        """Publish the staged files. On return they are on disk, whole and durable.
        True if the staged weights were taken, False if the same were there.

        Content that is there already is verified; damaged content is replaced by
        the staged one, so that pushing again repairs.

        Args:
            registration: name and content of a file to keep beside the bundle, which is
                not part of it: see `registration`.

        Raises:
            DiskFull: nothing was published (weights without a revision may remain;
                nothing refers to them).
        """
        with disk_errors(self.root):
            intact = self._weights_intact(bundle.weights)
            if not intact:
                self._place(staged, self.weights_folder(bundle.weights), REQUIRED_FILES)
            revision = self.revision_folder(bundle.revision)
            if self._revision_intact(bundle):
                if registration is not None:
                    self._add(staged, revision, *registration)
            else:
                write_file(staged / _BUNDLE, bundle.document)
                names = [_BUNDLE, *bundle.files]
                # Other names keep their registrations.
                for path in self.registrations(bundle.revision):
                    remove(staged / path.name)
                    _link(path, staged / path.name)
                    names.append(path.name)
                if registration is not None:
                    name, data = registration
                    remove(staged / name)
                    write_file(staged / name, data)
                    names += [] if name in names else [name]
                self._place(staged, revision, names)
        return not intact

    def _add(self, staged: Path, folder: Path, name: str, data: bytes) -> None:
        """Put one more file into a committed folder, or another one in its place."""
        ready = staged / secrets.token_hex(8)
        write_file(ready, data)
        _sync_file(ready)
        ready.rename(folder / name)
        _sync_folder(folder)

    def bundle(self, revision: str) -> Bundle:
        """What a stored revision is made of, as its ``bundle.json`` says."""
        document = json.loads((self.revision_folder(revision) / _BUNDLE).read_bytes())
        return Bundle(document["weights"], document["files"])

    def link_all(self, bundle: Bundle, to: Path) -> None:
        """Put all files of a stored revision into one folder, as they were pushed."""
        for name in REQUIRED_FILES:
            _link(self.weights_folder(bundle.weights) / name, to / name)
        for name in bundle.files:
            _link(self.revision_folder(bundle.revision) / name, to / name)

    # --------------------------------------------------------------- registrations

    def registrations(self, revision: str) -> list[Path]:
        """Files that say under which names a stored revision is registered."""
        folder = self.revision_folder(revision)
        return sorted(folder.glob(f"{REGISTRATION}*"))

    def register(self, revision: str, name: str, data: bytes) -> None:
        """Write such a file beside a committed revision. Does nothing where that is gone."""
        folder = self.revision_folder(revision)
        if not folder.is_dir():
            return
        staged = self.new_staging()
        try:
            with disk_errors(self.root):
                self._add(staged, folder, name, data)
        finally:
            _remove(staged)

    def complete(self, weights: str, revision: str, name: str, data: bytes) -> None:
        """`register` unless it is there, not durable yet; and private modes for all of it."""
        folder = self.revision_folder(revision)
        with disk_errors(self.root):
            if folder.is_dir() and not (folder / name).exists():
                staged = self.new_staging()
                write_file(staged / name, data)
                (staged / name).rename(folder / name)
                remove(staged)
            for each in (folder, self.weights_folder(weights)):
                if each.is_dir():
                    make_private(self.root.parent, (each, *each.iterdir()))

    def unregister(self, revision: str, name: str) -> None:
        """Remove such a file. May be called again."""
        with disk_errors(self.root):
            (self.revision_folder(revision) / name).unlink(missing_ok=True)

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
        make_folder(ready)
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


def _changed(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_mtime
    return 0.0


def size_of(folder: Path) -> int:
    """Bytes of the files right below a folder."""
    size = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                size += path.lstat().st_size
    return size


_sync_file: Final = sync
_sync_folder: Final = sync
_link: Final = link
_remove: Final = remove
