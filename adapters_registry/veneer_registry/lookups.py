"""The registry's read-only operations: names, revisions, records, leases, history."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from veneer_registry.adapter import AdapterRef
from veneer_registry.causes import cause_of
from veneer_registry.core import Part
from veneer_registry.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    BaseModelMismatch,
    InvalidField,
    Unavailable,
)
from veneer_registry.lease import RevisionLease
from veneer_registry.records import AdapterRecord
from veneer_registry.rows import AliasRow, HistoryRow, ResidentRow

_MAX_PAGE: Final = 1000


class Lookups(Part):
    """The part of `Registry` that changes nothing, apart from granting leases."""

    _stored: tuple[int, int] | None = None
    """Cache of `stored_bytes`: (number of the catalog's last change, bytes stored after it)."""

    def __len__(self) -> int:
        """Number of registered names."""
        return len(self._core.index)

    def check_age(self, most_s: float) -> None:
        """See `Freshness.check`."""
        self._core.freshness.check(most_s)

    def resolve(self, name: str, key: str = "") -> AdapterRef:
        """The revision that ``name``, ``name@revision`` or ``name/alias`` means now. Takes
        microseconds.

        Args:
            name: ``revision`` is the first 4 to 64 hex digits.
            key: chooses among an alias's targets; the same key gets the same target.

        Raises:
            InvalidField: malformed or ambiguous.
            AdapterNotFound: with metadata ``did_you_mean`` if there is a similar name.
            Unavailable: it is not there, but the names are not current.
            BaseModelMismatch: it was registered for another base.
            AdapterCorrupt: its stored content or its catalog row is damaged or gone.
        """
        with self._doubting():
            return self._core.index.resolve(name, key)

    def acquire(self, name: str, key: str = "") -> RevisionLease:
        """Resolve and lease in one step: the content stays until the lease ends, even if it is
        deleted or superseded meanwhile. Takes less than a millisecond: it does not wait for
        listings or for changes of the catalog."""
        index = self._core.index
        before: AdapterRef | None = None
        while True:
            with self._doubting():
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
        """Like `acquire`, for any kept revision with these weights. Raises AdapterNotFound."""
        for ref in self._core.index.holding(weights_digest):
            # It was just deleted, is registered for another base, or its row is damaged.
            with contextlib.suppress(AdapterNotFound, BaseModelMismatch, AdapterCorrupt):
                return self.acquire(f"{ref.name}@{ref.revision}")
        raise AdapterNotFound(
            f"no adapter has the weights {weights_digest[:12]} anymore; push them again"
        )

    def _check_moved(self, ref: AdapterRef, before: AdapterRef | None) -> None:
        """Handle the missing row of ``ref``. If the revision was superseded meanwhile, return,
        so that the caller looks the name up again. If the name still resolves to the same
        revision, raise: a delete has reached the catalog but not yet the index."""
        if ref == before:
            raise self._core.freshness.missing(ref)

    @contextmanager
    def _doubting(self) -> Iterator[None]:
        """Turn AdapterNotFound into Unavailable while the names are not current."""
        try:
            yield
        except AdapterNotFound as error:
            doubt = self._core.freshness.absent(error)
            if doubt is error:
                raise
            raise doubt from None

    def get(self, name: str) -> AdapterRecord:
        """The record of ``name``, ``name@revision`` or ``name/alias``, whatever base it is
        for. Raises InvalidField for an alias with several targets."""
        before: AdapterRef | None = None
        while True:
            with self._doubting():
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
            with self._doubting():
                self._core.index.find(name)
        return tuple(map(self._core.record, rows))

    def list(
        self,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        after: str = "",
        limit: int = 100,
    ) -> tuple[AdapterRecord, ...]:
        """Current revisions in name order; ``after`` is the last name of the previous page.

        Raises InvalidField for a limit outside 1 to 1001: a page, and one more row to tell
        whether it is the last page.
        """
        _check_limit(limit, _MAX_PAGE + 1)
        rows = self._core.catalog.page(prefix, labels or {}, after, limit)
        return tuple(map(self._core.record, rows))

    def holding(self, weights_digest: str) -> tuple[AdapterRecord, ...]:
        """All kept revisions, of any name, that have these weights."""
        refs = self._core.index.holding(weights_digest)
        found = []
        for ref in refs:
            # A follower cannot read what a registry of a later version wrote.
            with contextlib.suppress(AdapterCorrupt, Unavailable):
                if (row := self._core.catalog.revision(ref.name, ref.revision)) is not None:
                    found.append(self._core.record(row))
        return tuple(found)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._core.index.entry(name) is not None

    def knows(self, name: str) -> bool:
        """Whether a plain name is registered, or may be in a damaged row. Reads no disk."""
        return self._core.index.entry(name) is not None or self._core.index.damaged(name)

    def is_shared(self, name: str) -> bool:
        """Whether other tenants of the server may use a plain name. Reads no disk."""
        return self._core.index.is_shared(name)

    def shared(self) -> tuple[str, ...]:
        """The names that other tenants may use, in order. Reads no disk."""
        return self._core.index.shared()

    def names(self, weights_digest: str) -> tuple[str, ...]:
        """All names that have a kept revision with these weights, sorted. Reads no disk."""
        return tuple(
            dict.fromkeys(ref.name for ref in self._core.index.holding(weights_digest))
        )

    def asked_as(self, weights_digest: str) -> tuple[str, ...]:
        """Return the specs that resolve to these weights now: names whose current revision has
        them, and ``name/alias`` with a target that has them; sorted. Reads no disk."""
        found = set()
        for ref in self._core.index.holding(weights_digest):
            entry = self._core.index.entry(ref.name)
            if entry is None:
                continue  # deleted since
            if entry.current == ref:
                found.add(ref.name)
            found.update(f"{ref.name}/{alias}" for alias in entry.aliases_of(ref.revision))
        return tuple(sorted(found))

    def stored_bytes(self) -> int:
        """Bytes of all kept revisions; weights shared by several count once. Reads all rows,
        unless nothing has changed since the last call."""
        number = self._core.catalog.number
        if self._stored is None or self._stored[0] != number:
            self._stored = (number, self._core.catalog.stored_bytes)
        return self._stored[1]

    def leases(self, weights_digest: str) -> int:
        """Number of requests that hold these weights now."""
        return self._core.index.leases(weights_digest)

    def weights_folder(self, ref: AdapterRef) -> Path:
        """Folder with the two weight files of a leased or registered revision."""
        return self._core.store.weights_folder(ref.weights_digest)

    @contextmanager
    def bundle_files(self, ref: AdapterRef) -> Iterator[Mapping[str, Path]]:
        """Yield file name -> path for a leased revision, with the files as they were pushed.
        The paths are valid inside the block. If the same weights were pushed several times,
        the weights files are those of the first push.

        Raises:
            AdapterCorrupt: they are damaged or gone.
            Unavailable: the object store cannot be reached.
        """
        store = self._core.store
        try:
            bundle = store.bundle(ref.revision)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterCorrupt(
                f"the bundle of {ref.short} cannot be read; push the adapter again",
                metadata={"revision": ref.revision, "cause": "files"},
                detail=cause_of(error),
            ) from error
        with store.files_of(bundle) as found:
            yield found

    def is_local(self, ref: AdapterRef) -> bool:
        """Whether `weights_folder` can be read now; if not, `fetch` first. Reads no disk."""
        return self._core.store.is_local(ref.weights_digest)

    def fetch(self, ref: AdapterRef) -> None:
        """Make `is_local` true for a leased revision. May take as long as downloading its
        weights.

        Raises:
            AdapterCorrupt: its content is damaged or gone.
            Unavailable: the object store cannot be reached.
        """
        self._core.store.fetch(ref.weights_digest)

    def aliases(self, name: str = "") -> tuple[AliasRow, ...]:
        """Aliases of a plain name (all names if empty), sorted. Raises AdapterNotFound."""
        if name:
            with self._doubting():
                return self._core.index.find_entry(name).aliases
        return self._core.catalog.aliases()

    def history(
        self, name: str = "", *, before: int | None = None, limit: int = 100
    ) -> tuple[HistoryRow, ...]:
        """Who changed what and when, newest first; kept when a name is deleted.

        Args:
            name: a plain name; empty for all.
            before: return only lines older than this `HistoryRow.sequence`.
            limit: 1 to 1000 lines.
        """
        _check_limit(limit)
        return self._core.catalog.history(name, before, limit)

    def residents(self) -> tuple[ResidentRow, ...]:
        """The adapters of the last `set_residents`, most recently used first."""
        return self._core.catalog.residents()


def _check_limit(limit: int, most: int = _MAX_PAGE) -> None:
    if not 1 <= limit <= most:
        raise InvalidField(
            f"page size {limit} is not allowed: use 1 to {most}",
            metadata={"field": "page_size"},
        )
