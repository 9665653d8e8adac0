"""AdapterService: upload, inspect, move between tiers, watch, delete."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, get_args

from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc
from veneer_registry.adapter import Tier
from veneer_registry.errors import Aborted, AdapterNotFound, InvalidField
from veneer_registry.records import AdapterRecord, AliasChange
from veneer_registry.registry import Registry
from veneer_registry.terminal import visible

from veneer_server.access.caller import Caller
from veneer_server.access.principal import require
from veneer_server.engine_client.tenant_engine import TenantEngine
from veneer_server.replication.replicas import Reached, Wait
from veneer_server.replication.wire import reached_to_wire, wait_for
from veneer_server.rpc import convert
from veneer_server.rpc import convert as admin
from veneer_server.serving.changes import AdapterBudgets, AdapterUpdate
from veneer_server.serving.events import (
    AdapterEvents,
    AdapterUse,
    EventKind,
    Happened,
    WeightsState,
)
from veneer_server.serving.generation import READER_LIMIT_S
from veneer_server.serving.registering import Transfers
from veneer_server.serving.spare_time import outlast, to_the_end
from veneer_server.serving.tenants import Tenant, Tenants
from veneer_server.serving.visible import Visible

# -------------------- adapter view
# The `Adapter` message: an adapter's state in the registry, the engine and `AdapterUse`.


class AdapterView:
    """Builds `Adapter` messages."""

    def __init__(self, registry: Registry, engine: TenantEngine, use: AdapterUse) -> None:
        self._registry = registry
        self._engine = engine
        self._use = use

    def tier(self, record: AdapterRecord) -> Tier:
        """Nearest tier that holds the revision's weights."""
        residency = self._engine.tier(record.ref.weights_digest)
        return Tier.DISK if residency is None else Tier(residency.tier)

    def adapter(self, record: AdapterRecord) -> adapters_pb2.Adapter:
        """The message for one revision."""
        ref, manifest = record.ref, record.manifest
        residency = self._engine.tier(ref.weights_digest)
        message = adapters_pb2.Adapter(
            name=ref.name,
            revision=ref.revision,
            weights_digest=ref.weights_digest,
            base_model=manifest.base_name,
            base_word=manifest.base_word,
            rank=manifest.max_rank,
            targets=manifest.targets,
            parameters=manifest.parameters,
            bytes=manifest.parameters * self._engine.info.adapter_itemsize,
            tier=convert.tier_to_proto(self.tier(record)),
            pinned=residency is not None and residency.pinned,
            leases=self._registry.leases(ref.weights_digest),
            created=convert.timestamp(record.created),
            labels=dict(record.labels),
            # Its uploader's own words, shown to whoever may use the adapter.
            training={visible(k): visible(v) for k, v in manifest.training.items()},
            current=record.current,
            etag=record.etag,
            has_chat_template=manifest.chat_template is not None,
            state=_state(record),
            aliases=[f"{ref.name}/{alias}" for alias in record.aliases],
            disk_bytes=record.bytes,
            retain=record.retain,
            shared=record.shared,
        )
        if (last := self._use.last(ref)) is not None:
            message.last_used.CopyFrom(convert.timestamp(last))
        return message


def as_shared(message: adapters_pb2.Adapter, owner: str, name: str) -> adapters_pb2.Adapter:
    """Adapt a message for another tenant, which knows the adapter as ``name``. Fields that show
    how others use the adapter are cleared."""
    aliases = [name + alias[len(message.name) :] for alias in message.aliases]
    message.tenant, message.name = owner, name
    message.ClearField("aliases")
    message.aliases.extend(aliases)
    for field in ("leases", "last_used", "etag"):
        message.ClearField(field)
    return message


def _state(record: AdapterRecord) -> adapters_pb2.AdapterState:
    if record.quarantined is not None:
        return adapters_pb2.ADAPTER_STATE_QUARANTINED
    if record.foreign:
        return adapters_pb2.ADAPTER_STATE_OTHER_BASE
    return adapters_pb2.ADAPTER_STATE_READY


