"""Publications with ``activate``: the registry publishes, then an engine loads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from veneer_proto.v1 import adapters_pb2, replication_pb2

ANSWERS: Final[Mapping[str, Any]] = {
    "UploadAdapter": adapters_pb2.UploadAdapterResponse,
    "RegisterAdapter": adapters_pb2.RegisterAdapterResponse,
}
"""Response types of the calls that publish, by method name."""


class PublishRequest:
    """A publishing request as it is sent to the registry: without ``activate``, which a
    registry refuses since it loads nothing.

    Attributes:
        request: a message, or an iterator of an upload's messages.
        loads: whether to load the adapter once it is published; for an upload, valid once its
            first message has been read.
    """

    def __init__(self, request: Any) -> None:
        self.loads = False
        self.request = request
        if isinstance(request, adapters_pb2.RegisterAdapterRequest):
            self._take_off(request)
        else:
            self.request = self._messages(request)

    async def _messages(self, upload: Any) -> AsyncIterator[Any]:
        async for message in upload:
            if message.WhichOneof("message") == "spec":
                self._take_off(message.spec)
            yield message

    def _take_off(
        self, wanted: adapters_pb2.UploadSpec | adapters_pb2.RegisterAdapterRequest
    ) -> None:
        self.loads = wanted.activate and not wanted.validate_only
        if not self.loads:
            return
        wanted.activate = False
        if not wanted.HasField("wait"):
            # The engine that will load the adapter must know of it by then.
            wanted.wait.replicas = replication_pb2.WAIT_REPLICAS_ALL
