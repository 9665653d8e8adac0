"""One tenant's names on a follower: has the look-ups of `Registry`, and refuses its changes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, cast

from veneer_registry.adapter import AdapterRef, BaseSpec
from veneer_registry.core import Core
from veneer_registry.entry import Entry
from veneer_registry.errors import AdapterNotFound, Unavailable
from veneer_registry.index import Index
from veneer_registry.lease import RevisionLease
from veneer_registry.lookups import Lookups
from veneer_registry.publishing import Staged
from veneer_registry.records import AdapterRecord, AliasChange, Published, UploadRequest
from veneer_registry.recovery import base_identity
from veneer_registry.rows import (
    SERVER,
    AliasRow,
    HistoryRow,
    ResidentRow,
    RevisionRow,
    Who,
)
from veneer_registry.upload import Upload

from veneer_server.follower.rows import MirroredRows
from veneer_server.follower.standing import Standing
from veneer_server.replication.states import NameState

T = TypeVar("T")


class MirrorContent(Protocol):
    """Finds and fetches a mirror's weights: see `cache` and `fetching`."""

    def weights_folder(self, digest: str) -> Path: ...

    def present(self, tenant: str, ref: AdapterRef) -> Awaitable[bool]: ...

    def damaged(self, digest: str, why: str) -> None: ...


class _Rows(Core):
    """`Core` for rows of a registry that may run another version."""

    def record(self, row: RevisionRow) -> AdapterRecord:
        """As `Core.record`. Raises Unavailable if this version cannot read the row."""
        try:
            return super().record(row)
        except (ValueError, TypeError, KeyError) as error:
            raise Unavailable(
                f"this server cannot read adapter {row.name}@{row.revision[:12]}, which its "
                "registry has: they run different versions; use another server",
                metadata={"adapter": row.name, "cause": "version"},
                detail=repr(error),
            ) from error


