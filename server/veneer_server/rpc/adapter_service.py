"""AdapterService: upload, inspect, move between tiers, watch, delete."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc
from veneer_registry.adapter import Tier
from veneer_registry.errors import InvalidField
from veneer_registry.records import AdapterRecord, AliasChange

from veneer_server.access.principal import require
from veneer_server.replication.replicas import Reached, Wait
from veneer_server.replication.wire import reached_to_wire, wait_for
from veneer_server.rpc import convert
from veneer_server.rpc import convert_admin as admin
from veneer_server.rpc.adapter_view import AdapterView, as_shared
from veneer_server.rpc.watch import AdapterWatch
from veneer_server.serving.adapters.budgets import AdapterBudgets
from veneer_server.serving.adapters.changes import Update
from veneer_server.serving.tenants.tenant import Tenant
from veneer_server.serving.tenants.tenants import Tenants
from veneer_server.serving.tenants.visible import Visible
from veneer_server.serving.threads import outlast, to_the_end
from veneer_server.serving.transfer.registering import registration
from veneer_server.serving.transfer.transfers import Transfers
from veneer_server.serving.who import who_calls

__all__ = ["AdapterService"]

_MOST_DIGITS: Final = 18
"""Digits of a history entry's sequence number, at most: SQLite's integers have 63 bits."""


WaitReplicas = Callable[[Wait], Awaitable[Reached | None]]


async def _no_replicas(wait: Wait) -> Reached | None:
    return None


@dataclass(frozen=True, slots=True)
class _Told:
    """How a tenant's adapters are told to callers."""

    view: AdapterView
    watch: AdapterWatch


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
        """Args: reached: waits until followers have all changes up to now."""
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
            told = _Told(view, AdapterWatch(tenant.registry, view, tenant.events))
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

    async def _own(self, spec: str) -> Tenant:
        """The caller's tenant, to change its adapter. Raises PermissionDenied if ``spec`` means
        one that another tenant shares."""
        home = await self._tenants.current()
        self._visible.check_own(home, spec)
        return home

    async def UploadAdapter(
        self, request_iterator: Any, context: Any
    ) -> adapters_pb2.UploadAdapterResponse:
        """Publish an adapter, and activate it if requested."""
        home = await self._tenants.current(publishing=True)
        async with home.uploads.receive(request_iterator) as (options, upload):
            if options.validate_only:
                published = await home.uploads.validate(upload)
            else:
                published = await home.changes.publish(
                    upload, activate=options.activate, who=who_calls(context)
                )
        # Another upload may have its place while this one waits for followers.
        wait = Wait() if options.validate_only else options.wait
        return adapters_pb2.UploadAdapterResponse(
            adapter=self._message(home, home, published.record),
            published=published.published,
            replaced=published.replaced,
            warnings=published.warnings,
            replicas=reached_to_wire(await self._reached(wait)),
        )

    async def RegisterAdapter(
        self, request: adapters_pb2.RegisterAdapterRequest, context: Any
    ) -> adapters_pb2.RegisterAdapterResponse:
        """Fetch an adapter from a URI, then publish it as `UploadAdapter` does."""
        wanted, wait = registration(request), wait_for(request.wait, "wait")
        home = await self._tenants.current(publishing=True)
        published = await self._transfers.registering.register(home, wanted, who_calls(context))
        return adapters_pb2.RegisterAdapterResponse(
            adapter=self._message(home, home, published.record),
            published=published.published,
            replaced=published.replaced,
            warnings=published.warnings,
            replicas=reached_to_wire(
                await self._reached(Wait() if wanted.validate_only else wait)
            ),
        )

    async def DownloadAdapter(  # type: ignore[override]  # writes instead of yielding
        self, request: adapters_pb2.DownloadAdapterRequest, context: Any
    ) -> None:
        """Send the files of a revision as they were uploaded."""
        home = await self._own(request.name)
        await self._transfers.downloads.send(
            home,
            request.name,
            lambda lease: self._message(home, home, lease.record),
            context.write,
        )

    async def GetUpload(
        self, request: adapters_pb2.GetUploadRequest, context: Any
    ) -> adapters_pb2.GetUploadResponse:
        """What the server already has of an upload, and need not be sent again."""
        if not request.HasField("spec"):
            raise InvalidField(
                "spec is unset: give the name and files of the upload",
                metadata={"field": "spec"},
            )
        home = await self._tenants.current(publishing=True)  # what a push begins with
        return adapters_pb2.GetUploadResponse(
            committed=await home.uploads.committed(request.spec)
        )

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        """The named revision, and all stored revisions of that name."""
        home = await self._tenants.current()
        seen = await to_the_end(lambda: self._visible.get(home, request.name))
        owner, record = seen.owner, seen.record
        revisions = await to_the_end(lambda: owner.registry.revisions(record.ref.name))
        adapter = self._message(home, owner, record)
        page = admin.Page[adapters_pb2.Adapter](None, taken=adapter.ByteSize())
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
        home = await self._tenants.current()
        page = admin.Page[adapters_pb2.Adapter](admin.page_size(request.page_size))
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
            require({"operator"}, "pinning an adapter")
        home = await self._own(request.name)
        record = await home.changes.activate(
            request.name,
            "host" if tier is Tier.HOST else "device",
            pin=request.pin,
            who=who_calls(context),
        )
        return adapters_pb2.ActivateAdapterResponse(adapter=self._message(home, home, record))

    async def EvictAdapter(
        self, request: adapters_pb2.EvictAdapterRequest, context: Any
    ) -> adapters_pb2.EvictAdapterResponse:
        """Free a revision's memory; it stays registered."""
        if request.unpin:
            require({"operator"}, "unpinning an adapter")
        home = await self._own(request.name)
        evicted, freed = await home.changes.evict(
            request.name,
            admin.evict_mode(request.mode),
            unpin=request.unpin,
            who=who_calls(context),
        )
        return adapters_pb2.EvictAdapterResponse(evicted=evicted, freed_bytes=freed)

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Any
    ) -> adapters_pb2.DeleteAdapterResponse:
        """Remove a revision or a name. Running requests keep the weights they started with."""
        wait = wait_for(request.wait, "wait")
        home = await self._own(request.name)
        deleted = await home.changes.delete(
            request.name,
            admin.evict_mode(request.mode),
            etag=request.etag,
            who=who_calls(context),
        )
        replicas = reached_to_wire(await self._reached(wait))
        return adapters_pb2.DeleteAdapterResponse(revisions=deleted, replicas=replicas)

    async def SetAlias(
        self, request: adapters_pb2.SetAliasRequest, context: Any
    ) -> adapters_pb2.SetAliasResponse:
        """Move, roll back or remove an alias."""
        targets, who = admin.alias_targets(request), who_calls(context)
        wait = wait_for(request.wait, "wait")
        home = await self._own(request.alias)

        def change() -> AliasChange:
            registry, etag = home.registry, request.etag
            if request.rollback:
                return registry.rollback_alias(request.alias, etag=etag, who=who)
            if request.remove:
                return registry.remove_alias(request.alias, etag=etag, who=who)
            return registry.set_alias(request.alias, targets, etag=etag, who=who)

        changed = await home.changes.alias(request.alias, change)
        answer = admin.set_alias_response(changed.alias, changed.before)
        if (reached := reached_to_wire(await self._reached(wait))) is not None:
            answer.replicas.CopyFrom(reached)
        return answer

    async def ListAliases(
        self, request: adapters_pb2.ListAliasesRequest, context: Any
    ) -> adapters_pb2.ListAliasesResponse:
        """One page of the aliases of one name or of all names."""
        size = admin.page_size(request.page_size) if request.page_size else None
        page = admin.Page[adapters_pb2.Alias](size)
        after = admin.decode_token(request.page_token, "ListAliases")
        name, _, alias = after.rpartition("/")
        home = await self._tenants.current()
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
        page = admin.Page[adapters_pb2.HistoryEntry](admin.page_size(request.page_size))
        given = admin.decode_token(request.page_token, "GetHistory")
        if given and not (given.isdecimal() and len(given) <= _MOST_DIGITS):
            raise admin.bad_token("GetHistory")
        before = int(given) if given else None
        home = await self._tenants.current()
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
        home = await self._tenants.current()
        await self._of(home).watch.serve(request.since_sequence, context.write)

    async def UpdateAdapter(
        self, request: adapters_pb2.UpdateAdapterRequest, context: Any
    ) -> adapters_pb2.UpdateAdapterResponse:
        """Change a revision's labels or pin, or its name's retention, current revision or
        whether other tenants may use it."""
        update = Update(
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
            require({"operator"}, "pinning an adapter")
        wait = wait_for(request.wait, "wait")
        home = await self._own(request.name)
        record = await home.changes.update(request.name, update, who_calls(context))
        return adapters_pb2.UpdateAdapterResponse(
            adapter=self._message(home, home, record),
            replicas=reached_to_wire(await self._reached(wait)),
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
        home = await self._tenants.current()
        return await home.self_test.answer(request)
