"""The disk tier: content-addressed folders, committed atomically.

::

    store/weights/<weights digest>/   adapter_config.json  adapter_model.safetensors
    store/revisions/<revision>/       bundle.json, the bundle's other files, and one
                                      registration per name that has it (`registration`)
    store/uploads/<upload id>/        received part of an upload, which can be resumed
    store/staging/<random>/           content that is being assembled or removed
    store/quarantine/<digest>/        weights that were found damaged, kept for inspection
    store/quarantine/unnamed/         intact content that no catalog row named at start-up
    store/id  store/changes           tie the store to its catalog (`pairing`)

``bundle.json`` is canonical: its SHA-256 is the revision. Paths are built from
digests computed here and from random hex, never from a caller's text. A commit
is: fsync files, fsync folder, rename, fsync parent. So a folder that exists under
its digest is complete even after a power cut. Callers serialise commit and remove.
Folders are 0700 and files 0600, whatever the umask.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

from veneer_registry.bundle import Bundle
from veneer_registry.bundle_files import REQUIRED_FILES
from veneer_registry.disk import (
    disk_errors,
    link,
    make_folder,
    make_private,
    move_away,
    remove,
    sync,
    write_file,
)
from veneer_registry.errors import AdapterCorrupt
from veneer_registry.quarantine import Quarantine
from veneer_registry.store_folders import StoreFolders, checked_digest
from veneer_registry.stored_adapter import verify_weights
from veneer_registry.upload_folders import UploadFolders

_log = logging.getLogger(__name__)

_BUNDLE: Final = "bundle.json"
_FETCHING: Final = ThreadPoolExecutor(8, thread_name_prefix="fetch")
"""Separate threads for downloads: a slow object store must not stall other work."""
REGISTRATION: Final = "registered-"
"""Prefix of a registration's file name."""


