"""AdapterService of a follower: what changes the registry is passed on to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc
from veneer_registry.errors import VeneerError

from veneer_server.follower.registry_channel import RegistryChannel, to_error
from veneer_server.replication.asked import ASKED
from veneer_server.rpc.adapter_service import AdapterService
from veneer_server.rpc.followers.arrival import Until, arrived, knows
from veneer_server.serving.adapters.budgets import AdapterBudgets
from veneer_server.serving.tenants.tenants import Tenants
from veneer_server.serving.transfer.transfers import Transfers
from veneer_server.serving.who import who_calls

__all__ = ["PassingOn"]


class PassingOn(AdapterService):
    """Looks up and loads here, and has the registry make changes with the caller's own
    credentials: whatever this server may do, a caller may do there only what it may do."""

    def __init__(
        self,
        tenants: Tenants,
        *,
        budgets: AdapterBudgets,
        transfers: Transfers,
        registry: RegistryChannel,
        until: Until,
    ) -> None:
        super().__init__(tenants, budgets=budgets, transfers=transfers)
        self._registry = registry
        self._until = until

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> Any:
        """Passed on as it arrives; then loaded here, if that is asked for."""
        broken: list[VeneerError] = []
        activate = False

        async def messages() -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
            nonlocal activate
            try:
                async for request in request_iterator:
                    if request.WhichOneof("message") == "spec":
                        activate = _taken_off(request.spec)
                    yield request
            except VeneerError as error:  # it was malformed
                broken.append(error)
                raise

        try:
            answer = await self._pass("UploadAdapter", messages(), context)
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
        """The registry fetches; then it is loaded here, if that is asked for."""
        activate = _taken_off(request)
        answer = await self._pass("RegisterAdapter", request, context)
        return await self._load(answer, context) if activate else answer

    async def DownloadAdapter(  # type: ignore[override]  # writes instead of yielding
        self, request: Any, context: Any
    ) -> None:
        """Passed on as it arrives: a follower keeps only what it generates with."""
        call = self._begin("DownloadAdapter", request, context)
        try:
            async for message in call:
                await context.write(message)
        except grpc.aio.AioRpcError as error:
            raise to_error(error, self._registry.place.address) from error
        finally:
            call.cancel()

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
        """A pin is this server's own; the rest is the registry's."""
        if request.HasField("pinned"):
            return await super().UpdateAdapter(request, context)
        return await self._pass("UpdateAdapter", request, context)

    async def _load(self, answer: Any, context: Any) -> Any:
        """Load what the registry has published. It stands, so a failure is a warning."""
        name = answer.adapter.name
        spec = f"{name}@{answer.adapter.revision}"
        try:
            home = await self._tenants.current()
            await arrived(self._until, name, lambda: knows(home, spec))
            record = await home.changes.activate(
                spec, "device", pin=False, who=who_calls(context)
            )
            answer.adapter.CopyFrom(self._message(home, home, record))
        except VeneerError as error:
            answer.warnings.append(f"published, but not loaded here: {error.message}")
        return answer

    async def _pass(self, method: str, request: Any, context: Any) -> Any:
        call = self._begin(method, request, context)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise to_error(error, self._registry.place.address) from error
        finally:
            call.cancel()

    def _begin(self, method: str, request: Any, context: Any) -> Any:
        asked = ASKED.get()
        stub = adapters_pb2_grpc.AdapterServiceStub(self._registry.channel)
        return getattr(stub, method)(
            request,
            metadata=() if asked is None else asked.caller,
            timeout=context.time_remaining(),
        )


def _taken_off(wanted: adapters_pb2.UploadSpec | adapters_pb2.RegisterAdapterRequest) -> bool:
    """Whether what is to be published is to be loaded; a registry, which loads nothing, is not
    asked to. With ``validate_only`` it refuses that."""
    activate = wanted.activate and not wanted.validate_only
    if activate:
        wanted.activate = False
    return activate
