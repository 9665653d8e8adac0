"""Veneer's gRPC services as registered in Serve's proxy, with details for every error.

Serve calls these functions in its proxy's process with the server that it is about to start
(``grpc_servicer_functions``), and replaces each handler by one of its own. Those handlers are
wrapped to fix two things:

- A stream's trailing metadata reaches the proxy only together with a message. So the ingress
  ends each stream with an empty message that carries code, details and trailing metadata; it is
  removed here. No other message of Veneer's streams is empty.
- Serve's own errors (an ingress died or is full) have no details. They get ours.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2_grpc
from veneer_proto.v1 import adapters_pb2_grpc, inference_pb2_grpc, server_pb2_grpc
from veneer_registry.errors import QueueFull, VeneerError
from veneer_server.rpc.status import to_grpc_status

from veneer_ray.calls import DETAILS, lost

SERVICERS: Final = tuple(
    f"veneer_ray.servicers.{name}"
    for name in ("add_inference", "add_adapters", "add_server", "add_health")
)

_OWN: Final = frozenset(
    each.value[0]
    for each in (
        grpc.StatusCode.OK,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
)
"""Codes that need no details: gRPC sets them itself, or the caller has left."""
_FULL: Final = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


def add_inference(servicer: Any, server: Any) -> None:
    _mend(server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)


def add_adapters(servicer: Any, server: Any) -> None:
    _mend(server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(servicer, server)


def add_server(servicer: Any, server: Any) -> None:
    _mend(server)
    server_pb2_grpc.add_ServerServiceServicer_to_server(servicer, server)


def add_health(servicer: Any, server: Any) -> None:
    _mend(server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)


class _Mended:
    """Serve's handler factory, with both fixes applied to its handlers."""

    def __init__(self, factory: Callable[..., Any]) -> None:
        self._factory = factory

    def __call__(self, service_method: str, streaming_type: Any) -> Any:
        made = self._factory(service_method=service_method, streaming_type=streaming_type)
        if str(streaming_type.value).endswith("_stream"):
            return _streaming(made)
        return _single(made)


def _mend(server: Any) -> None:
    if not isinstance(server.service_handler_factory, _Mended):
        server.service_handler_factory = _Mended(server.service_handler_factory)


def _streaming(
    handler: Callable[[Any, Any], AsyncIterator[bytes]],
) -> Callable[[Any, Any], AsyncIterator[bytes]]:
    async def answer(request: Any, context: Any) -> AsyncIterator[bytes]:
        async for message in handler(request, context):
            if message:
                yield message
        _explain(context)

    return answer


def _single(
    handler: Callable[[Any, Any], Awaitable[bytes]],
) -> Callable[[Any, Any], Awaitable[bytes]]:
    async def answer(request: Any, context: Any) -> bytes:
        message = await handler(request, context)
        _explain(context)
        return message

    return answer


def _explain(context: Any) -> None:
    """Replace an error of Serve's own with our code and details."""
    code = context.code()
    number = code.value[0] if isinstance(code, grpc.StatusCode) else int(code or 0)
    if number in _OWN:
        return
    trailing = tuple(context.trailing_metadata() or ())
    if any(key == DETAILS for key, _ in trailing):
        return
    error: VeneerError = lost("the ingress handling this call has stopped", "ingress_lost")
    if number == _FULL:
        error = QueueFull("the ingress has too many calls: retry later", retry_after_s=1.0)
    status = to_grpc_status(error)
    context.set_code(status.code)
    context.set_details(status.message)
    context.set_trailing_metadata((*trailing, *status.trailing))
