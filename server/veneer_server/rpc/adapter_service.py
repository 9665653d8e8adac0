"""AdapterService: upload, inspect, move between tiers, watch, delete."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, Literal, NoReturn

from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc
from veneer_registry.adapter import AdapterRef, Tier
from veneer_registry.errors import InvalidField, Unimplemented, VeneerError
from veneer_registry.registry import AdapterRecord, Registry

from veneer_server.engine.client import EngineClient
from veneer_server.logs import get_logger
from veneer_server.rpc import convert
from veneer_server.rpc.adapter_events import AdapterEvents
from veneer_server.rpc.adapter_view import AdapterUse, AdapterView, source_of
from veneer_server.rpc.threads import to_the_end
from veneer_server.rpc.upload import Uploads
from veneer_server.rpc.watch import AdapterWatch

__all__ = ["AdapterService"]

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000

_EVICT_MODES: Final[dict[int, Literal["drain", "fail_if_busy", "abort"]]] = {
    adapters_pb2.EVICT_MODE_UNSPECIFIED: "drain",
    adapters_pb2.EVICT_MODE_DRAIN: "drain",
    adapters_pb2.EVICT_MODE_FAIL_IF_BUSY: "fail_if_busy",
    adapters_pb2.EVICT_MODE_ABORT: "abort",
}

_log = get_logger(__name__)


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Adapters by name. What comes later answers UNIMPLEMENTED with a sentence."""

    def __init__(
        self,
        registry: Registry,
        engine: EngineClient,
        use: AdapterUse,
        uploads: Uploads,
        events: AdapterEvents,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._use = use
        self._view = AdapterView(registry, engine, use)
        self._uploads = uploads
        self._events = events
        self._watch = AdapterWatch(registry, self._view, events)

    async def UploadAdapter(
        self, request_iterator: Any, context: Any
    ) -> adapters_pb2.UploadAdapterResponse:
        """Publish, and activate if asked to."""
        messages: AsyncIterator[adapters_pb2.UploadAdapterRequest] = aiter(request_iterator)
        options, published = await self._uploads.receive(messages)
        ref = published.record.ref
        _log.info(
            "upload",
            adapter=ref.short,
            published=published.published,
            replaced=published.replaced,
            validate_only=options.validate_only,
        )
        await asyncio.shield(self._removed(published.dropped))
        if options.activate:
            await self._activate(published.record, "device", pin=False)
        return adapters_pb2.UploadAdapterResponse(
            adapter=self._view.adapter(published.record),
            published=published.published,
            replaced=published.replaced,
            warnings=published.warnings,
        )

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        """The named revision, and all stored ones of its name."""
        record = await self._get(request.name)
        revisions = await to_the_end(lambda: self._registry.revisions(record.ref.name))
        return adapters_pb2.GetAdapterResponse(
            adapter=self._view.adapter(record),
            revisions=[self._view.adapter(revision) for revision in revisions],
        )

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        """One page of current revisions, in name order."""
        size = request.page_size or DEFAULT_PAGE
        if size > MAX_PAGE:
            raise InvalidField(
                f"page_size is {size}: ask for at most {MAX_PAGE}",
                metadata={"field": "page_size"},
            )
        tier = convert.tier_from_proto(request.tier, "tier")
        after = _decode_token(request.page_token)
        labels = dict(request.labels)
        found: list[AdapterRecord] = []
        while len(found) <= size:  # one more than the page, to know whether it is the last
            batch = await to_the_end(
                lambda after=after: self._registry.list(  # type: ignore[misc]
                    prefix=request.name_prefix, labels=labels, after=after, limit=size + 1
                )
            )
            found += [r for r in batch if tier is None or self._view.tier(r) is tier]
            if len(batch) <= size:
                break
            after = batch[-1].ref.name
        page = found[:size]
        more = len(found) > size
        return adapters_pb2.ListAdaptersResponse(
            adapters=[self._view.adapter(record) for record in page],
            next_page_token=_encode_token(page[-1].ref.name) if more else "",
        )

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
        record = await self._get(request.name)
        await self._activate(record, "host" if tier is Tier.HOST else "device", request.pin)
        return adapters_pb2.ActivateAdapterResponse(adapter=self._view.adapter(record))

    async def EvictAdapter(
        self, request: adapters_pb2.EvictAdapterRequest, context: Any
    ) -> adapters_pb2.EvictAdapterResponse:
        """Free a revision's memory; it stays registered."""
        mode = _EVICT_MODES.get(request.mode)
        if mode is None:
            raise InvalidField(
                f"mode has the unknown value {request.mode}", metadata={"field": "mode"}
            )
        ref = (await self._get(request.name)).ref
        evicted, freed = await self._engine.evict(
            ref.weights_digest, mode=mode, unpin=request.unpin
        )
        _log.info("evict", adapter=ref.short, mode=mode, evicted=evicted, freed_bytes=freed)
        return adapters_pb2.EvictAdapterResponse(evicted=evicted, freed_bytes=freed)

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Any
    ) -> adapters_pb2.DeleteAdapterResponse:
        """Remove a revision or a name. Running requests keep what they started with."""
        # A caller that goes away must not leave deleted weights pinned in memory.
        return await asyncio.shield(self._delete(request))

    async def _delete(
        self, request: adapters_pb2.DeleteAdapterRequest
    ) -> adapters_pb2.DeleteAdapterResponse:
        record = await self._get(request.name)
        records: tuple[AdapterRecord, ...] = (record,)
        if "@" not in request.name:
            records = await to_the_end(lambda: self._registry.revisions(record.ref.name))
        deleted = await to_the_end(
            lambda: self._registry.delete(request.name, request.etag or None)
        )
        _log.info("delete", adapter=request.name, revisions=len(deleted))
        gone = [record for record in records if record.ref.revision in deleted]
        self._events.deleted(gone)
        await self._removed([record.ref for record in gone])
        return adapters_pb2.DeleteAdapterResponse(revisions=deleted)

    async def WatchAdapters(  # type: ignore[override]  # writes instead of yielding
        self, request: adapters_pb2.WatchAdaptersRequest, context: Any
    ) -> None:
        """Tell what was missed since a sequence number, then events as they happen."""
        await self._watch.serve(request.since_sequence, context.write)

    async def UpdateAdapter(
        self, request: adapters_pb2.UpdateAdapterRequest, context: Any
    ) -> adapters_pb2.UpdateAdapterResponse:
        """Pin a revision, or remove its pin and leave it where it is."""
        if request.labels:
            _later("UpdateAdapter with labels", "give labels with the upload")
        if not request.HasField("pinned"):
            raise InvalidField(
                "pinned is unset, so that nothing would change: set it to true or false",
                metadata={"field": "pinned"},
            )
        record = await self._get(request.name)
        if request.pinned:
            await self._activate(record, "device", pin=True)
        else:
            await self._engine.unpin(record.ref.weights_digest)
        return adapters_pb2.UpdateAdapterResponse(adapter=self._view.adapter(record))

    async def _get(self, name: str) -> AdapterRecord:
        return await to_the_end(lambda: self._registry.get(name))

    async def _activate(
        self, record: AdapterRecord, tier: Literal["host", "device"], pin: bool
    ) -> None:
        # The lease keeps the files there while the engine reads them.
        ref = record.ref
        with self._registry.acquire(f"{ref.name}@{ref.revision}"):
            await self._engine.activate(source_of(self._registry, record), tier=tier, pin=pin)

    async def _removed(self, refs: Sequence[AdapterRef]) -> None:
        """Keep nothing of revisions that their name does not have any more."""
        for ref in refs:
            self._use.forget(ref)
        for weights_digest in {ref.weights_digest for ref in refs}:
            # The memory, and a pin, are theirs too who have the same weights.
            if not await to_the_end(lambda d=weights_digest: self._registry.holding(d)):  # type: ignore[misc]
                await self._free(weights_digest)

    async def _free(self, weights_digest: str) -> None:
        """Memory of weights that are gone, once their last sequence has ended."""
        if self._engine.tier(weights_digest) is None:
            return
        try:
            await self._engine.evict(weights_digest, mode="drain", unpin=True)
        except VeneerError as error:
            # The adapter is gone all the same; its memory goes when room is needed.
            _log.warning("memory of a deleted adapter not freed", reason=error.reason)

    # ------------------------------------------------------------- later versions

    async def GetUpload(self, request: Any, context: Any) -> NoReturn:
        _later("GetUpload", "send the whole upload again")

    async def RegisterAdapter(self, request: Any, context: Any) -> NoReturn:
        _later("RegisterAdapter", "upload the files with UploadAdapter")

    async def SetAlias(self, request: Any, context: Any) -> NoReturn:
        _later("SetAlias", "name revisions as `name@revision`")

    async def ListAliases(self, request: Any, context: Any) -> NoReturn:
        _later("ListAliases", "see GetAdapter for a name's revisions")

    async def GetHistory(self, request: Any, context: Any) -> NoReturn:
        _later("GetHistory", "see GetAdapter for a name's revisions")

    async def UpdateBudgets(self, request: Any, context: Any) -> NoReturn:
        _later("UpdateBudgets", "start the server with other budgets")

    async def SelfTest(self, request: Any, context: Any) -> NoReturn:
        _later("SelfTest", "compare answers with PEFT's")


def _later(rpc: str, instead: str) -> NoReturn:
    raise Unimplemented(f"{rpc} comes with a later version: {instead}", metadata={"rpc": rpc})


def _encode_token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _decode_token(token: str) -> str:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise InvalidField(
            "page_token is not one that ListAdapters gave: start without one",
            metadata={"field": "page_token"},
        ) from error