class Store(StoreFolders):
    """The content in the folders under ``root``. Adapter names are in the catalog, not here.

    Attributes:
        remote: whether reading it takes a network.
    """

    remote = False

    def __init__(self, root: Path) -> None:
        """See `StoreFolders`."""
        super().__init__(root)
        self.uploads = UploadFolders(self)
        self.quarantine = Quarantine(self)

    def has(self, digest: str, file: str) -> bool:
        """Whether this file of committed content exists."""
        parents = (self.weights_root, self.revisions_root)
        return any((parent / checked_digest(digest) / file).is_file() for parent in parents)

    def link(self, digest: str, file: str, to: Path) -> bool:
        """Link a stored file to ``to`` instead of copying it; False if it does not exist."""
        for parent in (self.weights_root, self.revisions_root):
            with contextlib.suppress(FileNotFoundError):
                link(parent / checked_digest(digest) / file, to)
                return True
        return False

    # ---------------------------------------------------------------------- commit

    def commit(
        self, staged: Path, bundle: Bundle, registration: tuple[str, bytes] | None = None
    ) -> bool:
        """Publish the staged files. On return they are complete and durable.

        Returns True if the staged weights were stored, False if the same were stored already.
        Existing content is verified, and replaced by the staged content if it is damaged, so
        that pushing again repairs it.

        Args:
            registration: name and content of a file to keep beside the bundle, without
                being part of it: see `registration`.

        Raises:
            DiskFull: nothing was published (weights that no revision refers to may remain).
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
                    link(path, staged / path.name)
                    names.append(path.name)
                if registration is not None:
                    name, data = registration
                    remove(staged / name)
                    write_file(staged / name, data)
                    names += [] if name in names else [name]
                self._place(staged, revision, names)
        return not intact

    def _add(self, staged: Path, folder: Path, name: str, data: bytes) -> None:
        """Add a file to a committed folder, or replace it there."""
        ready = staged / secrets.token_hex(8)
        write_file(ready, data)
        sync(ready)
        ready.rename(folder / name)
        sync(folder)

    def bundle(self, revision: str) -> Bundle:
        """The bundle of a stored revision, from its ``bundle.json``."""
        document = json.loads((self.revision_folder(revision) / _BUNDLE).read_bytes())
        return Bundle(document["weights"], document["files"])

    def link_all(self, bundle: Bundle, to: Path) -> None:
        """Link all files of a stored revision into one folder, as they were pushed."""
        for name in REQUIRED_FILES:
            link(self.weights_folder(bundle.weights) / name, to / name)
        for name in bundle.files:
            link(self.revision_folder(bundle.revision) / name, to / name)

    @contextmanager
    def files_of(self, bundle: Bundle) -> Iterator[Mapping[str, Path]]:
        """Local paths of all files of a stored revision, by name, within the block. Raises
        AdapterCorrupt, Unavailable."""
        weights, revision = (
            self.weights_folder(bundle.weights),
            self.revision_folder(bundle.revision),
        )
        found = {name: weights / name for name in REQUIRED_FILES}
        yield found | {name: revision / name for name in sorted(bundle.files)}

    # ------------------------------------------------- for content that is kept elsewhere

    def claim(self, bundle: Bundle) -> AbstractContextManager[None]:
        """Within the block, no other registry removes this content. Nothing to do here: a
        folder has only one owner."""
        return contextlib.nullcontext()

    def prepare(self, staged: Path, bundle: Bundle, *, damaged: bool) -> bool:
        """Do the part of `commit` that can be done ahead, while others commit. Return True if
        this stored the weights, so that `commit` does not.

        Args:
            damaged: whether the stored weights are known to be damaged, if there are any.
        """
        return False

    def is_local(self, weights: str) -> bool:
        """Whether committed weights can be read from `weights_folder` now. Reads no disk."""
        return True

    def fetch(self, weights: str) -> bool:
        """Make `is_local` true. Return whether the weights had to be fetched. Raises
        AdapterCorrupt, QueueFull, Unavailable."""
        return False

    async def bring(self, weights: str) -> bool:
        """As `fetch`, from an event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_FETCHING, self.fetch, weights)

    def heal(self, weights: str) -> bool:
        """Replace damaged weights by an intact copy. Return False if there is none."""
        return False

    def keep_while(self, leases: Callable[[str], int], named: Callable[[str], bool]) -> None:
        """Set the functions that decide whether content is kept: ``leases`` returns how many
        requests need it now, and ``named`` whether a name has it."""

    # --------------------------------------------------------------- registrations

    def registered(self, revision: str) -> bool:
        """Whether a stored revision has a registration."""
        return bool(self.registrations(revision))

    def registrations(self, revision: str) -> list[Path]:
        """Registration files of a stored revision, one per name."""
        folder = self.revision_folder(revision)
        return sorted(folder.glob(f"{REGISTRATION}*"))

    def keep_registered(self, revision: str, name: str, data: bytes) -> None:
        """`register` if there is no such registration."""
        if not self.has(revision, name):
            self.register(revision, name, data)

    def register(self, revision: str, name: str, data: bytes) -> None:
        """Write a registration beside a committed revision. Does nothing if that is gone."""
        folder = self.revision_folder(revision)
        if not folder.is_dir():
            return
        staged = self.new_staging()
        try:
            with disk_errors(self.root):
                self._add(staged, folder, name, data)
        finally:
            remove(staged)

    def complete(self, weights: str, revision: str, name: str, data: bytes) -> None:
        """Write a registration if there is none, without fsync. Also make the folders of the
        weights and the revision private."""
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
        """Remove a registration. Idempotent."""
        with disk_errors(self.root):
            (self.revision_folder(revision) / name).unlink(missing_ok=True)

    def discard(self, weights: Iterable[str], revisions: Iterable[str]) -> Path:
        """Move committed folders to a staging folder, in one rename each. The caller must
        `drop_staging` the result."""
        trash = self.new_staging()
        try:
            for folder, to in self.places(weights, revisions, trash):
                move_away(folder, to)
        except BaseException:
            remove(trash)
            raise
        return trash

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
            # Linked, so that if the server is killed now, the upload need not be sent again.
            link(staged / name, ready / name)
            sync(ready / name)
        sync(ready)
        if target.exists():
            target.rename(staged / secrets.token_hex(8))
        ready.rename(target)
        sync(target.parent)


def _sha256_or_none(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