# -------------------- watch
# WatchAdapters: each watcher's position in the event buffer, and the messages it receives.
#
# The messages of an event are built and serialised once for all watchers. A watcher that falls
# behind the oldest event in the buffer, or stops reading, is closed with an error.

_PAGE: Final = 100

KEPT_EVENTS: Final = 64
"""Events whose messages are cached for watchers slightly behind the fastest one."""

_KINDS: Final[Mapping[EventKind, adapters_pb2.AdapterEvent]] = {
    kind: getattr(adapters_pb2, f"ADAPTER_EVENT_{kind.upper()}") for kind in get_args(EventKind)
}

Message = adapters_pb2.WatchAdaptersResponse
Write = Callable[[bytes], Awaitable[None]]
"""Sends a serialised `Message`."""


class EventWatch:
    """Serves WatchAdapters calls from the event buffer."""

    def __init__(
        self,
        registry: Registry,
        view: AdapterView,
        events: AdapterEvents,
        *,
        reader_limit_s: float = READER_LIMIT_S,
    ) -> None:
        self._registry = registry
        self._view = view
        self._events = events
        self._reader_limit_s = reader_limit_s
        self._built: OrderedDict[int, asyncio.Task[list[bytes]]] = OrderedDict()

    async def serve(self, since: int, write: Write) -> None:
        """Send the events after ``since``, then new ones until the caller leaves.

        Raises:
            Aborted: the watcher reads too slowly.
            Draining: the server is shutting down.
        """
        place, synced = since, False
        if self._events.after(since) is None:
            place = self._events.last
            await self._snapshot(write)
        while True:
            happened = self._events.after(place)
            if happened is None:
                raise Aborted(
                    "the watcher fell behind the server's event buffer: read faster, and "
                    "watch again from the last sequence number",
                    metadata={"cause": "fell_behind"},
                )
            for event in happened:
                for message in await self._once(event):
                    await self._send(write, message)
                place = event.sequence
            if not synced and not self._events.after(place):
                synced = True
                kind = adapters_pb2.ADAPTER_EVENT_SYNCED
                last = self._message(kind, sequence=place)
                await self._send(write, last.SerializeToString())
            await self._events.beyond(place)

    async def _snapshot(self, write: Write) -> None:
        reset = self._message(adapters_pb2.ADAPTER_EVENT_RESET)
        await self._send(write, reset.SerializeToString())
        name = ""
        while True:
            page = await to_the_end(
                lambda after=name: self._registry.list(after=after, limit=_PAGE)  # type: ignore[misc]
            )
            for record in page:
                message = self._message(adapters_pb2.ADAPTER_EVENT_PRESENT)
                message.adapter.CopyFrom(self._view.adapter(record))
                await self._send(write, message.SerializeToString())
            if len(page) < _PAGE:
                return
            name = page[-1].ref.name

    async def _once(self, event: Happened) -> list[bytes]:
        """`_messages`, built for the first watcher that needs them and shared with the rest."""
        built = self._built.get(event.sequence)
        if built is None:
            built = asyncio.get_running_loop().create_task(self._messages(event))
            self._built[event.sequence] = built
            while len(self._built) > KEPT_EVENTS:
                self._built.popitem(last=False)
        try:
            # Shielded: other watchers may await the same task when this one leaves.
            return await asyncio.shield(built)
        except Exception:
            self._built.pop(event.sequence, None)  # the next watcher tries again
            raise

    async def _messages(self, event: Happened) -> list[bytes]:
        """A message for each revision the event is about; the last has the sequence number."""
        if isinstance(event.subject, AdapterRecord):
            adapters = [await self._registered(event, event.subject)]
        else:
            adapters = await self._sharing(event.subject)
        messages = [
            Message(
                event=_KINDS[event.kind],
                adapter=adapter,
                time=convert.timestamp(event.time),
                detail=event.detail,
            )
            for adapter in adapters
        ]
        if messages:
            messages[-1].sequence = event.sequence
        return [message.SerializeToString() for message in messages]

    async def _registered(self, event: Happened, record: AdapterRecord) -> adapters_pb2.Adapter:
        gone = replace(record, current=False)
        if event.kind == "deleted":
            return self._view.adapter(gone)
        # It may be superseded or deleted by now: `current` must not claim otherwise.
        full = f"{record.ref.name}@{record.ref.revision}"
        try:
            return self._view.adapter(await to_the_end(lambda: self._registry.get(full)))
        except AdapterNotFound:
            return self._view.adapter(gone)

    async def _sharing(self, weights: WeightsState) -> list[adapters_pb2.Adapter]:
        records = await to_the_end(lambda: self._registry.holding(weights.digest))
        if weights.names is not None:
            records = tuple(r for r in records if r.ref.name in weights.names)
        adapters = [self._view.adapter(record) for record in records]
        for adapter in adapters:
            adapter.tier = convert.tier_to_proto(weights.tier)
            adapter.pinned = weights.pinned
        return adapters

    def _message(self, kind: adapters_pb2.AdapterEvent, *, sequence: int = 0) -> Message:
        return Message(event=kind, sequence=sequence, time=convert.timestamp(time.time()))

    async def _send(self, write: Write, message: bytes) -> None:
        try:
            async with asyncio.timeout(self._reader_limit_s):
                await write(message)
        except TimeoutError as error:
            raise Aborted(
                f"the watcher read nothing for {self._reader_limit_s:g} s: read events as "
                "they come",
                metadata={"cause": "reader_limit"},
            ) from error


