"""Messages between the deployments: calls as bytes, and their answers.

An engine's replica answers with `Started`, then messages as bytes, then one `CallEnded`, even
for a call with a single answer. Errors travel as values: an exception would be logged with a
traceback at each hop, and would lose the details of its status.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import grpc
from veneer_proto.v1 import adapters_pb2, inference_pb2, server_pb2
from veneer_registry.errors import Unavailable, VeneerError
from veneer_server.routing.records import Wanted
from veneer_server.rpc.status import to_grpc_status

Metadata = tuple[tuple[str, str | bytes], ...]

DETAILS: Final = "grpc-status-details-bin"

_SERVES: Final = frozenset(("application", "request_id", "session_id", "multiplexed_model_id"))
"""Metadata that is meant for Serve's proxy."""
_CONNECTIONS: Final = frozenset(("user-agent", "content-type", "te"))


@dataclass(frozen=True, slots=True)
class RayMethod:
    """A method of one of Veneer's gRPC services.

    Attributes:
        path: ``/SERVICE/NAME``.
    """

    path: str
    client_streaming: bool
    server_streaming: bool

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
    RayMethod(f"/{service.full_name}/{each.name}", each.client_streaming, each.server_streaming)
    for file in (inference_pb2, adapters_pb2, server_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for each in service.methods
)


@dataclass(frozen=True, slots=True)
class RayCall:
    """A gRPC call with one request.

    Attributes:
        wanted: what the router decides by.
    """

    wanted: Wanted
    path: str
    streams: bool
    request: bytes
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class HttpCall:
    """A whole HTTP request."""

    wanted: Wanted
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Started:
    """A replica has taken the call."""

    replica: str


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers of an HTTP answer; its body follows as bytes."""

    status: int
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class CallEnded:
    """How a call ended.

    Attributes:
        code: a gRPC status code's number.
        trailing: the trailing metadata, including the error's details.
    """

    code: int = 0
    message: str = ""
    trailing: Metadata = ()

    @classmethod
    def by(cls, error: VeneerError) -> CallEnded:
        """A call that ended with an error of ours."""
        status = to_grpc_status(error)
        return cls(status.code.value[0], status.message, status.trailing)

    @classmethod
    def failed(cls, error: grpc.aio.AioRpcError) -> CallEnded:
        """A call that ended with a server's error, which is passed on unchanged. UNAVAILABLE
        without details comes from the connection: the server is gone."""
        trailing = _pairs(error.trailing_metadata())
        known = any(key == DETAILS for key, _ in trailing)
        if not known and error.code() is grpc.StatusCode.UNAVAILABLE:
            return cls.by(lost("the server handling this call has stopped"))
        return cls(error.code().value[0], error.details() or "", trailing)

    @classmethod
    def well(cls, trailing: object) -> CallEnded:
        """A call that ended without an error."""
        return cls(trailing=_pairs(trailing))


def lost(what: str, cause: str = "replica_lost") -> Unavailable:
    """The error of a call that lost its server, or that no server accepted."""
    return Unavailable(f"{what}: retry", metadata={"cause": cause}, retry_after_s=1.0)


def passed_on(metadata: object) -> Metadata:
    """A caller's metadata, without the keys that belong to its connection or to Serve."""
    return tuple(
        (key, value)
        for key, value in _pairs(metadata)
        if key not in _SERVES and key not in _CONNECTIONS and not key.startswith(("grpc-", ":"))
    )


def _pairs(metadata: object) -> Metadata:
    # grpc's asyncio metadata iterates over pairs; its types say otherwise.
    return tuple((str(key), value) for key, value in metadata or ())  # type: ignore[attr-defined]
