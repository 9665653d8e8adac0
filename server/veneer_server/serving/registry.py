"""The interface of a tenant's registry, as the server uses it.

It has two implementations: `veneer_registry.registry.Registry`, which owns a data folder, and
`veneer_server.follower.mirror.Mirror`, which mirrors the registry of another server: it makes
no changes, and fetches weights on demand. Their docstrings describe the methods. `resolve`,
`acquire`, `release` and other methods that read no disk may be called from an event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from veneer_registry.adapter import AdapterRef
from veneer_registry.lease import RevisionLease
from veneer_registry.publishing import Staged
from veneer_registry.records import AdapterRecord, AliasChange, Published, UploadRequest
from veneer_registry.rows import AliasRow, HistoryRow, ResidentRow, Who
from veneer_registry.upload import Upload


class AdapterRegistry(Protocol):
    """One tenant's names, revisions and content."""

    def close(self) -> None: ...

    # -------------------------------------------------------------------- look-ups

    def __len__(self) -> int: ...

    def __contains__(self, name: object) -> bool: ...

    def check_age(self, most_s: float) -> None: ...

    def resolve(self, name: str, key: str = "") -> AdapterRef: ...

    def acquire(self, name: str, key: str = "") -> RevisionLease: ...

    def acquire_weights(self, weights_digest: str) -> RevisionLease: ...

    async def present(self, ref: AdapterRef) -> bool:
        """Bring a leased revision's weights to this machine's disk. Returns whether they had
        to be fetched."""
        ...

    def fetch(self, ref: AdapterRef) -> None:
        """Bring a revision's weights to this machine's disk, from a worker thread; used for
        adapters that were in memory at the end of the last run."""
        ...

    def get(self, name: str) -> AdapterRecord: ...

    def revisions(self, name: str) -> tuple[AdapterRecord, ...]: ...

    def list(
        self,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        after: str = "",
        limit: int = 100,
    ) -> tuple[AdapterRecord, ...]: ...

    def holding(self, weights_digest: str) -> tuple[AdapterRecord, ...]: ...

    def knows(self, name: str) -> bool: ...

    def is_shared(self, name: str) -> bool: ...

    def shared(self) -> tuple[str, ...]: ...

    def names(self, weights_digest: str) -> tuple[str, ...]: ...

    def asked_as(self, weights_digest: str) -> tuple[str, ...]: ...

    def stored_bytes(self) -> int: ...

    def leases(self, weights_digest: str) -> int: ...

    def weights_folder(self, ref: AdapterRef) -> Path: ...

    def bundle_files(self, ref: AdapterRef) -> AbstractContextManager[Mapping[str, Path]]: ...

    def aliases(self, name: str = "") -> tuple[AliasRow, ...]: ...

    def history(
        self, name: str = "", *, before: int | None = None, limit: int = 100
    ) -> tuple[HistoryRow, ...]: ...

    def watch(self, watcher: Callable[[Sequence[HistoryRow]], None]) -> None:
        """Call ``watcher`` with the changes that other servers make in the same catalog."""
        ...

    # --------------------------------------------------------------------- changes

    def committed(self, request: UploadRequest) -> Mapping[str, int]: ...

    def stores(self, request: UploadRequest) -> bool: ...

    def begin_upload(self, request: UploadRequest, *, resume: bool = False) -> Upload: ...

    def validate(self, upload: Upload) -> Published: ...

    def stage(self, upload: Upload) -> Staged: ...

    def commit(self, staged: Staged, who: Who = ...) -> Published: ...

    def delete(
        self,
        spec: str,
        etag: str | None = None,
        who: Who = ...,
        *,
        unless_leased: bool = False,
    ) -> tuple[str, ...]: ...

    def update(
        self,
        spec: str,
        *,
        labels: Mapping[str, str] | None = None,
        remove_labels: Sequence[str] = (),
        retain: int | None = None,
        current: bool = False,
        shared: bool | None = None,
        etag: str = "",
        who: Who = ...,
    ) -> tuple[AdapterRecord, tuple[AdapterRef, ...]]: ...

    def set_alias(
        self, spec: str, targets: Sequence[tuple[str, int]], *, etag: str = "", who: Who = ...
    ) -> AliasChange: ...

    def rollback_alias(self, spec: str, *, etag: str = "", who: Who = ...) -> AliasChange: ...

    def remove_alias(self, spec: str, *, etag: str = "", who: Who = ...) -> AliasChange: ...

    def note(self, event: str, ref: AdapterRef, who: Who, detail: str = "") -> None: ...

    # ---------------------------------------------------------------------- upkeep

    def quarantine(self, weights_digest: str, why: str) -> tuple[AdapterRef, ...]: ...

    def residents(self) -> tuple[ResidentRow, ...]: ...

    def set_residents(self, residents: Sequence[ResidentRow]) -> None: ...

    def sweep_uploads(self, idle_s: float) -> int: ...

    def trim_uploads(self, *, most: int, most_bytes: int) -> int: ...

    def prune_quarantine(self, most_bytes: int, idle_s: float) -> Sequence[tuple[str, int]]: ...

    def complete_store(self, limit: int = 100) -> bool: ...

    @property
    def needs_sweep(self) -> bool: ...

    def sweep(self) -> int: ...
