"""AdapterService of a follower: what changes the registry is passed on to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import VeneerError

from veneer_server.rpc.adapter_service import AdapterService
from veneer_server.rpc.followers.arrival import Until, arrived, knows
from veneer_server.rpc.followers.asking import Asking, Progress
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
        registry: Asking,
        until: Until,
    ) -> None:
        super().__init__(tenants, budgets=budgets, transfers=transfers)
        self._registry = registry
        self._until = until

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> Any:
        """Passed on as it arrives; then loaded here, if that is asked for."""
        broken: list[VeneerError] = []
        activate = False
        progress = Progress()

        async def messages() -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
            nonlocal activate
            try:
                async for request in request_iterator:
                    progress.made()
                    if request.WhichOneof("message") == "spec":
                        activate = _taken_off(request.spec)
                    yield request
            except VeneerError as error:  # it was malformed
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
        """The registry fetches; then it is loaded here, if that is asked for."""
        activate = _taken_off(request)
        answer = await self._pass("RegisterAdapter", request, context)
        return await self._load(answer, context) if activate else answer

    async def DownloadAdapter(  # type: ignore[override]  # writes instead of yielding
        self, request: Any, context: Any
    ) -> None:
        """Passed on as it arrives: a follower keeps only what it generates with."""
        within_s = context.time_remaining()
        messages = self._registry.messages("DownloadAdapter", request, timeout_s=within_s)
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

    async def _pass(
        self, method: str, request: Any, context: Any, progress: Progress | None = None
    ) -> Any:
        within_s = context.time_remaining()
        return await self._registry.answer(
            method, request, timeout_s=within_s, progress=progress
        )


def _taken_off(wanted: adapters_pb2.UploadSpec | adapters_pb2.RegisterAdapterRequest) -> bool:
    """Whether what is to be published is to be loaded; a registry, which loads nothing, is not
    asked to. With ``validate_only`` it refuses that."""
    activate = wanted.activate and not wanted.validate_only
    if activate:
        wanted.activate = False
    return activate
