"""The registry: the facade over format, store, catalog and index.

A publish is: check the received files, store their content (`stage`), one catalog
transaction, then the index (`commit`). Nothing is visible before it is complete and durable,
and every acknowledged change survives ``kill -9``. `open_uploads` receives content,
`publishing` publishes it, `aliases` and `editing` change it, `lookups` reads it; `core` is
their shared state.
The index is never locked across a system call, so `resolve`, `acquire` and `release` may
be called from an event loop. Call everything else from a worker thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from veneer_registry.adapter import AdapterRef, BaseSpec
from veneer_registry.aliases import Aliases
from veneer_registry.completing import Completing
from veneer_registry.core import Core, ReadAdapter
from veneer_registry.editing import Editing
from veneer_registry.format import read_upload
from veneer_registry.lock import OwnerLock
from veneer_registry.lookups import Lookups
from veneer_registry.open_uploads import OpenUploads
from veneer_registry.opening import FolderLocations, Locations, open_core
from veneer_registry.publishing import Publishing
from veneer_registry.records import UploadRequest
from veneer_registry.replicating import Replicating
from veneer_registry.rows import HistoryRow, ResidentRow, Who
from veneer_registry.upload import Upload


class Registry(Lookups, Aliases, Editing, Publishing, Replicating):
    """Owner of a data folder. Thread-safe.

    Attributes:
        closed: whether it was closed.
    """

    closed = False

    def __init__(self, core: Core, *, max_adapter_bytes: int) -> None:
        """Use `Registry.open`."""
        super().__init__(core)
        self._uploads = OpenUploads(core, max_adapter_bytes)
        self._completing = Completing(core)

    @classmethod
    def open(
        cls,
        data_dir: Path,
        base: BaseSpec,
        *,
        lock: OwnerLock | None = None,
        places: Locations | None = None,
        retain_superseded: int = 2,
        max_adapter_bytes: int = 2 << 30,
        clock: Callable[[], float] = time.time,
        read: ReadAdapter = read_upload,
    ) -> Self:
        """Lock the folder, check that its parts belong together, and fill the index.

        Args:
            data_dir: created if missing; one owner at a time.
            base: what uploads are checked against.
            lock: the folder's lock, if the caller holds it already; otherwise it is taken
                here. `close` releases it either way.
            places: where catalog and content are kept; by default in the folder.
            retain_superseded: revisions kept behind the current one of each name.
            max_adapter_bytes: largest ``adapter_model.safetensors`` accepted.
            clock: returns Unix seconds, for `AdapterRecord.created`.
            read: checks the files of an upload; raises what `read_upload` does.

        Raises:
            StoreLocked: another process owns the folder.
            StoreMismatch: catalog and store do not belong together; nothing was changed.
            CatalogDamaged: the catalog cannot be read; nothing was changed.
            FailedPrecondition: the catalog is from a newer version.
            InvalidField: the folder belongs to another user.
            DiskFull: the disk has no space to open it.
            Unavailable: the catalog or the store is elsewhere and cannot be reached.
        """
        if lock is None:
            lock = OwnerLock(data_dir)
        try:
            if places is None:
                places = FolderLocations(data_dir)
            core = open_core(places, base, lock, retain_superseded, clock, read)
            return cls(core, max_adapter_bytes=max_adapter_bytes)
        except BaseException:
            lock.release()
            raise

    def close(self) -> None:
        """End open uploads, wait for a running change, release the folder."""
        self.closed = True
        self._uploads.close()
        with self._core.changes.here():
            self._core.catalog.close()
        self._core.close()
        self._core.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------- publish

    def committed(self, request: UploadRequest) -> Mapping[str, int]:
        """Bytes of each announced file that need not be sent with ``resume``: those of an
        interrupted upload, and all of a file whose content is stored.

        Raises as `begin_upload`.
        """
        return self._uploads.committed(request)

    def stores(self, request: UploadRequest) -> bool:
        """Whether all announced weights are stored already, under any name."""
        return self._uploads.stores(request)

    def begin_upload(self, request: UploadRequest, *, resume: bool = False) -> Upload:
        """Check a request and open its files for writing.

        Args:
            resume: continue from `committed`; an upload of the same files that another
                connection is still sending is ended. If False, everything is sent again.

        Raises:
            InvalidField, AdapterInvalid: see `check_request`; or the name is the base's.
            ChecksumMismatch: the bytes received earlier are damaged; begin without ``resume``.
            DiskFull: the disk has no space for the announced bytes.
        """
        return self._uploads.begin(request, resume=resume)

    def sweep_uploads(self, idle_s: float) -> int:
        """Remove interrupted uploads that have been idle for ``idle_s`` seconds."""
        return self._uploads.sweep(idle_s)

    def trim_uploads(self, *, most: int, most_bytes: int) -> int:
        """Remove the oldest interrupted uploads beyond ``most`` or ``most_bytes``. Active
        uploads and the newest interrupted one stay."""
        return self._uploads.trim(most=most, most_bytes=most_bytes)

    # -------------------------------------------------------------------- changes

    def note(self, event: str, ref: AdapterRef, who: Who, detail: str = "") -> None:
        """Add a line to the history, for something that was done to a revision in memory. A
        read-only copy has no history: there it does nothing."""
        if self._core.catalog.read_only:
            return
        with self._core.changes, self._core.change(who) as change:
            change.note(event, ref.name, ref.revision, detail)

    def watch(self, watcher: Callable[[Sequence[HistoryRow]], None]) -> None:
        """Call ``watcher`` with the changes that other processes make in the same catalog: each
        line of the history once, in order, after lookups show the change. Never called for a
        data folder, which has one owner.

        Args:
            watcher: called from a thread of the registry; must return soon and not raise.
        """
        self._core.watchers.append(watcher)

    # ---------------------------------------------------------------------- memory

    def set_residents(self, residents: Sequence[ResidentRow]) -> None:
        """Record the resident adapters, most recently used first."""
        self._core.catalog.set_residents(residents)

    # ----------------------------------------------------------------------- sweep

    @property
    def needs_sweep(self) -> bool:
        """Whether there is content to remove: then call `sweep` from a worker thread."""
        return self._core.index.has_garbage

    def complete_store(self, limit: int = 100) -> bool:
        """Upgrade content that an older Veneer stored: add the registrations that `store
        recover` needs, and make files private. Processes up to ``limit`` names per call; False
        once there is nothing left to do.
        """
        return self._completing.more(limit)

    def prune_quarantine(self, most_bytes: int, idle_s: float) -> Sequence[tuple[str, int]]:
        """Keep the quarantine within bounds: remove what has been there for longer than
        ``idle_s`` seconds, then the oldest until at most ``most_bytes`` are left.

        Returns (name, bytes) for each removed item.
        """
        quarantine = self._core.store.quarantine
        with self._core.changes:
            chosen = quarantine.choose(most_bytes, time.time() - idle_s)
        return quarantine.remove(chosen)

    def sweep(self) -> int:
        """Remove content that no name or lease needs. Returns the number of folders removed."""
        return self._core.sweep()
