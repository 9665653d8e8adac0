"""The gRPC calls of Veneer's services: who answers each, and how to read one that failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from veneer_proto.v1 import adapters_pb2, inference_pb2, server_pb2
from veneer_registry.errors import Draining, EngineFailed, ModelLoading, Unavailable
from veneer_server.rpc.status import GrpcStatus, to_grpc_status

Metadata = tuple[tuple[str, str | bytes], ...]

DETAILS: Final = "grpc-status-details-bin"
_CONNECTIONS: Final = frozenset(("user-agent", "content-type", "te"))

NOT_BEGUN: Final = frozenset((Draining.reason, ModelLoading.reason))
"""Reasons with which a server refuses a call before it has done anything for it."""
UNFIT: Final = NOT_BEGUN | {EngineFailed.reason}
"""Reasons that say that the server cannot answer other calls either."""


@dataclass(frozen=True, slots=True)
class RayMethod:
    """A method of one of Veneer's gRPC services.

    Attributes:
        path: ``/SERVICE/NAME``.
        request: the class of its requests.
    """

    path: str
    client_streaming: bool
    server_streaming: bool
    request: Any

    @property
    def service(self) -> str:
        return self.path.split("/")[1]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def by_engine(self) -> bool:
        """Whether an engine answers the method; otherwise the registry does."""
        return "/veneer.v1.AdapterService/" not in self.path or self.name in _IN_MEMORY


_IN_MEMORY: Final = frozenset(("ActivateAdapter", "EvictAdapter", "UpdateBudgets", "SelfTest"))
"""AdapterService methods that work on adapters in memory, which a registry does not have."""

METHODS: Final = tuple(
    RayMethod(
        f"/{service.full_name}/{each.name}",
        each.client_streaming,
        each.server_streaming,
        GetMessageClass(each.input_type),
    )
    for file in (inference_pb2, adapters_pb2, server_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for each in service.methods
)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason in an error's details; "" if it has none, so that it comes from the
    connection and not from a server of ours."""
    for key, value in pairs(error.trailing_metadata()):
        if key == DETAILS and isinstance(value, bytes):
            info = error_details_pb2.ErrorInfo()
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(info):
                    return str(info.reason)
    return ""


def passed_back(error: grpc.aio.AioRpcError) -> GrpcStatus:
    """The status with which a caller's call ends when the server's call failed: the server's
    own, unchanged. UNAVAILABLE without details means that the server is gone."""
    if error.code() is grpc.StatusCode.UNAVAILABLE and not reason_of(error):
        return to_grpc_status(lost("the server handling this call has stopped"))
    return GrpcStatus(error.code(), error.details() or "", pairs(error.trailing_metadata()))


def lost(what: str, cause: str = "replica_lost") -> Unavailable:
    """The error of a call that lost its server, or that no server accepted."""
    return Unavailable(f"{what}: retry", metadata={"cause": cause}, retry_after_s=1.0)


def passed_on(metadata: object) -> Metadata:
    """A caller's metadata, without the keys that belong to its connection."""
    return tuple(
        (key, value)
        for key, value in pairs(metadata)
        if key not in _CONNECTIONS and not key.startswith(("grpc-", ":"))
    )


def pairs(metadata: object) -> Metadata:
    # grpc's asyncio metadata iterates over pairs; its types say otherwise.
    return tuple((str(key), value) for key, value in metadata or ())  # type: ignore[attr-defined]
