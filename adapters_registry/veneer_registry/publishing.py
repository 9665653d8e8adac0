"""Turns a complete upload into a revision of a name."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from veneer_registry import registration
from veneer_registry.adapter import AdapterRef, BaseWord
from veneer_registry.bundle import Bundle
from veneer_registry.bundle_files import REQUIRED_FILES
from veneer_registry.changes import Change
from veneer_registry.core import Part, check_etag
from veneer_registry.entry import Entry
from veneer_registry.errors import AdapterCorrupt, AdapterExists, VeneerError
from veneer_registry.manifest_json import manifest_to_json
from veneer_registry.records import AdapterRecord, Published, UploadRequest
from veneer_registry.rows import SERVER, RevisionRow, Who
from veneer_registry.upload import Upload
from veneer_registry.weights import WEIGHTS_FILE

_log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Content:
    """Content of an upload.

    Attributes:
        sums: SHA-256 of each file.
        word: the manifest's ``base_word``.
        fresh: the weights are new on disk, or were in quarantine.
        found: the revision's content was missing from the disk before.
    """

    bundle: Bundle
    sums: Mapping[str, str]
    word: BaseWord
    fresh: bool = False
    found: bool = False


@dataclasses.dataclass(eq=False)
class Staged:
    """Content that is on disk but has no name yet. Sweeps leave it alone until
    `Publishing.commit` or `discard`.

    Attributes:
        folder: its files.
        record: record of the new revision, which is not current.
        current: the name's current revision at the time of staging; None if it has none or it
            is this one.
        end: undoes the staging.
    """

    request: UploadRequest
    row: RevisionRow
    content: _Content
    folder: Path
    record: AdapterRecord
    current: AdapterRef | None
    end: contextlib.ExitStack
    open: bool = dataclasses.field(default=True, init=False)

    def discard(self) -> None:
        """End the staging and remove content that no name has. Idempotent; may also follow a
        commit."""
        self.open = False
        self.end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()


class Publishing(Part):
    """Turns a complete upload into a revision: `stage`, then `commit`."""

    def publish(self, upload: Upload, *, who: Who = SERVER) -> Published:
        """`stage` and `commit`: make a complete upload the current revision of its name.
        Raises as they do."""
        return self.commit(self.stage(upload), who)

    def validate(self, upload: Upload) -> Published:
        """Check a complete upload as `stage` does, without publishing. Consumes the upload."""
        with upload:
            return self._preview(upload.request, self._read(upload)[0])

    def stage(self, upload: Upload) -> Staged:
        """Check a complete upload and store its content; the name's current revision stays.
        The caller must `commit` the result or ``discard`` it.

        Consumes the upload, whatever the outcome.

        Raises:
            InvalidField, ChecksumMismatch: the upload is incomplete, or damaged in transit.
            AdapterInvalid, BaseModelMismatch: see `format.read_adapter`.
            AdapterExists: the name holds other content, and ``allow_replace`` is not set.
            EtagMismatch: the request has an etag that is not the name's.
            DiskFull: nothing of the upload is left.
        """
        core, request = self._core, upload.request
        with contextlib.ExitStack() as undo:
            undo.enter_context(upload)  # aborts the upload; no effect after a commit
            row, content = self._read(upload)
            ref = AdapterRef(row.name, row.revision, row.weights)
            undo.callback(core.sweep_quietly)  # removes content that got no name
            core.index.hold(ref)  # keeps sweeps from removing content without a name
            undo.callback(core.index.release, ref)
            self._check_replace(request, core.index.entry(row.name), row.revision)
            undo.enter_context(core.store.claim(content.bundle))
            undo.callback(self._unregister, ref)
            entry = self._store(request, row, content, upload.folder)
            current = None if entry is None else entry.current
            return Staged(
                request=request,
                row=row,
                content=content,
                folder=upload.folder,
                record=dataclasses.replace(core.record(row), current=False),
                current=None if current == ref else current,
                end=undo.pop_all(),
            )

    def _store(
        self, request: UploadRequest, row: RevisionRow, content: _Content, folder: Path
    ) -> Entry | None:
        """Store content. Return the name's entry at that time."""
        core, ref = self._core, AdapterRef(row.name, row.revision, row.weights)
        while True:
            damaged = core.index.quarantined(row.weights) is not None
            content.fresh |= core.store.prepare(folder, content.bundle, damaged=damaged)
            with core.changes:
                entry = core.index.entry(row.name)
                self._check_replace(request, entry, row.revision)
                if not damaged and core.index.quarantined(row.weights) is not None:
                    continue  # another registry has found them damaged meanwhile
                kept = self._registered(row, entry)
                content.fresh |= core.store.commit(
                    folder, content.bundle, registration.write(kept)
                )
                content.found = core.index.found(ref)
                # Weights in quarantine may be intact on disk since an unpublished push:
                # committing this one heals them too.
                content.fresh |= damaged
                return entry

    def _unregister(self, ref: AdapterRef) -> None:
        """Unregister uncommitted content, so that a recovery does not bring it back."""
        try:
            with self._core.changes:
                entry = self._core.index.entry(ref.name)
                if entry is None or ref not in entry.revisions:
                    self._core.unregister(ref.name, [ref.revision])
        except VeneerError as error:  # only a recovery is affected
            _log.warning("%s may still be registered in the store: %s", ref.short, error)

    def commit(self, staged: Staged, who: Who = SERVER) -> Published:
        """Make staged content the current revision of its name, in one transaction. If it
        equals the current revision, succeed with ``published=False`` (and repair damaged
        content on disk). Consumes ``staged``, whatever the outcome.

        Args:
            who: for the history.

        Raises:
            AdapterExists, EtagMismatch: the name has changed since staging.
            DiskFull: nothing was published.
        """
        assert staged.open, "this publish has ended already"
        core, row = self._core, staged.row
        with staged, core.changes:
            entry = core.index.entry(row.name)
            self._check_replace(staged.request, entry, row.revision)
            registered = registration.write(self._registered(row, entry))
            # Another publish of the same content may have been staged meanwhile and discarded.
            core.store.keep_registered(row.revision, *registered)
            return self._commit(staged.request, row, staged.content, who)

    def _read(self, upload: Upload) -> tuple[RevisionRow, _Content]:
        """Check a complete upload and return its row and content."""
        request = upload.request
        upload.finish()
        manifest = self._core.read(upload.folder, self._core.base, request.claim)
        sums = {file.name: file.sha256 for file in request.files}
        size = upload.received_bytes
        weights = upload.folder / WEIGHTS_FILE
        if smaller := upload.committed[WEIGHTS_FILE] - weights.stat().st_size:
            # Embeddings were left out: the file is not the one that was announced.
            with weights.open("rb") as file:
                sums[WEIGHTS_FILE] = hashlib.file_digest(file, "sha256").hexdigest()
            size -= smaller
        extra = {name: sha for name, sha in sums.items() if name not in REQUIRED_FILES}
        bundle = Bundle(manifest.weights_digest, extra)
        row = RevisionRow(
            name=request.name,
            revision=bundle.revision,
            weights=bundle.weights,
            base=self._core.base_id,
            manifest=manifest_to_json(manifest),
            created=self._core.clock(),
            labels=dict(request.labels),
            bytes=size,
        )
        return row, _Content(bundle, sums, manifest.base_word)

    def _preview(self, request: UploadRequest, row: RevisionRow) -> Published:
        entry = self._core.index.entry(request.name)
        self._check_replace(request, entry, row.revision)
        record = dataclasses.replace(self._core.record(row), current=False, etag="")
        if entry is not None:
            same = _means(entry, row.revision)
            record = dataclasses.replace(record, current=same, etag=str(entry.generation))
        return Published(record, False, False, record.manifest.warnings)

    def _check_replace(
        self, request: UploadRequest, entry: Entry | None, revision: str
    ) -> None:
        check_etag(request.name, entry, request.etag)
        if entry is None or entry.current is None or request.allow_replace:
            return
        if entry.current.revision != revision:
            raise AdapterExists(
                f"adapter {request.name!r} holds other content ({entry.current.short}); "
                "replace it with `allow_replace`, or choose another name",
                metadata={"adapter": request.name, "current": entry.current.revision},
            )

    def _registered(self, row: RevisionRow, entry: Entry | None) -> RevisionRow:
        """Return the revision's row as it is in the catalog, or as it will be."""
        if entry is not None and _means(entry, row.revision):
            with contextlib.suppress(AdapterCorrupt):
                before = self._core.catalog.revision(row.name, row.revision)
                if before is not None and row.revision not in entry.foreign:
                    return before
        return row

    def _commit(
        self, request: UploadRequest, row: RevisionRow, content: _Content, who: Who
    ) -> Published:
        core = self._core
        entry = core.index.entry(row.name)
        same = entry is not None and _means(entry, row.revision) and self._is_sound(row)
        if entry is not None and same and row.revision not in entry.foreign:
            repaired = False
            if content.fresh or content.found:
                with core.change(who) as change:
                    repaired = self._note_content(change, content, row.name)
                self._heal(repaired)
            return self._unchanged(request, row, repaired=repaired)
        ref = AdapterRef(row.name, row.revision, row.weights)
        before = None if entry is None else entry.current
        replaced = before is not None and before != ref
        details = [f"before: {before.revision}"] if replaced and before else []
        if content.word == "publisher":
            details.append("the publisher says that it is for this base")
        with core.change(who) as change:
            repaired = self._note_content(change, content, row.name)
            change.publish(row)
            change.note(
                "replaced" if replaced else "published",
                row.name,
                row.revision,
                "; ".join(details),
            )
        self._heal(repaired)
        old = Entry(None, (), 0) if entry is None else entry
        moved = Entry(
            current=ref,
            revisions=(ref, *old.without((ref.revision,))),
            generation=change.number,
            foreign=old.foreign - {ref.revision},
            retain=old.retain,
            aliases=old.aliases,
            shared=old.shared,
        )
        dropped = moved.beyond(core.retain)
        gone = tuple(other.revision for other in dropped)
        kept = dataclasses.replace(
            moved, revisions=moved.without(gone), foreign=moved.foreign - set(gone)
        )
        core.index.put(row.name, kept)
        if core.index.damaged(row.name):
            core.index.set_damaged(row.name, core.catalog.damaged_rows(row.name))
        if dropped:
            try:
                core.drop_superseded(row.name, kept, dropped)
            except VeneerError as error:  # the publish itself stands
                _log.warning("superseded revisions of %s remain listed: %s", row.name, error)
        record = core.record(dataclasses.replace(row, generation=change.number))
        return Published(record, True, replaced, record.manifest.warnings, dropped)

    def _is_sound(self, row: RevisionRow) -> bool:
        """Whether the rows of the name and its current revision are undamaged. If not, the
        push rewrites them."""
        if self._core.index.damaged(row.name):
            return False
        try:
            return self._core.catalog.revision(row.name, row.revision) is not None
        except AdapterCorrupt:
            return False

    def _note_content(self, change: Change, content: _Content, name: str) -> bool:
        """Record where the files are, by checksum. True if it repaired quarantined weights."""
        bundle = content.bundle
        change.add_files(bundle.revision, bundle.files)
        if not content.fresh and not content.found:
            return False
        change.add_files(bundle.weights, {f: content.sums[f] for f in REQUIRED_FILES})
        if not change.release(bundle.weights) and not content.found:
            return False
        for ref in self._core.index.holding(bundle.weights):
            change.note("repaired", ref.name, ref.revision, f"by a push to {name}")
        return True

    def _heal(self, repaired: bool) -> None:
        if repaired:
            self._core.index.set_quarantined(self._core.catalog.quarantined())

    def _unchanged(
        self, request: UploadRequest, new: RevisionRow, *, repaired: bool
    ) -> Published:
        row = self._core.catalog.revision(new.name, new.revision)
        record = self._core.record(new if row is None else row)
        warnings = record.manifest.warnings
        if repaired:
            warnings += ("its stored weights had been damaged: this push repaired them",)
        if request.labels and dict(request.labels) != dict(record.labels):
            warnings += ("the name holds this content already; its labels were not changed",)
        return Published(record, False, False, warnings)


def _means(entry: Entry, revision: str) -> bool:
    return entry.current is not None and entry.current.revision == revision
