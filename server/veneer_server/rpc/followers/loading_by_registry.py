"""Folders of a follower's machine, published by the registry that it follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from veneer_proto.v1 import adapters_pb2
from veneer_registry.records import AdapterRecord

from veneer_server.rpc.followers.arrival import Until, arrived, knows
from veneer_server.rpc.followers.asking import Asking, Progress
from veneer_server.serving.tenants.tenant import Tenant
from veneer_server.serving.who import who_is_here

__all__ = ["LoadingByRegistry"]


class LoadingByRegistry:
    """The caller shows this server its folder and its credentials; both are passed on. So the
    registry need not have the folder, and the caller may do there what it may do."""

    def __init__(self, registry: Asking, until: Until) -> None:
        self._registry = registry
        self._until = until

    async def load(
        self, home: Tenant, messages: AsyncIterator[adapters_pb2.UploadAdapterRequest]
    ) -> AdapterRecord:
        answer = await self._upload(messages)
        name, revision = answer.adapter.name, answer.adapter.revision
        spec = f"{name}@{revision}"
        await arrived(self._until, name, lambda: knows(home, spec))
        return await home.changes.activate(spec, "device", pin=False, who=who_is_here())

    async def unload(self, home: Tenant, record: AdapterRecord) -> None:
        name = record.ref.name
        spec = f"{name}@{record.ref.revision}"
        request = adapters_pb2.DeleteAdapterRequest(
            name=name, etag=record.etag, mode=adapters_pb2.EVICT_MODE_DRAIN
        )
        await self._registry.answer("DeleteAdapter", request)
        await arrived(self._until, name, lambda: not knows(home, spec))

    async def _upload(
        self, messages: AsyncIterator[adapters_pb2.UploadAdapterRequest]
    ) -> adapters_pb2.UploadAdapterResponse:
        """Raises what the messages raise, too. None is being made when it returns."""
        broken: list[Exception] = []
        idle = asyncio.Event()
        idle.set()
        progress = Progress()

        async def sent() -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
            message: adapters_pb2.UploadAdapterRequest | None
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
                yield message

        try:
            answer: adapters_pb2.UploadAdapterResponse = await self._registry.answer(
                "UploadAdapter", sent(), progress=progress
            )
        except (Exception, asyncio.CancelledError):  # gRPC cancels a call that cannot go on
            if broken:
                raise broken[0] from None
            raise
        finally:
            await idle.wait()  # gRPC's own task may still be asking for the next
        return answer
