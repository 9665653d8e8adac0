"""AdapterService of a follower, which passes changes on to the registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import VeneerError
from veneer_registry.records import AdapterRecord

from veneer_server.access.caller import Caller
from veneer_server.rpc.adapter_service import AdapterService
from veneer_server.rpc.convert import upload_message
from veneer_server.rpc.replication_service import Asking, CallProgress, Until, arrived, knows
from veneer_server.serving.changes import AdapterBudgets
from veneer_server.serving.registering import Transfers
from veneer_server.serving.tenants import Tenant, Tenants
from veneer_server.serving.uploads import UploadMessage


class PassingOn(AdapterService):
    """Looks up and loads adapters here, and has the registry make changes. The registry sees
    the caller's own credentials, so callers gain no rights from this server's."""

    def __init__(
        self,
        tenants: Tenants,
        *,
        budgets: AdapterBudgets,
        transfers: Transfers,
        registry: Asking,
        until: Until,
    ) -> None:
        super().__init__(tenants, budgets=budgets, transfers=transfers)
        self._registry = registry
        self._until = until

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> Any:
        """Pass the upload on as it arrives, then load the adapter here if requested."""
        broken: list[VeneerError] = []
        activate = False
        progress = CallProgress()

        async def messages() -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
            nonlocal activate
            try:
                async for request in request_iterator:
                    progress.made()
                    if request.WhichOneof("message") == "spec":
                        activate = _taken_off(request.spec)
                    yield request
            except VeneerError as error:  # a message was malformed
                broken.append(error)
                raise

        try:
            answer = await self._pass("UploadAdapter", messages(), context, progress)
        except Exception:
            if broken:
                raise broken[0] from None
            raise
        return await self._load(answer, context) if activate else answer

    async def GetUpload(self, request: adapters_pb2.GetUploadRequest, context: Any) -> Any:
        return await self._pass("GetUpload", request, context)

    async def RegisterAdapter(
        self, request: adapters_pb2.RegisterAdapterRequest, context: Any
    ) -> Any:
        """Have the registry fetch the adapter, then load it here if requested."""
        activate = _taken_off(request)
        answer = await self._pass("RegisterAdapter", request, context)
        return await self._load(answer, context) if activate else answer

    async def DownloadAdapter(  # type: ignore[override]  # writes instead of yielding
        self, request: Any, context: Any
    ) -> None:
        """Pass the registry's messages on as they arrive: a follower keeps only the files that
        it generates with."""
        messages = self._registry.messages("DownloadAdapter", request, context.caller)
        async with aclosing(messages):
            async for message in messages:
                await context.write(message)

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Any
    ) -> Any:
        return await self._pass("DeleteAdapter", request, context)

    async def SetAlias(self, request: adapters_pb2.SetAliasRequest, context: Any) -> Any:
        return await self._pass("SetAlias", request, context)

    async def GetHistory(self, request: adapters_pb2.GetHistoryRequest, context: Any) -> Any:
        return await self._pass("GetHistory", request, context)

    async def UpdateAdapter(
        self, request: adapters_pb2.UpdateAdapterRequest, context: Any
    ) -> Any:
        """Change a pin here, and have the registry make other changes."""
        if request.HasField("pinned"):
            return await super().UpdateAdapter(request, context)
        return await self._pass("UpdateAdapter", request, context)

    async def _load(self, answer: Any, context: Any) -> Any:
        """Load the revision that the registry has published. It stays published, so a failure
        here is only a warning."""
        name, caller = answer.adapter.name, context.caller
        spec = f"{name}@{answer.adapter.revision}"
        try:
            # Waits for a view as new as the caller wants, instead of refusing the call.
            home = await self._tenants.ensure(caller.tenant)
            await arrived(self._until, name, lambda: knows(home, spec, caller))
            record = await home.changes.activate(spec, "device", pin=False, who=caller.who)
            answer.adapter.CopyFrom(self._message(home, home, record))
        except VeneerError as error:
            answer.warnings.append(f"published, but not loaded here: {error.message}")
        return answer

    async def _pass(
        self, method: str, request: Any, context: Any, progress: CallProgress | None = None
    ) -> Any:
        return await self._registry.answer(method, request, context.caller, progress=progress)


def _taken_off(wanted: adapters_pb2.UploadSpec | adapters_pb2.RegisterAdapterRequest) -> bool:
    """Take ``activate`` off a request, as a registry loads nothing; return whether it was set.
    With ``validate_only`` it is left in place, and the registry refuses it."""
    activate = wanted.activate and not wanted.validate_only
    if activate:
        wanted.activate = False
    return activate


# -------------------- loading by registry
# Folders of a follower's machine, published by the registry that it follows.


class PublishingByRegistry:
    """Publishes folders through the registry: their files and the caller's credentials are
    passed on. So the registry need not have the folder, and the caller's own rights apply
    there."""

    def __init__(self, registry: Asking, until: Until) -> None:
        self._registry = registry
        self._until = until

    async def load(
        self, home: Tenant, messages: AsyncIterator[UploadMessage], caller: Caller
    ) -> AdapterRecord:
        answer = await self._upload(messages, caller)
        name, revision = answer.adapter.name, answer.adapter.revision
        spec = f"{name}@{revision}"
        await arrived(self._until, name, lambda: knows(home, spec, caller))
        return await home.changes.activate(spec, "device", pin=False, who=caller.who)

    async def unload(self, home: Tenant, record: AdapterRecord, caller: Caller) -> None:
        name = record.ref.name
        spec = f"{name}@{record.ref.revision}"
        request = adapters_pb2.DeleteAdapterRequest(
            name=name, etag=record.etag, mode=adapters_pb2.EVICT_MODE_DRAIN
        )
        await self._registry.answer("DeleteAdapter", request, caller)
        await arrived(self._until, name, lambda: not knows(home, spec, caller))

    async def _upload(
        self, messages: AsyncIterator[UploadMessage], caller: Caller
    ) -> adapters_pb2.UploadAdapterResponse:
        """Send the messages to the registry. Also raises the errors of ``messages``, which is
        not running any more when this returns."""
        broken: list[Exception] = []
        idle = asyncio.Event()
        idle.set()
        progress = CallProgress()

        async def sent() -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
            message: UploadMessage | None
            while True:
                idle.clear()
                try:
                    message = await anext(messages, None)
                except Exception as error:
                    broken.append(error)
                    raise
                finally:
                    idle.set()
                if message is None:
                    return
                progress.made()
                yield upload_message(message)

        try:
            answer: adapters_pb2.UploadAdapterResponse = await self._registry.answer(
                "UploadAdapter", sent(), caller, progress=progress
            )
        except (Exception, asyncio.CancelledError):  # gRPC cancels a call whose input fails
            if broken:
                raise broken[0] from None
            raise
        finally:
            await idle.wait()  # gRPC's own task may still be waiting for the next message
        return answer
