"""The registry: the facade over format, store, catalog and index.

A publish is: check the received files, bring content to disk (`stage`), one catalog
transaction, then the index (`commit`). Nothing is visible before it is whole and durable,
and what was acknowledged survives ``kill -9``. `open_uploads` receives content,
`publishing` brings it in, `editing` changes what is there; `core` is what they share.
The index is never locked across a system call, so `resolve`, `acquire` and `release` may
be called from an event loop. Call everything else from a worker thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from veneer_registry.adapter import AdapterRef, BaseSpec
from veneer_registry.catalog import Catalog
from veneer_registry.completing import Completing
from veneer_registry.core import Core
from veneer_registry.disk import make_private
from veneer_registry.editing import Editor
from veneer_registry.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    BaseModelMismatch,
    InvalidField,
)
from veneer_registry.index import Index
from veneer_registry.lease import RevisionLease
from veneer_registry.lock import OwnerLock
from veneer_registry.open_uploads import OpenUploads
from veneer_registry.pairing import ChangeMark, check_catalog, check_pair, settle_id, survey
from veneer_registry.publishing import Publisher, Staged
from veneer_registry.records import (
    AdapterRecord,
    AliasChange,
    Published,
    UploadFile,
    UploadRequest,
)
from veneer_registry.recovery import base_identity, recover
from veneer_registry.rows import SERVER, AliasRow, HistoryRow, ResidentRow, Who
from veneer_registry.store import Store
from veneer_registry.upload import Upload

__all__ = [
    "AdapterRecord",
    "AliasChange",
    "Published",
    "Registry",
    "RevisionLease",
    "Staged",
    "Upload",
    "UploadFile",
    "UploadRequest",
    "Who",
]

_MAX_PAGE: Final = 1000


class Registry:
    """Owner of a data folder. Thread-safe."""

    def __init__(self, core: Core, *, max_adapter_bytes: int) -> None:
        """Use `Registry.open`."""
        self._core = core
        self._uploads = OpenUploads(core, max_adapter_bytes)
        self._publisher = Publisher(core)
        self._editor = Editor(core)
        self._completing = Completing(core)

    @classmethod
    def open(
        cls,
        data_dir: Path,
        base: BaseSpec,
        *,
        lock: OwnerLock | None = None,
        retain_superseded: int = 2,
        max_adapter_bytes: int = 2 << 30,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Take the folder, check that its parts belong together, and fill the index.

        Args:
            data_dir: made if missing; one owner at a time.
            base: what uploads are checked against.
            lock: the folder's lock, where the caller took it before; else taken
                here. `close` releases it either way.
            retain_superseded: revisions kept behind the current one of each name.
            max_adapter_bytes: largest ``adapter_model.safetensors`` accepted.
            clock: Unix seconds, for `AdapterRecord.created`.

        Raises:
            StoreLocked: another process owns the folder.
            StoreMismatch: catalog and store do not belong together; nothing was changed.
            CatalogDamaged: the catalog cannot be read; nothing was changed.
            FailedPrecondition: the catalog is from another version.
            InvalidField: the folder belongs to another user.
            DiskFull: there is no room to open it.
        """
        if lock is None:
            lock = OwnerLock(data_dir)
        try:
            return cls._opened(
                data_dir, base, lock, retain_superseded, max_adapter_bytes, clock
            )
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _opened(
        cls,
        data_dir: Path,
        base: BaseSpec,
        lock: OwnerLock,
        retain: int,
        max_adapter_bytes: int,
        clock: Callable[[], float],
    ) -> Self:
        root = data_dir / "store"
        make_private(data_dir, _owned(data_dir))
        found = survey(root)
        check_catalog(data_dir, found)
        mark = ChangeMark(root)
        catalog = Catalog(data_dir / "catalog.sqlite", after_change=mark.write)
        try:
            # Nothing is made or moved before both sides are known to belong together.
            check_pair(data_dir, found, catalog)
            store = Store(root)
            settle_id(root, found, catalog)
            index = Index(base.name)
            recover(store, catalog, index, base, data_dir, clock())
        except BaseException:
            catalog.close()
            mark.close()
            raise
        core = Core(
            lock=lock,
            store=store,
            mark=mark,
            catalog=catalog,
            index=index,
            base=base,
            base_id=base_identity(base),
            retain=retain,
            clock=clock,
        )
        return cls(core, max_adapter_bytes=max_adapter_bytes)

    def close(self) -> None:
        """End open uploads, wait for a running change, give the folder back."""
        self._uploads.close()
        with self._core.changes:
            self._core.catalog.close()
            self._core.mark.close()
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

    def __len__(self) -> int:
        """Registered names."""
        return len(self._core.index)

    # ------------------------------------------------------------------- publish

    def committed(self, request: UploadRequest) -> Mapping[str, int]:
        """Bytes of each announced file that need not be sent with ``resume``: what an
        upload that broke off left, and all of a file whose content is stored.

        Raises as `begin_upload`.
        """
        return self._uploads.committed(request)

    def begin_upload(self, request: UploadRequest, *, resume: bool = False) -> Upload:
        """Check an announcement and open its files for writing.

        Args:
            resume: go on with what `committed` told. A connection that still sends the
                same upload is ended. Without it all is sent.

        Raises:
            InvalidField, AdapterInvalid: see `check_request`; or the name is the base's.
            ChecksumMismatch: what was there is damaged; begin without ``resume``.
            DiskFull: the disk has not room for the announced bytes.
        """
        return self._uploads.begin(request, resume=resume)

    def publish(self, upload: Upload, *, who: Who = SERVER) -> Published:
        """`stage` and `commit` in one: make a complete upload the current revision of its
        name. Raises as they do."""
        return self.commit(self.stage(upload), who)

    def validate(self, upload: Upload) -> Published:
        """Check a complete upload as `stage` does, and publish nothing; it is used up."""
        return self._publisher.validate(upload)

    def stage(self, upload: Upload) -> Staged:
        """Check a complete upload and bring its content to disk; its name still means what
        it meant before. `commit` what it gives, or ``discard`` it.

        The upload is used up, whatever the outcome.

        Raises:
            InvalidField, ChecksumMismatch: incomplete or damaged in transit.
            AdapterInvalid, BaseModelMismatch: see `read_adapter`.
            AdapterExists: the name holds other content, ``allow_replace`` is not set.
            EtagMismatch: the request has an etag, and it is not the name's.
            DiskFull: nothing is left of it.
        """
        return self._publisher.stage(upload)

    def commit(self, staged: Staged, who: Who = SERVER) -> Published:
        """Make staged content the current revision of its name, in one transaction. Same
        content as the current revision succeeds with ``published=False`` (and repairs what
        is damaged on disk). It is used up, whatever the outcome.

        Args:
            who: for the history.

        Raises:
            AdapterExists, EtagMismatch: the name has moved since it was staged.
            DiskFull: nothing was published.
        """
        return self._publisher.commit(staged, who)

    def sweep_uploads(self, idle_s: float) -> int:
        """Remove what arrived of uploads that nobody went on with for so many seconds."""
        return self._uploads.sweep(idle_s)

    def trim_uploads(self, *, most: int, most_bytes: int) -> int:
        """Remove the oldest of what broken uploads left, beyond a number and bytes. None
        that is being sent goes, and the newest stays."""
        return self._uploads.trim(most=most, most_bytes=most_bytes)

    # ------------------------------------------------------------------- look-up

    def resolve(self, name: str, key: str = "") -> AdapterRef:
        """The revision that ``name``, ``name@revision`` or ``name/alias`` means now.
        Microseconds.

        Args:
            name: ``revision`` is 12 to 64 of its first hex digits.
            key: which of an alias's targets; the same key gets the same one.

        Raises:
            InvalidField: not of that form, or ambiguous.
            AdapterNotFound: metadata ``did_you_mean`` where a name is near.
            BaseModelMismatch: it was registered for another base.
            AdapterCorrupt: its stored content is damaged or gone, or its catalog row is.
        """
        return self._core.index.resolve(name, key)

    def acquire(self, name: str, key: str = "") -> RevisionLease:
        """`resolve` and lease in one step: the content stays until the lease ends,
        also when it is deleted or superseded meanwhile. Under a millisecond: it waits for
        no other read of the catalog, and for no change of it."""
        index = self._core.index
        before: AdapterRef | None = None
        while True:
            ref = index.acquire(name, key).ref
            try:
                row = self._core.catalog.revision(ref.name, ref.revision, urgent=True)
                if row is not None:
                    return RevisionLease(self._core.record(row), index.release)
                self._check_moved(ref, before)
            except BaseException:
                index.release(ref)
                raise
            before = ref
            index.release(ref)

    def acquire_weights(self, weights_digest: str) -> RevisionLease:
        """`acquire` of any kept revision that has these weights. Raises AdapterNotFound."""
        for ref in self._core.index.holding(weights_digest):
            # Deleted just now, registered for another base, or its row is damaged.
            with contextlib.suppress(AdapterNotFound, BaseModelMismatch, AdapterCorrupt):
                return self.acquire(f"{ref.name}@{ref.revision}")
        raise AdapterNotFound(
            f"no adapter has the weights {weights_digest[:12]} any more; push them again"
        )

    def _check_moved(self, ref: AdapterRef, before: AdapterRef | None) -> None:
        """Its row is gone. Superseded meanwhile: the name means another revision now, so
        ask again. Still the same: a delete has reached the catalog, not yet the index."""
        if ref == before:
            raise AdapterNotFound(
                f"adapter {ref.short} was deleted just now; push it again",
                metadata={"adapter": ref.name, "cause": "deleted"},
            )

    def get(self, name: str) -> AdapterRecord:
        """The record of ``name``, ``name@revision`` or ``name/alias``, whichever base it is
        for. Raises InvalidField for an alias that means several revisions."""
        before: AdapterRef | None = None
        while True:
            ref = self._core.index.find(name).ref
            row = self._core.catalog.revision(ref.name, ref.revision)
            if row is not None:
                return self._core.record(row)
            self._check_moved(ref, before)
            before = ref

    def revisions(self, name: str) -> tuple[AdapterRecord, ...]:
        """All kept revisions of a plain name, newest first. Raises AdapterNotFound."""
        rows = self._core.catalog.revisions(name)
        if not rows:
            self._core.index.find(name)
        return tuple(map(self._core.record, rows))

    def list(
        self,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        after: str = "",
        limit: int = 100,
    ) -> tuple[AdapterRecord, ...]:
        """Current revisions in name order; ``after`` is the last name of the page before.

        Raises InvalidField for a limit outside 1 to 1001: a page, and one more to know
        whether it is the last.
        """
        _check_limit(limit, _MAX_PAGE + 1)
        rows = self._core.catalog.page(prefix, labels or {}, after, limit)
        return tuple(map(self._core.record, rows))

    def holding(self, weights_digest: str) -> tuple[AdapterRecord, ...]:
        """All kept revisions, of any name, that have these weights."""
        refs = self._core.index.holding(weights_digest)
        found = []
        for ref in refs:
            with contextlib.suppress(AdapterCorrupt):
                if (row := self._core.catalog.revision(ref.name, ref.revision)) is not None:
                    found.append(self._core.record(row))
        return tuple(found)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._core.index.entry(name) is not None

    def names(self, weights_digest: str) -> tuple[str, ...]:
        """All names that have a kept revision with these weights, sorted; from memory."""
        return tuple(
            dict.fromkeys(ref.name for ref in self._core.index.holding(weights_digest))
        )

    def leases(self, weights_digest: str) -> int:
        """Requests that hold these weights now."""
        return self._core.index.leases(weights_digest)

    def weights_folder(self, ref: AdapterRef) -> Path:
        """Folder with the two weight files of a leased or registered revision."""
        return self._core.store.weights_folder(ref.weights_digest)

    def aliases(self, name: str = "") -> tuple[AliasRow, ...]:
        """Aliases of a plain name (of all names if empty), in order. Raises AdapterNotFound."""
        if name:
            return self._core.index.find_entry(name).aliases
        return self._core.catalog.aliases()

    def history(
        self, name: str = "", *, before: int | None = None, limit: int = 100
    ) -> tuple[HistoryRow, ...]:
        """Who changed what when, newest first; kept when a name is deleted.

        Args:
            name: a plain name; empty for all.
            before: only lines older than this `HistoryRow.sequence`.
            limit: 1 to 1000 lines.
        """
        _check_limit(limit)
        return self._core.catalog.history(name, before, limit)

    # -------------------------------------------------------------------- changes

    def set_alias(
        self,
        alias: str,
        targets: Sequence[tuple[str, int]],
        *,
        etag: str = "",
        who: Who = SERVER,
    ) -> AliasChange:
        """Make or move ``name/alias``, in one step for all who ask.

        Args:
            targets: (12 to 64 hex digits of a kept revision, weight of 1 to 10,000).
            etag: if not empty, what the alias's must be.

        Raises:
            InvalidField: not of that form.
            AdapterNotFound: the name, or a revision of it, is not there.
            EtagMismatch: it was moved meanwhile.
        """
        return self._editor.set_alias(alias, targets, etag, who)

    def rollback_alias(self, alias: str, *, etag: str = "", who: Who = SERVER) -> AliasChange:
        """Move ``name/alias`` back to what it meant before its last move.

        Raises:
            FailedPrecondition: it never meant anything else, or that was deleted.
        """
        return self._editor.rollback_alias(alias, etag, who)

    def remove_alias(self, alias: str, *, etag: str = "", who: Who = SERVER) -> AliasChange:
        """End ``name/alias``; the revisions stay."""
        return self._editor.remove_alias(alias, etag, who)

    def update(
        self,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        remove_labels: Sequence[str] = (),
        retain: int | None = None,
        current: bool = False,
        etag: str = "",
        who: Who = SERVER,
    ) -> tuple[AdapterRecord, tuple[AdapterRef, ...]]:
        """Change a revision's labels, or its name; all or nothing.

        Args:
            labels, remove_labels: set these, and remove those.
            retain: superseded revisions that the name keeps; those beyond go at once.
            current: let the plain name mean this revision.
            etag: if not empty, what the name's must be.

        Returns:
            The revision as it is now, and revisions that the name keeps no longer.
        """
        return self._editor.update(
            name,
            labels=labels or {},
            remove_labels=remove_labels,
            retain=retain,
            current=current,
            etag=etag,
            who=who,
        )

    def delete(
        self,
        name: str,
        etag: str | None = None,
        who: Who = SERVER,
        *,
        unless_leased: bool = False,
    ) -> tuple[str, ...]:
        """Forget ``name`` with all its revisions and aliases, or one ``name@revision``.

        Running requests keep what they lease. Returns the revisions, newest first.

        Raises:
            AdapterNotFound: there is none.
            EtagMismatch: ``etag`` is given and is not the name's.
            FailedPrecondition: ``name@revision`` is current and others are kept (the
                name would silently mean an older one), or an alias means it.
            AdapterInUse: ``unless_leased``, and requests use it.
        """
        return self._editor.delete(name, etag or "", who, unless_leased=unless_leased)

    def quarantine(
        self, weights_digest: str, why: str, who: Who = SERVER
    ) -> tuple[AdapterRef, ...]:
        """Stored weights are damaged: serve them no more until they are pushed again.

        Returns the revisions that have them; empty if that was known already.
        """
        return self._editor.quarantine(weights_digest, why, who)

    def note(self, event: str, ref: AdapterRef, who: Who, detail: str = "") -> None:
        """Add a line to the history: something was done to a revision in memory."""
        with self._core.changes, self._core.change(who) as change:
            change.note(event, ref.name, ref.revision, detail)

    # ---------------------------------------------------------------------- memory

    def residents(self) -> tuple[ResidentRow, ...]:
        """What was in memory when `set_residents` was last called, most recent first."""
        return self._core.catalog.residents()

    def set_residents(self, residents: Sequence[ResidentRow]) -> None:
        """Remember what is in memory, most recently used first."""
        with self._core.changes, self._core.change(SERVER) as change:
            change.set_residents(residents)

    # ----------------------------------------------------------------------- sweep

    @property
    def needs_sweep(self) -> bool:
        """A released lease left content to remove: call `sweep` from a worker thread."""
        return self._core.index.has_garbage

    def complete_store(self, limit: int = 100) -> bool:
        """Bring what an older Veneer stored up to date: registrations that `store recover`
        needs, and modes. So many names a call; False once there is nothing left to do.
        """
        return self._completing.more(limit)

    def prune_quarantine(self, most_bytes: int, idle_s: float) -> Sequence[tuple[str, int]]:
        """Keep the quarantine within bounds: remove what has been there for longer than so many
        seconds, and then the oldest until at most so many bytes are left.

        Returns (folder's name, bytes) of what was removed.
        """
        with self._core.changes:
            return self._core.store.prune_quarantine(most_bytes, time.time() - idle_s)

    def sweep(self) -> int:
        """Remove content that no name and no lease needs. Returns folders removed."""
        return self._core.sweep()


def _owned(data_dir: Path) -> Iterator[Path]:
    """What of a data folder must belong to the server, outermost first. The adapters' own
    folders are not looked at one by one: nobody gets past these."""
    yield data_dir
    yield data_dir / "LOCK"
    yield from sorted(data_dir.glob("catalog.sqlite*"))
    store = data_dir / "store"
    yield store
    for name in ("weights", "revisions", "staging", "uploads", "quarantine", "id", "changes"):
        yield store / name


def _check_limit(limit: int, most: int = _MAX_PAGE) -> None:
    if not 1 <= limit <= most:
        raise InvalidField(
            f"page size {limit} is not allowed: use 1 to {most}",
            metadata={"field": "page_size"},
        )
