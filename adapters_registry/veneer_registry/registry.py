"""The registry: the facade over format, store, catalog and index.

A publish is: check the staged files, commit content to disk, one catalog
transaction, then the index. Nothing is visible before it is whole and durable,
and what was acknowledged survives ``kill -9``. Two locks: `_changes` is held by
whatever changes disk or catalog, for as long as that takes; the index has its
own, never held across a system call, so `resolve`, `acquire` and `release` may
be called from an event loop. Call everything else from a worker thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from veneer_registry.adapter import AdapterRef, BaseSpec
from veneer_registry.catalog import Catalog, RevisionRow
from veneer_registry.errors import (
    AdapterExists,
    AdapterNotFound,
    BaseModelMismatch,
    EtagMismatch,
    FailedPrecondition,
    InvalidField,
    VeneerError,
)
from veneer_registry.format import (
    REQUIRED_FILES,
    manifest_from_json,
    manifest_to_json,
    read_adapter,
)
from veneer_registry.index import Entry, Index
from veneer_registry.lease import RevisionLease
from veneer_registry.lock import OwnerLock
from veneer_registry.records import AdapterRecord, Published, UploadFile, UploadRequest
from veneer_registry.recovery import base_identity, recover
from veneer_registry.store import Bundle, Store, disk_full
from veneer_registry.upload import Upload, check_request
from veneer_registry.values import SERVING_BYTES

__all__ = [
    "AdapterRecord",
    "Published",
    "Registry",
    "RevisionLease",
    "Upload",
    "UploadFile",
    "UploadRequest",
]

_log = logging.getLogger(__name__)

_MAX_PAGE: Final = 1000
_CACHED_MANIFESTS: Final = 256


class Registry:
    """Owner of a data folder. Thread-safe."""

    def __init__(
        self,
        parts: _Parts,
        base: BaseSpec,
        *,
        retain_superseded: int,
        max_adapter_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        """Use `Registry.open`."""
        self._lock = parts.lock
        self._store = parts.store
        self._catalog = parts.catalog
        self._index = parts.index
        self._base = base
        self._base_id = base_identity(base)
        self._retain = retain_superseded
        self._max_adapter_bytes = max_adapter_bytes
        self._clock = clock
        self._changes = threading.Lock()
        self._uploads: set[Upload] = set()
        self._uploads_lock = threading.Lock()
        # Rows are read each time, their parsed manifests kept: keyed by their own
        # text, so that an entry cannot be stale.
        self._parse = functools.lru_cache(maxsize=_CACHED_MANIFESTS)(manifest_from_json)

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
        """Take the folder and bring it to a consistent state.

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
            FailedPrecondition: the catalog is damaged or from another version.
            DiskFull: there is no room to open it.
        """
        if lock is None:
            lock = OwnerLock(data_dir)
        try:
            store = Store(data_dir / "store")
            catalog = Catalog(data_dir / "catalog.sqlite")
        except BaseException:
            lock.release()
            raise
        try:
            index = Index(base.name)
            recover(store, catalog, index, base_identity(base))
        except BaseException:
            catalog.close()
            lock.release()
            raise
        return cls(
            _Parts(lock, store, catalog, index),
            base,
            retain_superseded=retain_superseded,
            max_adapter_bytes=max_adapter_bytes,
            clock=clock,
        )

    def close(self) -> None:
        """Abort open uploads, wait for a running change, give the folder back."""
        with self._uploads_lock:
            uploads = tuple(self._uploads)
        for upload in uploads:
            upload.abort()
        with self._changes:
            self._catalog.close()
            self._lock.release()

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
        return len(self._index)

    # ------------------------------------------------------------------- publish

    def begin_upload(self, request: UploadRequest) -> Upload:
        """Check an announcement and open its files for writing.

        Raises:
            InvalidField, AdapterInvalid: see `check_request`; or the name is the base's.
            DiskFull: the disk has not room for the announced bytes.
        """
        check_request(request, self._max_adapter_bytes)
        if request.name == self._base.name:
            # OpenAI's `model` names both kinds: the adapter could not be asked for.
            raise InvalidField(
                f"{request.name!r} is the base model's name: choose another for the adapter",
                metadata={"field": "name"},
            )
        if sum(file.size for file in request.files) > self._store.free_bytes():
            raise disk_full(self._lock.data_dir)
        upload = Upload(request, self._store.new_staging(), self._discard)
        with self._uploads_lock:
            self._uploads.add(upload)
        return upload

    def _discard(self, upload: Upload) -> None:
        with self._uploads_lock:
            self._uploads.discard(upload)
        self._store.drop_staging(upload.folder)

    def publish(self, upload: Upload, *, validate_only: bool = False) -> Published:
        """Check a complete upload and make it the current revision of its name.

        The upload is used up, whatever the outcome. Same content as the current
        revision succeeds with ``published=False`` (and repairs what is damaged on
        disk).

        Raises:
            InvalidField, ChecksumMismatch: incomplete or damaged in transit.
            AdapterInvalid, BaseModelMismatch: see `read_adapter`.
            AdapterExists: the name holds other content, ``allow_replace`` is not set.
            DiskFull: nothing was published.
        """
        request = upload.request
        with upload:
            upload.finish()
            manifest = read_adapter(upload.folder, self._base)
            extra = {f.name: f.sha256 for f in request.files if f.name not in REQUIRED_FILES}
            bundle = Bundle(manifest.weights_digest, extra)
            row = RevisionRow(
                name=request.name,
                revision=bundle.revision,
                weights=bundle.weights,
                base=self._base_id,
                manifest=manifest_to_json(manifest),
                created=self._clock(),
                labels=dict(request.labels),
                bytes=upload.received_bytes,
            )
            if validate_only:
                return self._preview(request, row)
            with self._changes:
                published = self._commit(upload, bundle, row)
        self.sweep()
        return published

    def _preview(self, request: UploadRequest, row: RevisionRow) -> Published:
        entry = self._index.entry(request.name)
        self._check_replace(request, entry, row.revision)
        record = dataclasses.replace(self._record(row), current=False, etag="")
        if entry is not None:
            same = _holds(entry, row.revision)
            record = dataclasses.replace(record, current=same, etag=str(entry.generation))
        return Published(record, False, False, record.manifest.warnings)

    def _check_replace(
        self, request: UploadRequest, entry: Entry | None, revision: str
    ) -> None:
        if entry is None or entry.current is None or request.allow_replace:
            return
        if entry.current.revision != revision:
            raise AdapterExists(
                f"adapter {request.name!r} holds other content ({entry.current.short}); "
                "allow replacing it (--replace), or choose another name",
                metadata={"adapter": request.name, "current": entry.current.revision},
            )

    def _commit(self, upload: Upload, bundle: Bundle, row: RevisionRow) -> Published:
        entry = self._index.entry(row.name)
        self._check_replace(upload.request, entry, row.revision)
        ref = AdapterRef(row.name, row.revision, row.weights)
        old = () if entry is None else entry.revisions
        others = tuple(other for other in old if other.revision != row.revision)
        kept, dropped = others[: self._retain], others[self._retain :]
        same = entry is not None and _holds(entry, row.revision)
        foreign: frozenset[str] = frozenset() if entry is None else entry.foreign
        try:
            self._store.commit(upload.folder, bundle)
            if same and row.revision not in foreign:
                return self._unchanged(upload.request, row)
            generation = self._catalog.publish(row)
        except BaseException:
            self._index.mark(ref)
            raise
        foreign &= {other.revision for other in kept}
        self._index.put(row.name, Entry(ref, (ref, *kept), generation, foreign))
        if dropped:
            self._drop_superseded(row.name, dropped)
        replaced = entry is not None and entry.current is not None and not same
        record = self._record(dataclasses.replace(row, generation=generation))
        return Published(record, True, replaced, record.manifest.warnings, dropped)

    def _drop_superseded(self, name: str, dropped: tuple[AdapterRef, ...]) -> None:
        # After the index has moved on: a request that found one of them before asks
        # again and gets the new one. The publish itself stands, so no error from here.
        try:
            self._catalog.drop_superseded(name, [ref.revision for ref in dropped])
        except VeneerError as error:
            _log.warning("superseded revisions of %s stay in the catalog: %s", name, error)

    def _unchanged(self, request: UploadRequest, new: RevisionRow) -> Published:
        row = self._catalog.revision(new.name, new.revision)
        record = self._record(new if row is None else row)
        warnings = record.manifest.warnings
        if request.labels and dict(request.labels) != dict(record.labels):
            warnings += (
                "the name holds this content already; its labels were left as they are",
            )
        return Published(record, False, False, warnings)

    # ------------------------------------------------------------------- look-up

    def resolve(self, name: str) -> AdapterRef:
        """The revision that ``name`` or ``name@revision`` means now. Microseconds.

        ``revision`` is 12 to 64 of its first hex digits.

        Raises:
            InvalidField: not of that form, or ambiguous.
            AdapterNotFound: metadata ``did_you_mean`` where a name is near.
            BaseModelMismatch: it was registered for another base.
        """
        return self._index.resolve(name)

    def acquire(self, name: str) -> RevisionLease:
        """`resolve` and lease in one step: the content stays until the lease ends,
        also when it is deleted or superseded meanwhile. Under a millisecond."""
        before: AdapterRef | None = None
        while True:
            found = self._index.acquire(name)
            try:
                row = self._catalog.revision(found.ref.name, found.ref.revision)
                if row is not None:
                    return RevisionLease(self._record(row), self._index.release)
                self._check_moved(found.ref, before)
            except BaseException:
                self._index.release(found.ref)
                raise
            before = found.ref
            self._index.release(found.ref)

    def acquire_weights(self, weights_digest: str) -> RevisionLease:
        """`acquire` of any kept revision that has these weights. Raises AdapterNotFound."""
        for ref in self._index.holding(weights_digest):
            # Deleted just now, or registered for another base.
            with contextlib.suppress(AdapterNotFound, BaseModelMismatch):
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
                metadata={"adapter": ref.name},
            )

    def get(self, name: str) -> AdapterRecord:
        """The record of ``name`` or ``name@revision``, whichever base it is for."""
        before: AdapterRef | None = None
        while True:
            ref = self._index.find(name).ref
            row = self._catalog.revision(ref.name, ref.revision)
            if row is not None:
                return self._record(row)
            self._check_moved(ref, before)
            before = ref

    def revisions(self, name: str) -> tuple[AdapterRecord, ...]:
        """All kept revisions of a plain name, newest first. Raises AdapterNotFound."""
        rows = self._catalog.revisions(name)
        if not rows:
            self._index.find(name)
        return tuple(map(self._record, rows))

    def list(
        self,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        after: str = "",
        limit: int = 100,
    ) -> tuple[AdapterRecord, ...]:
        """Current revisions in name order; ``after`` is the last name of the page before.

        Raises InvalidField for a limit outside 1 to 1000.
        """
        if not 1 <= limit <= _MAX_PAGE:
            raise InvalidField(
                f"page size {limit} is not allowed: use 1 to {_MAX_PAGE}",
                metadata={"field": "page_size"},
            )
        rows = self._catalog.page(prefix, labels or {}, after, limit)
        return tuple(map(self._record, rows))

    def holding(self, weights_digest: str) -> tuple[AdapterRecord, ...]:
        """All kept revisions, of any name, that have these weights."""
        refs = self._index.holding(weights_digest)
        rows = (self._catalog.revision(ref.name, ref.revision) for ref in refs)
        return tuple(self._record(row) for row in rows if row is not None)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._index.entry(name) is not None

    def names(self, weights_digest: str) -> tuple[str, ...]:
        """All names that have a kept revision with these weights, sorted; from memory."""
        return tuple(dict.fromkeys(ref.name for ref in self._index.holding(weights_digest)))

    def leases(self, weights_digest: str) -> int:
        """Requests that hold these weights now."""
        return self._index.leases(weights_digest)

    def weights_folder(self, ref: AdapterRef) -> Path:
        """Folder with the two weight files of a leased or registered revision."""
        return self._store.weights_folder(ref.weights_digest)

    def _record(self, row: RevisionRow) -> AdapterRecord:
        manifest = self._parse(row.manifest)
        # The server may have been started again with another serving dtype.
        served = manifest.parameters * SERVING_BYTES[self._base.serving_dtype]
        return AdapterRecord(
            ref=AdapterRef(row.name, row.revision, row.weights),
            manifest=dataclasses.replace(manifest, serving_bytes=served),
            created=row.created,
            labels=row.labels,
            current=row.current,
            etag=str(row.generation),
            bytes=row.bytes,
        )

    # -------------------------------------------------------------------- delete

    def delete(self, name: str, etag: str | None = None) -> tuple[str, ...]:
        """Forget ``name`` with all its revisions, or one ``name@revision``.

        Running requests keep what they lease. Returns the revisions, newest first.

        Raises:
            AdapterNotFound: there is none.
            EtagMismatch: ``etag`` is given and is not the name's.
            FailedPrecondition: ``name@revision`` is current and others are kept: the
                name would silently mean an older one.
        """
        plain, at, _ = name.partition("@")
        with self._changes:
            entry = self._index.entry(plain)
            targets: tuple[AdapterRef, ...]
            if entry is None or at:
                found = self._index.find(name)
                entry, targets = found.entry, (found.ref,)
            else:
                targets = entry.revisions
            if etag and etag != str(entry.generation):
                raise EtagMismatch(
                    f"adapter {plain!r} has etag {entry.generation}, not {etag[:40]}: it was "
                    "changed meanwhile; read it again",
                    metadata={"adapter": plain, "etag": str(entry.generation)},
                )
            left = tuple(ref for ref in entry.revisions if ref not in targets)
            if left and entry.current in targets:
                raise FailedPrecondition(
                    f"{targets[0].short} is what {plain!r} means now; push another revision "
                    f"first, or delete {plain!r} with all of them",
                    metadata={"adapter": plain},
                )
            gone = tuple(ref.revision for ref in targets)
            if left:
                generation = self._catalog.delete_revisions(plain, gone)
                kept = Entry(entry.current, left, generation, entry.foreign - set(gone))
                self._index.put(plain, kept)
            else:
                self._catalog.delete_name(plain)
                self._index.remove(plain)
        self.sweep()
        return gone

    @property
    def needs_sweep(self) -> bool:
        """A released lease left content to remove: call `sweep` from a worker thread."""
        return self._index.has_garbage

    def sweep(self) -> int:
        """Remove content that no name and no lease needs. Returns folders removed."""
        with self._changes:
            digests, revisions = self._index.take_garbage()
            if not digests and not revisions:
                return 0
            trash = self._store.discard(digests, revisions)
        self._store.drop_staging(trash)
        return len(digests) + len(revisions)


@dataclasses.dataclass(frozen=True, slots=True)
class _Parts:
    lock: OwnerLock
    store: Store
    catalog: Catalog
    index: Index


def _holds(entry: Entry, revision: str) -> bool:
    return entry.current is not None and entry.current.revision == revision