class Mirror(Lookups):
    """The names of one tenant as received from the registry. Thread-safe like `Registry`.

    An unknown name is NOT_FOUND only while the view is current, and otherwise UNAVAILABLE.
    """

    def __init__(
        self,
        tenant: str,
        base: BaseSpec,
        standing: Standing,
        content: MirrorContent,
        retain: int,
    ) -> None:
        """Args: retain: for the records of names that set no value of their own."""
        self._rows = MirroredRows()
        index = Index(base.name)
        nothing = cast(Any, None)  # for parts that only changes use
        super().__init__(
            _Rows(
                lock=nothing,
                store=cast(Any, content),
                catalog=cast(Any, self._rows),
                index=index,
                base=base,
                base_id=base_identity(base),
                retain=retain,
                clock=lambda: 0.0,
                read=nothing,
            )
        )
        self.tenant = tenant
        self._standing = standing
        self._content = content

    def apply(self, state: NameState) -> tuple[AdapterRecord, ...]:
        """Apply a name's state. Returns the revisions that the name no longer has."""
        index = self._core.index
        before = index.entry(state.name)
        records = {}
        for row in self._rows.revisions(state.name):
            with suppress(Unavailable):  # unreadable here, so it was never in use here
                records[row.revision] = self._core.record(row)
        if state.entry is None:
            if before is not None:
                index.remove(state.name)
            self._rows.put(state)
            return tuple(records.values())
        # Rows first: a request that finds a revision in the index reads its row.
        self._rows.put(_with_old_rows(state, before, self._rows))
        index.put(state.name, state.entry)
        index.take_garbage()  # the cache removes content instead
        self._rows.put(state)
        for ref in state.entry.revisions:
            records.pop(ref.revision, None)
        return tuple(records.values())

    def current(self, name: str) -> AdapterRef | None:
        """A name's current revision; None if there is none."""
        entry = self._core.index.entry(name)
        return None if entry is None else entry.current

    def close(self) -> None:
        """Nothing to close."""

    # -------------------------------------------------------------------- look-ups

    def check_age(self, most_s: float) -> None:
        self._standing.check(most_s)

    def resolve(self, name: str, key: str = "") -> AdapterRef:
        return self._known(lambda: super(Mirror, self).resolve(name, key))

    def acquire(self, name: str, key: str = "") -> RevisionLease:
        return self._known(lambda: super(Mirror, self).acquire(name, key))

    def get(self, name: str) -> AdapterRecord:
        return self._known(lambda: super(Mirror, self).get(name))

    def revisions(self, name: str) -> tuple[AdapterRecord, ...]:
        return self._known(lambda: super(Mirror, self).revisions(name))

    def aliases(self, name: str = "") -> tuple[AliasRow, ...]:
        return self._known(lambda: super(Mirror, self).aliases(name))

    def _check_moved(self, ref: AdapterRef, before: AdapterRef | None) -> None:
        if ref == before:  # it is being deleted, or its row in the registry is damaged
            raise self._standing.unreachable(f"adapter {ref.short}", "its record is missing")

    def _known(self, look: Callable[[], T]) -> T:
        try:
            return look()
        except AdapterNotFound as error:
            raise self._standing.absent(error) from None

    async def present(self, ref: AdapterRef) -> bool:
        """Ensure that a leased revision's weights are on this machine's disk. Returns whether
        they had to be fetched. Raises the errors of `Fetching.present`."""
        return await self._content.present(self.tenant, ref)

    def fetch(self, ref: AdapterRef) -> None:
        """Do nothing: a follower keeps no list of adapters in memory to load at its start."""

    def watch(self, watcher: Callable[[Sequence[HistoryRow]], None]) -> None:
        """Do nothing: all changes come from the registry, and the follower reports them."""

    def bundle_files(self, ref: AdapterRef) -> NoReturn:
        """Refuse: downloads are forwarded to the registry."""
        self._refuse("a download")

    # ------------------------------------------------------------- local upkeep

    @property
    def needs_sweep(self) -> bool:
        """Always False: the cache evicts by itself."""
        return False

    def sweep(self) -> int:
        return 0

    def sweep_uploads(self, idle_s: float) -> int:
        return 0

    def trim_uploads(self, *, most: int, most_bytes: int) -> int:
        return 0

    def prune_quarantine(self, most_bytes: int, idle_s: float) -> Sequence[tuple[str, int]]:
        return ()

    def complete_store(self, limit: int = 100) -> bool:
        return False

    def set_residents(self, residents: Sequence[ResidentRow]) -> None:
        """Do nothing: adapters are loaded again on request."""

    def note(self, event: str, ref: AdapterRef, who: Who, detail: str = "") -> None:
        """Do nothing: this server's pins are not in the registry's history."""

    def quarantine(self, weights_digest: str, why: str) -> tuple[AdapterRef, ...]:
        """Drop the damaged copy; the next request fetches another one."""
        self._content.damaged(weights_digest, why)
        return ()

    # ------------------------------------------------------- left to the registry

    def committed(self, request: UploadRequest) -> Mapping[str, int]:
        self._refuse("an upload")

    def stores(self, request: UploadRequest) -> bool:
        return False

    def begin_upload(self, request: UploadRequest, *, resume: bool = False) -> Upload:
        self._refuse("an upload")

    def validate(self, upload: Upload) -> Published:
        self._refuse("an upload")

    def stage(self, upload: Upload) -> Staged:
        self._refuse("an upload")

    def commit(self, staged: Staged, who: Who = SERVER) -> Published:
        self._refuse("an upload")

    def delete(
        self,
        spec: str,
        etag: str | None = None,
        who: Who = SERVER,
        *,
        unless_leased: bool = False,
    ) -> tuple[str, ...]:
        self._refuse("deleting an adapter")

    def update(self, spec: str, **changes: Any) -> tuple[AdapterRecord, tuple[AdapterRef, ...]]:
        self._refuse("changing an adapter")

    def set_alias(self, spec: str, targets: Any, **options: Any) -> AliasChange:
        self._refuse("moving an alias")

    def rollback_alias(self, spec: str, **options: Any) -> AliasChange:
        self._refuse("moving an alias")

    def remove_alias(self, spec: str, **options: Any) -> AliasChange:
        self._refuse("removing an alias")

    def _refuse(self, what: str) -> NoReturn:
        raise self._standing.refused(what)


def _with_old_rows(state: NameState, before: Entry | None, rows: MirroredRows) -> NameState:
    """The state, plus the rows of old revisions that a request may just have looked up."""
    if before is None or state.entry is None:
        return state
    new = {row.revision for row in state.rows}
    old = tuple(row for row in rows.revisions(state.name) if row.revision not in new)
    return NameState(state.tenant, state.name, state.entry, (*state.rows, *old))
