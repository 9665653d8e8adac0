"""AdapterService: upload, inspect, move between tiers, watch, delete."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Literal, NoReturn

from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc
from veneer_registry.adapter import AdapterRef, Tier
from veneer_registry.errors import AdapterNotFound, InvalidField, Unimplemented, VeneerError
from veneer_registry.registry import (
    AdapterRecord,
    AliasChange,
    Published,
    Registry,
    Staged,
    Who,
)

from veneer_server.engine_client.client import EngineClient
from veneer_server.logs import get_logger
from veneer_server.rpc import convert
from veneer_server.rpc import convert_admin as admin
from veneer_server.rpc.adapter_view import AdapterView
from veneer_server.rpc.watch import AdapterWatch
from veneer_server.serving.adapters.budgets import AdapterBudgets
from veneer_server.serving.adapters.events import AdapterEvents
from veneer_server.serving.adapters.replacing import Replacing, Warm
from veneer_server.serving.adapters.self_test import SelfTest
from veneer_server.serving.adapters.uploads import Uploads
from veneer_server.serving.adapters.use import AdapterUse, source_of
from veneer_server.serving.threads import outlast, to_the_end
from veneer_server.serving.who import who_calls

__all__ = ["AdapterService"]

_MOST_DIGITS: Final = 18
"""Of a history line's number: SQLite's integers have 63 bits."""

_log = get_logger(__name__)


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Adapters by name. What comes later answers UNIMPLEMENTED with a sentence.

    What changes something is carried out whole or not at all, whether or not its caller
    waits for the answer: it is run by `outlast`.
    """

    def __init__(
        self,
        registry: Registry,
        engine: EngineClient,
        use: AdapterUse,
        uploads: Uploads,
        events: AdapterEvents,
        *,
        budgets: AdapterBudgets,
        self_test: SelfTest,
        keep_residents: Callable[[], Awaitable[None]],
    ) -> None:
        """Args: keep_residents: writes down what is in memory, for the next start."""
        self._registry = registry
        self._engine = engine
        self._use = use
        self._view = AdapterView(registry, engine, use)
        self._uploads = uploads
        self._events = events
        self._budgets = budgets
        self._self_test = self_test
        self._keep_residents = keep_residents
        self._replacing = Replacing(registry, engine, keep_residents=keep_residents)
        self._watch = AdapterWatch(registry, self._view, events)

    async def UploadAdapter(
        self, request_iterator: Any, context: Any
    ) -> adapters_pb2.UploadAdapterResponse:
        """Publish, and activate if asked to. A caller that leaves before the name has moved
        leaves nothing behind but what it sent; after that all is carried out."""
        async with self._uploads.receive(request_iterator) as (options, upload):
            if options.validate_only:
                published = await self._uploads.validate(upload)
                return self._published(published, published.warnings)
            async with (
                self._uploads.stage(upload) as staged,
                self._replacing.warm(staged, activate=options.activate) as warm,
            ):
                return await outlast(self._commit(staged, warm, who_calls(context)))

    async def _commit(
        self, staged: Staged, warm: Warm, who: Who
    ) -> adapters_pb2.UploadAdapterResponse:
        """Move the name, and do what follows from that."""
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
        await self._keep_after()  # a pin that passed on outlives the server
        return self._published(published, warnings)

    def _published(
        self, published: Published, warnings: tuple[str, ...]
    ) -> adapters_pb2.UploadAdapterResponse:
        return adapters_pb2.UploadAdapterResponse(
            adapter=self._view.adapter(published.record),
            published=published.published,
            replaced=published.replaced,
            warnings=warnings,
        )

    async def GetUpload(
        self, request: adapters_pb2.GetUploadRequest, context: Any
    ) -> adapters_pb2.GetUploadResponse:
        """What need not be sent of an upload."""
        if not request.HasField("spec"):
            raise InvalidField(
                "spec is unset: give the name and files of the upload",
                metadata={"field": "spec"},
            )
        return adapters_pb2.GetUploadResponse(
            committed=await self._uploads.committed(request.spec)
        )

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        """The named revision, and all stored ones of its name."""
        record = await self._get(request.name)
        revisions = await to_the_end(lambda: self._registry.revisions(record.ref.name))
        adapter = self._view.adapter(record)
        page = admin.Page[adapters_pb2.Adapter](None, taken=adapter.ByteSize())
        for revision in revisions:
            if not page.add(self._view.adapter(revision)):
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
        page = admin.Page[adapters_pb2.Adapter](admin.page_size(request.page_size))
        tier = convert.tier_from_proto(request.tier, "tier")
        after = admin.decode_token(request.page_token, "ListAdapters")
        labels = admin.label_filter(request.labels)
        while True:
            batch = await to_the_end(
                lambda after=after: self._registry.list(  # type: ignore[misc]
                    prefix=request.name_prefix, labels=labels, after=after, limit=admin.BATCH
                )
            )
            for record in batch:
                if tier is not None and self._view.tier(record) is not tier:
                    continue
                if not page.add(self._view.adapter(record), record.ref.name):
                    return adapters_pb2.ListAdaptersResponse(
                        adapters=page.entries, next_page_token=page.next_token
                    )
            if len(batch) < admin.BATCH:
                return adapters_pb2.ListAdaptersResponse(adapters=page.entries)
            after = batch[-1].ref.name

    async def ActivateAdapter(
        self, request: adapters_pb2.ActivateAdapterRequest, context: Any
    ) -> adapters_pb2.ActivateAdapterResponse:
        """Bring a revision to HOST or DEVICE, and pin it if asked to."""
        tier = convert.tier_from_proto(request.tier, "tier")
        if tier not in (None, Tier.HOST, Tier.DEVICE):
            raise InvalidField(
                "tier must be TIER_HOST or TIER_DEVICE, or unset for TIER_DEVICE",
                metadata={"field": "tier"},
            )
        return await outlast(
            self._bring(
                request.name,
                "host" if tier is Tier.HOST else "device",
                pin=request.pin,
                who=who_calls(context),
            )
        )

    async def _bring(
        self, name: str, tier: Literal["host", "device"], *, pin: bool, who: Who
    ) -> adapters_pb2.ActivateAdapterResponse:
        record = await self._get(name)
        await self._activate(record, tier, pin=pin, who=who)
        return adapters_pb2.ActivateAdapterResponse(adapter=self._view.adapter(record))

    async def EvictAdapter(
        self, request: adapters_pb2.EvictAdapterRequest, context: Any
    ) -> adapters_pb2.EvictAdapterResponse:
        """Free a revision's memory; it stays registered."""
        mode = admin.evict_mode(request.mode)
        return await outlast(self._evict(request, mode, who_calls(context)))

    async def _evict(
        self, request: adapters_pb2.EvictAdapterRequest, mode: admin.EvictMode, who: Who
    ) -> adapters_pb2.EvictAdapterResponse:
        ref = (await self._get(request.name)).ref
        residency = self._engine.tier(ref.weights_digest)
        evicted, freed = await self._engine.evict(
            ref.weights_digest, mode=mode, unpin=request.unpin
        )
        if request.unpin and residency is not None and residency.pinned:
            await self._pin_changed("unpinned", ref, who)
        _log.info("evict", adapter=ref.short, mode=mode, evicted=evicted, freed_bytes=freed)
        return adapters_pb2.EvictAdapterResponse(evicted=evicted, freed_bytes=freed)

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Any
    ) -> adapters_pb2.DeleteAdapterResponse:
        """Remove a revision or a name. Running requests keep what they started with."""
        mode = admin.evict_mode(request.mode)
        return await outlast(self._delete(request, mode, who_calls(context)))

    async def _delete(
        self, request: adapters_pb2.DeleteAdapterRequest, mode: admin.EvictMode, who: Who
    ) -> adapters_pb2.DeleteAdapterResponse:
        record = await self._get(request.name)
        records: tuple[AdapterRecord, ...] = (record,)
        if "@" not in request.name:
            records = await to_the_end(lambda: self._registry.revisions(record.ref.name))
        deleted = await to_the_end(
            lambda: self._registry.delete(
                request.name,
                request.etag or None,
                who,
                unless_leased=mode == "fail_if_busy",
            )
        )
        _log.info("delete", adapter=request.name, revisions=len(deleted), mode=mode)
        gone = [record for record in records if record.ref.revision in deleted]
        self._events.deleted(gone)
        await self._removed(
            [record.ref for record in gone], mode="abort" if mode == "abort" else "forget"
        )
        await self._keep_after()  # its pin must not come back with the same content
        return adapters_pb2.DeleteAdapterResponse(revisions=deleted)

    async def SetAlias(
        self, request: adapters_pb2.SetAliasRequest, context: Any
    ) -> adapters_pb2.SetAliasResponse:
        """Move, roll back or remove an alias."""
        targets, who = admin.alias_targets(request), who_calls(context)

        def change() -> AliasChange:
            registry, etag = self._registry, request.etag
            if request.rollback:
                return registry.rollback_alias(request.alias, etag=etag, who=who)
            if request.remove:
                return registry.remove_alias(request.alias, etag=etag, who=who)
            return registry.set_alias(request.alias, targets, etag=etag, who=who)

        return await outlast(self._change_alias(request.alias, change))

    async def _change_alias(
        self, alias: str, change: Callable[[], AliasChange]
    ) -> adapters_pb2.SetAliasResponse:
        changed = await to_the_end(change)
        _log.info(
            "alias",
            alias=alias,
            targets=[revision[:12] for revision, _ in changed.alias.targets],
            before=[revision[:12] for revision, _ in changed.before],
        )
        await self._tell_alias(changed)
        return admin.set_alias_response(changed.alias, changed.before)

    async def _tell_alias(self, changed: AliasChange) -> None:
        row = changed.alias
        if row.targets == changed.before:
            return
        for revision, _ in row.targets or changed.before:
            with contextlib.suppress(AdapterNotFound):  # deleted meanwhile
                record = await self._get(f"{row.name}@{revision}")
                self._events.alias_changed(record, f"{row.name}/{row.alias}")

    async def ListAliases(
        self, request: adapters_pb2.ListAliasesRequest, context: Any
    ) -> adapters_pb2.ListAliasesResponse:
        """One page of the aliases of a name, or of all."""
        size = admin.page_size(request.page_size) if request.page_size else None
        page = admin.Page[adapters_pb2.Alias](size)
        after = admin.decode_token(request.page_token, "ListAliases")
        name, _, alias = after.partition("/")
        rows = await to_the_end(lambda: self._registry.aliases(request.name))
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
        """One page of what was done, newest first."""
        page = admin.Page[adapters_pb2.HistoryEntry](admin.page_size(request.page_size))
        given = admin.decode_token(request.page_token, "GetHistory")
        if given and not (given.isdecimal() and len(given) <= _MOST_DIGITS):
            raise admin.bad_token("GetHistory")
        before = int(given) if given else None
        while True:
            lines = await to_the_end(
                lambda before=before: self._registry.history(  # type: ignore[misc]
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
        """Tell what was missed since a sequence number, then events as they happen."""
        await self._watch.serve(request.since_sequence, context.write)

    async def UpdateAdapter(
        self, request: adapters_pb2.UpdateAdapterRequest, context: Any
    ) -> adapters_pb2.UpdateAdapterResponse:
        """Change a revision's labels, its name's retention or current revision, its pin."""
        registered = bool(
            request.labels
            or request.remove_labels
            or request.HasField("retain")
            or request.current
        )
        if not registered and not request.HasField("pinned"):
            raise InvalidField(
                "nothing is asked for: set pinned, labels, remove_labels, retain or current",
                metadata={"field": "pinned"},
            )
        return await outlast(self._change(request, registered, who_calls(context)))

    async def _change(
        self, request: adapters_pb2.UpdateAdapterRequest, registered: bool, who: Who
    ) -> adapters_pb2.UpdateAdapterResponse:
        record = await self._get(request.name)
        if registered:
            record = await self._update(request, record, who)
        if request.HasField("pinned"):
            if request.pinned:
                await self._activate(record, "device", pin=True, who=who)
            else:
                await self._engine.unpin(record.ref.weights_digest)
                await self._pin_changed("unpinned", record.ref, who)
        return adapters_pb2.UpdateAdapterResponse(adapter=self._view.adapter(record))

    async def _update(
        self, request: adapters_pb2.UpdateAdapterRequest, before: AdapterRecord, who: Who
    ) -> AdapterRecord:
        record, dropped = await to_the_end(
            lambda: self._registry.update(
                f"{before.ref.name}@{before.ref.revision}",
                labels=dict(request.labels),
                remove_labels=list(request.remove_labels),
                retain=request.retain if request.HasField("retain") else None,
                current=request.current,
                etag=request.etag,
                who=who,
            )
        )
        _log.info(
            "update", adapter=record.ref.short, current=request.current, dropped=len(dropped)
        )
        if record.current and not before.current:
            self._events.made_current(record)
        if record.etag != before.etag:
            self._events.updated(record)
        await self._removed(dropped)
        return record

    async def _keep_after(self) -> None:
        """After a change that stands whatever becomes of this; housekeeping tries again."""
        try:
            await self._keep_residents()
        except VeneerError as error:
            _log.warning("what is in memory is not written down", reason=error.reason)

    async def _pin_changed(self, event: str, ref: AdapterRef, who: Who) -> None:
        """Before the caller is told: a pin outlives the server."""
        await to_the_end(lambda: self._registry.note(event, ref, who))
        await self._keep_residents()

    async def _get(self, name: str) -> AdapterRecord:
        return await to_the_end(lambda: self._registry.get(name))

    async def _activate(
        self, record: AdapterRecord, tier: Literal["host", "device"], *, pin: bool, who: Who
    ) -> None:
        # The lease keeps the files there while the engine reads them.
        ref = record.ref
        with self._registry.acquire(f"{ref.name}@{ref.revision}"):
            pinned = await self._engine.activate(
                source_of(self._registry, record), tier=tier, pin=pin
            )
        if pinned:
            await self._pin_changed("pinned", ref, who)

    async def _removed(
        self, refs: Sequence[AdapterRef], *, mode: Literal["forget", "abort"] = "forget"
    ) -> None:
        """Keep nothing of revisions that their name does not have any more."""
        for ref in refs:
            self._use.forget(ref)
        for weights_digest in {ref.weights_digest for ref in refs}:
            # The memory, a pin and running requests are theirs too who have the same weights.
            if not await to_the_end(lambda d=weights_digest: self._registry.holding(d)):  # type: ignore[misc]
                await self._free(weights_digest, mode)

    async def _free(self, weights_digest: str, mode: Literal["forget", "abort"]) -> None:
        """Memory of weights that are gone, once their last sequence has ended. Also of what
        the engine is loading, of which it has told nothing yet."""
        try:
            await self._engine.evict(weights_digest, mode=mode, unpin=True)
        except VeneerError as error:
            # The adapter is gone all the same; its memory goes when room is needed.
            _log.warning("memory of a deleted adapter not freed", reason=error.reason)

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
        """Compare what is served with references computed apart from it."""
        return await self._self_test.answer(request)

    # ------------------------------------------------------------- later versions

    async def RegisterAdapter(self, request: Any, context: Any) -> NoReturn:
        _later("RegisterAdapter", "upload the files with UploadAdapter")


def _later(rpc: str, instead: str) -> NoReturn:
    raise Unimplemented(f"{rpc} comes with a later version: {instead}", metadata={"rpc": rpc})
