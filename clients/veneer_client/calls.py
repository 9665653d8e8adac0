"""Every call as data: method, request, how to decode the response, whether to retry it.

The clients differ only in how they perform a `Call`. The calls are here, and for adapters in
`calls_admin`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, Protocol, TypeVar

from grpc_health.v1 import health_pb2
from veneer_proto.v1 import inference_pb2, server_pb2
from veneer_registry.errors import InvalidField

from veneer_client import convert, convert_server
from veneer_client.server_records import Capacity, ServerInfo, ServingStatus, UsageReport
from veneer_client.types import GenerateOptions, Generation, Prompt

__all__ = [
    "ADAPTERS",
    "GENERATE_STREAM",
    "INFERENCE",
    "KEEPALIVE_S",
    "RECONNECT_S",
    "Call",
    "channel_options",
    "generate",
    "health",
    "info",
    "plan",
    "usage",
]

INFERENCE: Final = "veneer.v1.InferenceService"
ADAPTERS: Final = "veneer.v1.AdapterService"
_GENERATE: Final = f"/{INFERENCE}/Generate"
GENERATE_STREAM: Final = f"/{INFERENCE}/GenerateStream"

KEEPALIVE_S: Final = 20.0
"""Idle time after which a client pings the server."""

_PLAN_RANK: Final = 16
"""Rank to plan with if only modules are given; the server's default is the same."""

RECONNECT_S: Final = 1.0
"""First wait of a watch or push for a server that was reachable before."""

LOOK_S: Final = 0.2
"""Interval of health checks while a server is not ready."""

TELL_S: Final = 1.0
"""How often to ask a server why it is not ready."""

LEAST_S: Final = 1.0
"""Shortest timeout of a health check, however little time is left."""


def channel_options(keepalive_s: float) -> tuple[tuple[str, int], ...]:
    """gRPC options of a client's channel.

    Args:
        keepalive_s: while a call runs, the idle time after which the server is pinged; it
            must answer within the same time, or the call ends with `ServerUnreachable`.
            Otherwise a call to a machine that lost power would wait for ever.
    """
    milliseconds = max(1, int(keepalive_s * 1000))
    return (
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        # Otherwise its default of a minute applies, whatever the keepalive timeout above.
        ("grpc.http2.ping_timeout_ms", milliseconds),
        # An idle stream has no data between pings.
        ("grpc.http2.max_pings_without_data", 0),
        # Reconnect to a restarted server within a second, not after minutes.
        ("grpc.max_reconnect_backoff_ms", 1000),
        # Error details may hold a suggestion and a long message: gRPC's default is 8 KiB.
        ("grpc.max_metadata_size", 64 << 10),
        # gRPC's default is 4 MiB, which 18,000 tokens with 20 alternatives each exceed. No
        # limit, as for the server's sending: answers are limited in tokens, not bytes.
        ("grpc.max_receive_message_length", -1),
    )


class _Serializable(Protocol):
    def SerializeToString(self) -> bytes: ...  # noqa: N802 - protobuf's own name


Answer = TypeVar("Answer")
Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer, Result]):
    """One unary call.

    Attributes:
        method: full path, ``/package.Service/Method``.
        decode: parses the response's bytes into its message.
        read: converts the message to a record.
        repeatable: the call is idempotent.
    """

    method: str
    request: _Serializable
    decode: Callable[[bytes], Answer]
    read: Callable[[Answer], Result]
    repeatable: bool = True


def generate(
    prompt: Prompt, options: GenerateOptions
) -> Call[inference_pb2.GenerateResponse, Generation]:
    """Generate, with the whole answer in one response."""
    return Call(
        _GENERATE,
        convert.generate_request(prompt, options),
        inference_pb2.GenerateResponse.FromString,
        convert.generation,
    )


def info() -> Call[server_pb2.GetServerInfoResponse, ServerInfo]:
    """Describe the server."""
    return Call(
        "/veneer.v1.ServerService/GetServerInfo",
        server_pb2.GetServerInfoRequest(),
        server_pb2.GetServerInfoResponse.FromString,
        convert_server.server_info,
    )


def plan(
    *,
    like: str,
    rank: int,
    modules: Sequence[str],
    adapters: int,
    context_length: int,
    concurrency: int,
) -> Call[server_pb2.PlanCapacityResponse, Capacity]:
    """How much would fit; see `Client.plan`."""
    if like and (rank or modules):
        raise InvalidField(
            f"like={like!r} implies rank and modules: give either `like`, or rank and modules",
            metadata={"field": "like"},
        )
    request = server_pb2.PlanCapacityRequest(
        adapters=adapters, context_length=context_length, concurrency=concurrency
    )
    if like:
        request.like = like
    elif rank or modules:
        request.shape.rank = rank or _PLAN_RANK
        request.shape.modules.extend(modules)
    return Call(
        "/veneer.v1.ServerService/PlanCapacity",
        request,
        server_pb2.PlanCapacityResponse.FromString,
        convert_server.capacity,
    )


def usage(
    tenant: str, start: datetime | None, end: datetime | None
) -> Call[server_pb2.GetUsageResponse, UsageReport]:
    """What tenants have used; see `Client.usage`."""
    request = server_pb2.GetUsageRequest(tenant=tenant)
    for field, time in (("start", start), ("end", end)):
        if time is None:
            continue
        if time.tzinfo is None:
            raise InvalidField(
                f"{field} has no time zone: add one, such as datetime(..., tzinfo=UTC)",
                metadata={"field": field},
            )
        getattr(request, field).FromDatetime(time)
    return Call(
        "/veneer.v1.ServerService/GetUsage",
        request,
        server_pb2.GetUsageResponse.FromString,
        convert_server.usage,
    )


def health(service: str) -> Call[health_pb2.HealthCheckResponse, ServingStatus]:
    """The standard health check. Not retried: the answer is about this moment."""
    return Call(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest(service=service),
        health_pb2.HealthCheckResponse.FromString,
        convert_server.serving_status,
        repeatable=False,
    )
