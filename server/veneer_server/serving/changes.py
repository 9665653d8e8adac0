"""Changes to adapters: publish, activate, evict, delete, move an alias, update.

A change that has begun is completed even if its caller leaves: `_whole` runs it with
`outlast`. The exception is a publish: if its caller leaves before the name moves, it is
abandoned, see `publish`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from veneer_registry.adapter import AdapterRef
from veneer_registry.errors import AdapterBudgetExceeded, AdapterNotFound, VeneerError
from veneer_registry.publishing import Staged
from veneer_registry.records import AdapterRecord, AliasChange, Published
from veneer_registry.registry import Registry
from veneer_registry.rows import Who
from veneer_registry.upload import Upload

from veneer_server.engine_client.client import EngineClient
from veneer_server.engine_client.tenant_engine import TenantEngine
from veneer_server.logs import get_logger
from veneer_server.serving.events import AdapterEvents, AdapterUse, source_of
from veneer_server.serving.spare_time import outlast, to_the_end
from veneer_server.serving.uploads import Uploads
from veneer_server.sizing.memory_plan import MemoryPlan, MemoryTooSmall
from veneer_server.telemetry.metrics import Metrics
from veneer_server.wire.messages import BudgetsState, EvictMode, MemoryTier

# -------------------- replacing
# Loads a new revision into memory before its name moves to it.
#
# Otherwise, after an adapter in memory is replaced, its next request would wait for the disk.
# So the new revision is loaded into the old one's tier, and pinned if the old one is; then the
# name moves; then the old revision is unpinned.

_log = get_logger(__name__)


class Replacing:
    """Warms up published revisions. Belongs to one event loop."""

    def __init__(
        self,
        registry: Registry,
        engine: TenantEngine,
        *,
        keep_residents: Callable[[], Awaitable[None]],
    ) -> None:
        """Args: keep_residents: stores pins for the next start of the server."""
        self._registry = registry
        self._engine = engine
        self._keep_residents = keep_residents
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def warm(self, staged: Staged, *, activate: bool) -> AsyncIterator[Warm]:
        """Load staged content into the tier of the revision that it replaces. This is undone
        when the block ends, unless `Warm.stays` is set: a publish that fails or is cancelled
        before the name has moved leaves no copy and no pin behind.

        Publishes of the same weights take turns, so that none undoes another's work.

        Args:
            activate: load into DEVICE; if that fails, so does the publish.
        """
        digest = staged.record.ref.weights_digest
        turn = self._turns.setdefault(digest, asyncio.Lock())
        async with turn:
            warm = Warm(self._registry, self._engine, staged, self._keep_residents)
            try:
                await warm.up(activate=activate)
                yield warm
            finally:
                if not warm.stays:
                    await outlast(warm.undo())


class Warm:
    """The warm-up of one publish.

    Attributes:
        stays: the name has moved to the new revision, so nothing is undone.
    """

    def __init__(
        self,
        registry: Registry,
        engine: TenantEngine,
        staged: Staged,
        keep_residents: Callable[[], Awaitable[None]],
    ) -> None:
        self.stays = False
        self._registry = registry
        self._engine = engine
        self._new = staged.record.ref
        self._old = staged.current
        self._source = source_of(registry, staged.record)
        self._keep_residents = keep_residents
        self._own_pin = self._pin_of(self._new)
        """The pin of the new weights, if another name had already pinned them."""
        self._passing: MemoryTier | None = None
        """The old revision's pin, if it is to be transferred."""
        self._pinned = False
        self._asked = False
        """Whether the engine may have been asked to load or pin the new weights."""

    async def up(self, *, activate: bool) -> None:
        """Load and pin the new revision, see `Replacing.warm`."""
        wanted: MemoryTier | None = "device" if activate else None
        old = self._old
        if old is not None and old.weights_digest != self._new.weights_digest:
            residency = self._engine.tier(old.weights_digest)
            if wanted is None and residency is not None:
                wanted = "device" if residency.tier == "device" else "host"
            if not self._means(old):
                self._passing = self._pin_of(old)
        if self._passing is not None:
            await self._pin_both(self._passing)
        if wanted is None or (self._pinned and wanted == self._passing):
            return
        self._asked = True
        try:
            await self._engine.activate(self._source, tier=wanted, pin=False)
        except VeneerError as error:
            if activate:
                raise
            # The caller did not ask for the load; the next request loads the adapter.
            _log.warning(
                "new revision not loaded before the replace",
                adapter=self._new.short,
                reason=error.reason,
            )

    async def _pin_both(self, tier: MemoryTier) -> None:
        """Pin the new revision as well: even if the server is killed during the publish, the
        revision that the name then points to is pinned."""
        self._asked = True
        try:
            await self._engine.activate(self._source, tier=tier, pin=True)
        except VeneerError:
            return  # no room for both: `passed` pins the new one after unpinning the old
        self._pinned = True
        await self._keep_residents()

    async def passed(self) -> tuple[str, ...]:
        """Unpin the old revision after the name has moved. Failures are returned as warnings,
        since the publish stands regardless."""
        self.stays = True
        if self._passing is None or self._old is None:
            return ()
        try:
            await self._engine.unpin(self._old.weights_digest)
            if not self._pinned:
                await self._engine.activate(self._source, tier=self._passing, pin=True)
        except VeneerError as error:
            return (
                f"{self._old.short} was pinned, and its pin could not be transferred "
                f"completely: {error.message}",
            )
        return ()

    async def undo(self) -> None:
        """Undo the requests to the engine, since the name did not move."""
        if not self._asked:
            return
        digest = self._new.weights_digest
        try:
            if not self._registry.names(digest):
                await self._engine.evict(digest, mode="forget", unpin=True)
            elif self._passing is None:
                return  # another name uses this copy
            elif self._own_pin is None:
                await self._engine.unpin(digest)
            else:
                await self._engine.activate(self._source, tier=self._own_pin, pin=True)
            await self._keep_residents()
        except VeneerError as error:
            _log.warning(
                "warm-up for a failed publish not undone",
                adapter=self._new.short,
                reason=error.reason,
            )

    def _pin_of(self, ref: AdapterRef) -> MemoryTier | None:
        """A revision's pin, even while it is still being restored after a restart."""
        for resident in self._engine.resident_set():
            if resident.source.weights_digest == ref.weights_digest:
                return resident.pin
        return None

    def _means(self, old: AdapterRef) -> bool:
        """Whether another name still points to these weights, and so shares their pin."""
        for name in self._registry.names(old.weights_digest):
            with contextlib.suppress(VeneerError):
                ref = self._registry.resolve(name)
                if name != old.name and ref.weights_digest == old.weights_digest:
                    return True
        return False