_MOST_DIGITS: Final = 18
"""Most digits of a history entry's sequence number: SQLite's integers have 63 bits."""


WaitReplicas = Callable[[Tenant, Wait], Awaitable[Reached | None]]


async def _no_replicas(home: Tenant, wait: Wait) -> Reached | None:
    return None


@dataclass(frozen=True, slots=True)
class _Told:
    """What builds the messages about a tenant's adapters."""

    view: AdapterView
    watch: EventWatch


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Adapters by name."""

    def __init__(
        self,
        tenants: Tenants,
        *,
        budgets: AdapterBudgets,
        transfers: Transfers,
        reached: WaitReplicas = _no_replicas,
    ) -> None:
        """Args: reached: waits until followers, and other registries with theirs, have all
        changes of a tenant up to now."""
        self._reached = reached
        self._tenants = tenants
        self._transfers = transfers
        self._visible = Visible(tenants)
        self._budgets = budgets
        self._told: dict[str, _Told] = {}

    def _of(self, tenant: Tenant) -> _Told:
        told = self._told.get(tenant.name)
        if told is None:
            view = AdapterView(tenant.registry, tenant.engine, tenant.use)
            told = _Told(view, EventWatch(tenant.registry, view, tenant.events))
            self._told[tenant.name] = told
        return told

    def _message(
        self, home: Tenant, owner: Tenant, record: AdapterRecord
    ) -> adapters_pb2.Adapter:
        """An adapter as ``home`` sees it."""
        message = self._of(owner).view.adapter(record)
        if owner is home:
            return message
        name = self._visible.shown(home, owner, record.ref.name)
        return as_shared(message, owner.name, name)

    async def _own(self, spec: str, caller: Caller) -> Tenant:
        """The caller's tenant, for a change to one of its adapters. Raises PermissionDenied if
        ``spec`` means an adapter that another tenant shares."""
        home = await self._tenants.current(caller)
        self._visible.check_own(home, spec)
        return home

    async def UploadAdapter(
        self, request_iterator: Any, context: Any
    ) -> adapters_pb2.UploadAdapterResponse:
        """Publish an adapter, and activate it if requested."""
        home = await self._tenants.current(context.caller, publishing=True)
        messages = convert.UploadMessages(request_iterator)
        async with home.uploads.receive(messages, context.caller.principal.accounts) as (
            options,
            upload,
        ):
            if options.validate_only:
                published = await home.uploads.validate(upload)
            else:
                published = await home.changes.publish(
                    upload, activate=options.activate, who=context.caller.who
                )
        # The upload's place is free now: another may use it while this one waits for followers.
        wait = Wait() if options.validate_only else messages.wait
        return adapters_pb2.UploadAdapterResponse(
            adapter=self._message(home, home, published.record),
            published=published.published,
            replaced=published.replaced,
            warnings=published.warnings,
            replicas=reached_to_wire(await self._reached(home, wait)),
        )

    async def RegisterAdapter(
        self, request: adapters_pb2.RegisterAdapterRequest, context: Any
    ) -> adapters_pb2.RegisterAdapterResponse:
        """Fetch an adapter from a URI, then publish it as `UploadAdapter` does."""
        (uri, wanted), wait = convert.registration(request), wait_for(request.wait, "wait")
        caller = context.caller
        home = await self._tenants.current(caller, publishing=True)
        published = await self._transfers.registering.register(
            home, uri, wanted, caller.who, caller.principal.accounts
        )
        return adapters_pb2.RegisterAdapterResponse(
            adapter=self._message(home, home, published.record),
            published=published.published,
            replaced=published.replaced,
            warnings=published.warnings,
            replicas=reached_to_wire(
                await self._reached(home, Wait() if wanted.validate_only else wait)
            ),
        )

    async def DownloadAdapter(  # type: ignore[override]  # writes instead of yielding
        self, request: adapters_pb2.DownloadAdapterRequest, context: Any
    ) -> None:
        """Send the files of a revision as they were uploaded."""
        home = await self._own(request.name, context.caller)
        await self._transfers.downloads.send(
            home,
            request.name,
            start=lambda record, files: convert.download_start(
                self._message(home, home, record), files
            ),
            chunk=convert.download_chunk,
            write=context.write,
        )

    async def GetUpload(
        self, request: adapters_pb2.GetUploadRequest, context: Any
    ) -> adapters_pb2.GetUploadResponse:
        """Report which parts of an upload the server already has: they need not be sent
        again."""
        if not request.HasField("spec"):
            raise InvalidField(
                "spec is unset: give the name and files of the upload",
                metadata={"field": "spec"},
            )
        # A push begins with this call.
        home = await self._tenants.current(context.caller, publishing=True)
        options, _ = convert.upload_options(request.spec)
        return adapters_pb2.GetUploadResponse(
            committed=await home.uploads.committed(options.request)
        )

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        """The named revision, and all stored revisions of that name."""
        home = await self._tenants.current(context.caller)
        seen = await to_the_end(lambda: self._visible.get(home, request.name))
        owner, record = seen.owner, seen.record
        revisions = await to_the_end(lambda: owner.registry.revisions(record.ref.name))
        adapter = self._message(home, owner, record)
        page = admin.ListingPage[adapters_pb2.Adapter](None, taken=adapter.ByteSize())
        for revision in revisions:
            if not page.add(self._message(home, owner, revision)):
                break
        return adapters_pb2.GetAdapterResponse(
            adapter=adapter,
            revisions=page.entries,
            revisions_left_out=len(revisions) - len(page.entries),
        )

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        """One page of current revisions, in name order."""
        home = await self._tenants.current(context.caller)
        page = admin.ListingPage[adapters_pb2.Adapter](admin.page_size(request.page_size))
        tier = convert.tier_from_proto(request.tier, "tier")
        after = admin.decode_token(request.page_token, "ListAdapters")
        labels = admin.label_filter(request.labels)
        while True:
            batch = await to_the_end(
                lambda after=after: self._visible.page(  # type: ignore[misc]
                    home,
                    prefix=request.name_prefix,
                    labels=labels,
                    after=after,
                    limit=admin.BATCH,
                )
            )
            for seen in batch:
                owner, record = seen.owner, seen.record
                if tier is not None and self._of(owner).view.tier(record) is not tier:
                    continue
                if not page.add(self._message(home, owner, record), seen.name):
                    return adapters_pb2.ListAdaptersResponse(
                        adapters=page.entries, next_page_token=page.next_token
                    )
            if len(batch) < admin.BATCH:
                return adapters_pb2.ListAdaptersResponse(adapters=page.entries)
            after = batch[-1].name

    async def ActivateAdapter(
        self, request: adapters_pb2.ActivateAdapterRequest, context: Any
    ) -> adapters_pb2.ActivateAdapterResponse:
        """Load a revision into HOST or DEVICE memory, and pin it if requested."""
        tier = convert.tier_from_proto(request.tier, "tier")
        if tier not in (None, Tier.HOST, Tier.DEVICE):
            raise InvalidField(
                "`tier` must be TIER_HOST or TIER_DEVICE, or unset for TIER_DEVICE",
                metadata={"field": "tier"},
            )
        if request.pin:
            require({"operator"}, context.caller.principal, "pinning an adapter")
        home = await self._own(request.name, context.caller)
        record = await home.changes.activate(
            request.name,
            "host" if tier is Tier.HOST else "device",
            pin=request.pin,
            who=context.caller.who,
        )
        return adapters_pb2.ActivateAdapterResponse(adapter=self._message(home, home, record))

    async def EvictAdapter(
        self, request: adapters_pb2.EvictAdapterRequest, context: Any
    ) -> adapters_pb2.EvictAdapterResponse:
        """Free a revision's memory; it stays registered."""
        if request.unpin:
            require({"operator"}, context.caller.principal, "unpinning an adapter")
        home = await self._own(request.name, context.caller)
        evicted, freed = await home.changes.evict(
            request.name,
            admin.evict_mode(request.mode),
            unpin=request.unpin,
            who=context.caller.who,
        )
        return adapters_pb2.EvictAdapterResponse(evicted=evicted, freed_bytes=freed)

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Any
    ) -> adapters_pb2.DeleteAdapterResponse:
        """Remove a revision or a name. Running requests keep the weights they started with."""
        wait = wait_for(request.wait, "wait")
        home = await self._own(request.name, context.caller)
        deleted = await home.changes.delete(
            request.name,
            admin.evict_mode(request.mode),
            etag=request.etag,
            who=context.caller.who,
        )
        replicas = reached_to_wire(await self._reached(home, wait))
        return adapters_pb2.DeleteAdapterResponse(revisions=deleted, replicas=replicas)

    async def SetAlias(
        self, request: adapters_pb2.SetAliasRequest, context: Any
    ) -> adapters_pb2.SetAliasResponse:
        """Move, roll back or remove an alias."""
        targets, who = admin.alias_targets(request), context.caller.who
        wait = wait_for(request.wait, "wait")
        home = await self._own(request.alias, context.caller)

        def change() -> AliasChange:
            registry, etag = home.registry, request.etag
            if request.rollback:
                return registry.rollback_alias(request.alias, etag=etag, who=who)
            if request.remove:
                return registry.remove_alias(request.alias, etag=etag, who=who)
            return registry.set_alias(request.alias, targets, etag=etag, who=who)

        changed = await home.changes.alias(request.alias, change)
        answer = admin.set_alias_response(changed.alias, changed.before)
        if (reached := reached_to_wire(await self._reached(home, wait))) is not None:
            answer.replicas.CopyFrom(reached)
        return answer

    async def ListAliases(
        self, request: adapters_pb2.ListAliasesRequest, context: Any
    ) -> adapters_pb2.ListAliasesResponse:
        """One page of the aliases of one name or of all names."""
        size = admin.page_size(request.page_size) if request.page_size else None
        page = admin.ListingPage[adapters_pb2.Alias](size)
        after = admin.decode_token(request.page_token, "ListAliases")
        name, _, alias = after.rpartition("/")
        home = await self._tenants.current(context.caller)
        rows = await to_the_end(lambda: self._visible.aliases(home, request.name))
        start = bisect.bisect_right(rows, (name, alias), key=lambda row: (row.name, row.alias))
        for row in itertools.islice(rows, start, None):
            message = admin.alias_message(row)
            if not page.add(message, message.alias):
                return adapters_pb2.ListAliasesResponse(
                    aliases=page.entries, next_page_token=page.next_token
                )
        return adapters_pb2.ListAliasesResponse(aliases=page.entries)

    async def GetHistory(
        self, request: adapters_pb2.GetHistoryRequest, context: Any
    ) -> adapters_pb2.GetHistoryResponse:
        """One page of the change history, newest first."""
        page = admin.ListingPage[adapters_pb2.HistoryEntry](admin.page_size(request.page_size))
        given = admin.decode_token(request.page_token, "GetHistory")
        if given and not (given.isdecimal() and len(given) <= _MOST_DIGITS):
            raise admin.bad_token("GetHistory")
        before = int(given) if given else None
        home = await self._tenants.current(context.caller)
        while True:
            lines = await to_the_end(
                lambda before=before: home.registry.history(  # type: ignore[misc]
                    request.name, before=before, limit=admin.BATCH
                )
            )
            for line in lines:
                if not page.add(admin.history_entry(line), str(line.sequence)):
                    return adapters_pb2.GetHistoryResponse(
                        entries=page.entries, next_page_token=page.next_token
                    )
            if len(lines) < admin.BATCH:
                return adapters_pb2.GetHistoryResponse(entries=page.entries)
            before = lines[-1].sequence

    async def WatchAdapters(  # type: ignore[override]  # writes instead of yielding
        self, request: adapters_pb2.WatchAdaptersRequest, context: Any
    ) -> None:
        """Send the events since a sequence number, then new ones as they happen."""
        home = await self._tenants.current(context.caller)
        await self._of(home).watch.serve(request.since_sequence, context.write)

    async def UpdateAdapter(
        self, request: adapters_pb2.UpdateAdapterRequest, context: Any
    ) -> adapters_pb2.UpdateAdapterResponse:
        """Change a revision's labels or pin, or its name's retention, current revision or
        sharing with other tenants."""
        update = AdapterUpdate(
            labels=dict(request.labels),
            remove_labels=list(request.remove_labels),
            retain=request.retain if request.HasField("retain") else None,
            current=request.current,
            pinned=request.pinned if request.HasField("pinned") else None,
            etag=request.etag,
            shared=request.shared if request.HasField("shared") else None,
        )
        if not update.registered and update.pinned is None:
            raise InvalidField(
                "the update is empty: set pinned, labels, remove_labels, retain, current or "
                "shared",
                metadata={"field": "pinned"},
            )
        if update.pinned is not None:
            require({"operator"}, context.caller.principal, "pinning an adapter")
        wait = wait_for(request.wait, "wait")
        home = await self._own(request.name, context.caller)
        record = await home.changes.update(request.name, update, context.caller.who)
        return adapters_pb2.UpdateAdapterResponse(
            adapter=self._message(home, home, record),
            replicas=reached_to_wire(await self._reached(home, wait)),
        )

    async def UpdateBudgets(
        self, request: adapters_pb2.UpdateBudgetsRequest, context: Any
    ) -> adapters_pb2.UpdateBudgetsResponse:
        """Change the memory budgets while serving."""
        host, device = (
            getattr(request, field) if request.HasField(field) else None
            for field in ("host_cache_bytes", "device_adapter_bytes")
        )
        state = await outlast(self._budgets.update(host, device))
        return adapters_pb2.UpdateBudgetsResponse(
            host_cache_bytes=state.host_budget,
            device_adapter_bytes=state.device_budget,
            host_bytes=state.host_bytes,
            device_bytes=state.device_bytes,
        )

    async def SelfTest(
        self, request: adapters_pb2.SelfTestRequest, context: Any
    ) -> adapters_pb2.SelfTestResponse:
        """Compare the served outputs with independently computed references."""
        home = await self._tenants.current(context.caller)
        return convert.self_test_response(await home.self_test.run(request.adapters))