P = ParamSpec("P")
T = TypeVar("T")


def _whole(
    change: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make a change run to completion once it has begun."""

    @functools.wraps(change)
    async def begun(*args: P.args, **kwargs: P.kwargs) -> T:
        return await outlast(change(*args, **kwargs))

    return begun


@dataclass(frozen=True, slots=True)
class AdapterUpdate:
    """The changes to make to a revision and its name; None leaves a value unchanged.

    Attributes:
        labels, remove_labels: labels to set, and labels to remove.
        retain: number of superseded revisions that the name keeps.
        current: make this the name's current revision.
        shared: whether other tenants may use the name.
        pinned: pin the revision on DEVICE, or unpin it.
        etag: if not empty, the etag that the name must have.
    """

    labels: Mapping[str, str]
    remove_labels: Sequence[str]
    retain: int | None
    current: bool
    pinned: bool | None
    etag: str
    shared: bool | None = None

    @property
    def registered(self) -> bool:
        """Whether it changes the registry."""
        return bool(
            self.labels
            or self.remove_labels
            or self.retain is not None
            or self.current
            or self.shared is not None
        )


class AdapterChanges:
    """Makes changes in the registry and in memory. Belongs to one event loop."""

    def __init__(
        self,
        registry: Registry,
        engine: TenantEngine,
        use: AdapterUse,
        uploads: Uploads,
        events: AdapterEvents,
        *,
        keep_residents: Callable[[], Awaitable[None]],
    ) -> None:
        """Args: keep_residents: records which adapters are in memory, for the next start."""
        self._registry = registry
        self._engine = engine
        self._use = use
        self._uploads = uploads
        self._events = events
        self._keep_residents = keep_residents
        self._replacing = Replacing(registry, engine, keep_residents=keep_residents)

    async def publish(self, upload: Upload, *, activate: bool, who: Who) -> Published:
        """Stage, warm up and commit an upload. If the caller leaves before the name has moved,
        only the uploaded data remains; after that, the publish is completed."""
        async with (
            self._uploads.stage(upload) as staged,
            self._replacing.warm(staged, activate=activate) as warm,
        ):
            return await self._commit(staged, warm, who)

    @_whole
    async def _commit(self, staged: Staged, warm: Warm, who: Who) -> Published:
        """Move the name, then tell watchers and clean up."""
        published = await to_the_end(lambda: self._registry.commit(staged, who))
        warm.stays = True
        self._events.published(published)
        _log.info(
            "upload",
            adapter=published.record.ref.short,
            published=published.published,
            replaced=published.replaced,
        )
        warnings = published.warnings + await warm.passed()
        await self._removed(published.dropped)
        await self._keep_after()  # a transferred pin outlives the server
        return dataclasses.replace(published, warnings=warnings)

    @_whole
    async def activate(
        self, name: str, tier: MemoryTier, *, pin: bool, who: Who
    ) -> AdapterRecord:
        """Load a revision into memory, and pin it if requested."""
        record = await self._get(name)
        await self._activate(record, tier, pin=pin, who=who)
        return record

    async def _activate(
        self, record: AdapterRecord, tier: MemoryTier, *, pin: bool, who: Who
    ) -> None:
        # The lease keeps the files in place while the engine reads them.
        ref = record.ref
        with self._registry.acquire(f"{ref.name}@{ref.revision}"):
            await self._registry.present(ref)
            pinned = await self._engine.activate(
                source_of(self._registry, record), tier=tier, pin=pin
            )
        if pinned:
            await self._pin_changed("pinned", ref, who)

    @_whole
    async def evict(
        self, name: str, mode: EvictMode, *, unpin: bool, who: Who
    ) -> tuple[bool, int]:
        """Free a revision's memory. Returns whether it was freed now, and how many bytes."""
        ref = (await self._get(name)).ref
        residency = self._engine.tier(ref.weights_digest)
        evicted, freed = await self._engine.evict(ref.weights_digest, mode=mode, unpin=unpin)
        if unpin and residency is not None and residency.pinned:
            await self._pin_changed("unpinned", ref, who)
        _log.info("evict", adapter=ref.short, mode=mode, evicted=evicted, freed_bytes=freed)
        return evicted, freed

    @_whole
    async def delete(self, name: str, mode: EvictMode, *, etag: str, who: Who) -> Sequence[str]:
        """Remove a revision or a name. Returns the removed revisions."""
        record = await self._get(name)
        records: tuple[AdapterRecord, ...] = (record,)
        if "@" not in name:
            records = await to_the_end(lambda: self._registry.revisions(record.ref.name))
        deleted = await to_the_end(
            lambda: self._registry.delete(
                name, etag or None, who, unless_leased=mode == "fail_if_busy"
            )
        )
        _log.info("delete", adapter=name, revisions=len(deleted), mode=mode)
        gone = [record for record in records if record.ref.revision in deleted]
        self._events.deleted(gone)
        await self._removed(
            [record.ref for record in gone], mode="abort" if mode == "abort" else "forget"
        )
        await self._keep_after()  # or else the pin would return with the same content
        return deleted

    @_whole
    async def alias(self, alias: str, change: Callable[[], AliasChange]) -> AliasChange:
        """Move, roll back or remove an alias; ``change`` makes the change in the registry."""
        changed = await to_the_end(change)
        _log.info(
            "alias",
            alias=alias,
            targets=[revision[:12] for revision, _ in changed.alias.targets],
            before=[revision[:12] for revision, _ in changed.before],
        )
        await self._tell_alias(changed)
        return changed

    async def _tell_alias(self, changed: AliasChange) -> None:
        row = changed.alias
        if row.targets == changed.before:
            return
        for revision, _ in row.targets or changed.before:
            with contextlib.suppress(AdapterNotFound):  # deleted meanwhile
                record = await self._get(f"{row.name}@{revision}")
                self._events.alias_changed((record,), f"{row.name}/{row.alias}")

    @_whole
    async def update(self, name: str, update: AdapterUpdate, who: Who) -> AdapterRecord:
        """Apply an update: first to the registry, then to the pin."""
        record = await self._get(name)
        if update.registered:
            record = await self._update(update, record, who)
        if update.pinned:
            await self._activate(record, "device", pin=True, who=who)
        elif update.pinned is not None:
            await self._engine.unpin(record.ref.weights_digest)
            await self._pin_changed("unpinned", record.ref, who)
        return record

    async def _update(
        self, update: AdapterUpdate, before: AdapterRecord, who: Who
    ) -> AdapterRecord:
        record, dropped = await to_the_end(
            lambda: self._registry.update(
                f"{before.ref.name}@{before.ref.revision}",
                labels=update.labels,
                remove_labels=update.remove_labels,
                retain=update.retain,
                current=update.current,
                shared=update.shared,
                etag=update.etag,
                who=who,
            )
        )
        _log.info(
            "update", adapter=record.ref.short, current=update.current, dropped=len(dropped)
        )
        if record.current and not before.current:
            self._events.made_current(record)
        if record.etag != before.etag:
            self._events.updated(record)
        await self._removed(dropped)
        return record

    # ------------------------------------------------------------ after a change

    async def _keep_after(self) -> None:
        """Store the resident set after a change. A failure does not undo the change, since
        housekeeping tries again."""
        try:
            await self._keep_residents()
        except VeneerError as error:
            _log.warning("resident adapters not stored for the next start", reason=error.reason)

    async def _pin_changed(self, event: str, ref: AdapterRef, who: Who) -> None:
        """Record a changed pin before answering the caller: a pin outlives the server."""
        await to_the_end(lambda: self._registry.note(event, ref, who))
        await self._keep_residents()

    async def _get(self, name: str) -> AdapterRecord:
        return await to_the_end(lambda: self._registry.get(name))

    async def mirrored(self, dropped: Sequence[AdapterRef]) -> None:
        """Forget revisions that the followed server's registry has dropped, and free their
        memory."""
        await self._removed(dropped)

    async def _removed(
        self, refs: Sequence[AdapterRef], *, mode: Literal["forget", "abort"] = "forget"
    ) -> None:
        """Forget revisions that their names no longer have, and free their memory."""
        for ref in refs:
            self._use.forget(ref)
        for weights_digest in {ref.weights_digest for ref in refs}:
            # Other revisions with the same weights share the memory, pin and requests.
            if not await to_the_end(lambda d=weights_digest: self._registry.holding(d)):  # type: ignore[misc]
                await self._free(weights_digest, mode)

    async def _free(self, weights_digest: str, mode: Literal["forget", "abort"]) -> None:
        """Free the memory of deleted weights, once their last sequence has ended. This includes
        weights that the engine is still loading and has not reported yet."""
        try:
            await self._engine.evict(weights_digest, mode=mode, unpin=True)
        except VeneerError as error:
            # The adapter is deleted anyway; its memory is freed when space is needed.
            _log.warning("memory of a deleted adapter not freed", reason=error.reason)


# -------------------- budgets
# The memory budgets of adapters: their current values, and how to change them.


class AdapterBudgets:
    """The current budgets. Belongs to one event loop.

    Attributes:
        host, device: budgets in bytes.
        memory: the memory plan that includes them.
    """

    def __init__(
        self,
        host: int,
        device: int,
        memory: MemoryPlan,
        *,
        engine: EngineClient,
        metrics: Metrics,
        plan: Callable[[int, int], MemoryPlan],
    ) -> None:
        """Args: plan: makes the plan for given host and device budgets; raises
        `MemoryTooSmall`."""
        self.host = host
        self.device = device
        self.memory = memory
        self._engine = engine
        self._metrics = metrics
        self._plan = plan
        self._turn = asyncio.Lock()
        metrics.set_budgets(host=host, device=device)

    async def update(self, host: int | None, device: int | None) -> BudgetsState:
        """Change the budgets; None leaves a budget unchanged. Adapters over a lowered budget
        are evicted as soon as no running request uses them.

        Raises:
            AdapterBudgetExceeded: the budgets do not fit the machine together with the rest
                of the plan, or pinned adapters alone take more. Nothing has changed.
            FailedPrecondition: this server's role has no engine.
        """
        # One change at a time: two changes that each fit the machine may not fit together.
        async with self._turn:
            wanted = (
                self.host if host is None else host,
                self.device if device is None else device,
            )
            try:
                memory = self._plan(*wanted)
            except MemoryTooSmall as error:
                raise AdapterBudgetExceeded(str(error)) from error
            state = await self._engine.update_budgets(host_bytes=host, device_bytes=device)
            self.host, self.device = state.host_budget, state.device_budget
            self.memory = memory
            self._metrics.set_budgets(host=self.host, device=self.device)
        if (host, device) != (None, None):
            _log.info("budgets", host_bytes=self.host, device_bytes=self.device)
        return state
