"""Envoy's ``ext_proc`` service, as version 1.0.0 of the endpoint picker protocol asks for it.

A stream is one HTTP request. The replica is chosen by the ``model`` of its JSON; without one,
or if the body is too long, it is the least loaded. Nothing else is changed. The protocol is the
Gateway API inference extension's (docs/proposals/004-endpoint-picker-protocol there).
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from veneer_registry.errors import FailedPrecondition, Unavailable

from veneer_server.access.certificates import Certificates
from veneer_server.logs import get_logger
from veneer_server.picker import ext_proc_pb2 as pb
from veneer_server.picker.pool import Pool
from veneer_server.routing.records import RoutedTo
from veneer_server.rpc.transport.channel import grpc_credentials

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
DESTINATION: Final = "x-gateway-destination-endpoint"
_CHOSEN: Final = "envoy.lb"
_SUBSET: Final = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset")
_LONGEST: Final = 4 << 20
"""Bytes of a body that are read for its model. Servers refuse longer ones; uploads are gRPC."""
_PIECE: Final = 64 << 10
"""Bytes of a body in one message to Envoy."""
_TOKENS: Final = 128
"""Output tokens of a request that does not limit them. Four bytes count as a token."""

_log = get_logger(__name__)


@dataclass(slots=True)
class _Request:
    """One HTTP request on its way through the gateway.

    Attributes:
        among: replicas that the gateway allows; None: all.
        duplex: whether response bodies are sent, and must be sent back.
        held: the body, until the replica is chosen.
    """

    pool: Pool
    among: list[str] | None = None
    duplex: bool = True
    held: bytearray = field(default_factory=bytearray)
    choice: RoutedTo | None = None

    def answers(self, message: Any) -> Iterator[Any]:
        """The answers to one message.

        Raises:
            Unavailable: no replica may be chosen.
            FailedPrecondition: the gateway does not send bodies as the protocol demands.
        """
        kind = message.WhichOneof("request")
        if kind == "request_headers":
            if message.HasField("protocol_config"):
                modes = message.protocol_config
                self.duplex = modes.response_body_mode == pb.FULL_DUPLEX_STREAMED
                if modes.request_body_mode != pb.FULL_DUPLEX_STREAMED:
                    raise FailedPrecondition(
                        "the gateway must send bodies: set request_body_mode of ext_proc to "
                        "FULL_DUPLEX_STREAMED"
                    )
            self.among = _subset(message.metadata_context)
            if message.request_headers.end_of_stream:
                yield self._choose(b"")
        elif kind == "request_body":
            body = message.request_body
            self.held += body.body
            if self.choice is not None or body.end_of_stream or len(self.held) > _LONGEST:
                yield from self._send_on(body.end_of_stream)
        elif kind == "request_trailers":
            if self.choice is None:
                yield from self._send_on(False)
            yield pb.ProcessingResponse(request_trailers=pb.TrailersResponse())
        elif kind == "response_headers":
            yield pb.ProcessingResponse(response_headers=pb.HeadersResponse())
        elif kind == "response_body":
            body = message.response_body
            same = _streamed(body.body, body.end_of_stream) if self.duplex else None
            yield pb.ProcessingResponse(response_body=same or pb.BodyResponse())
        elif kind == "response_trailers":
            yield pb.ProcessingResponse(response_trailers=pb.TrailersResponse())

    def _send_on(self, end: bool) -> Iterator[Any]:
        """Send on what is held of the body; choose by it first, if that is still to be done."""
        held, self.held = bytes(self.held), bytearray()
        if self.choice is None:
            yield self._choose(held if len(held) <= _LONGEST else b"")
        for at in range(0, len(held), _PIECE) or (0,):
            last = end and at + _PIECE >= len(held)
            passed = _streamed(held[at : at + _PIECE], last)
            yield pb.ProcessingResponse(request_body=passed)

    def _choose(self, body: bytes) -> Any:
        """Choose a replica, and tell the gateway by header and metadata, as the protocol
        demands. The header replaces the caller's own: callers must not choose."""
        self.choice = self.pool.choose(*_wanted(body), self.among)
        common = pb.CommonResponse(
            header_mutation=_headers({DESTINATION: self.choice.replica}),
            clear_route_cache=True,
        )
        made = pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common))
        made.dynamic_metadata.update({_CHOSEN: {DESTINATION: self.choice.replica}})
        return made


def _headers(values: Mapping[str, str]) -> Any:
    replace = pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    options = [
        pb.HeaderValueOption(
            header=pb.HeaderValue(key=key, raw_value=value.encode()), append_action=replace
        )
        for key, value in values.items()
    ]
    return pb.HeaderMutation(set_headers=options)


def _streamed(body: bytes, end: bool) -> Any:
    passed = pb.StreamedBodyResponse(body=body, end_of_stream=end)
    mutation = pb.BodyMutation(streamed_response=passed)
    return pb.BodyResponse(response=pb.CommonResponse(body_mutation=mutation))


def _subset(metadata: Any) -> list[str] | None:
    """The replicas that the gateway allows: a list, or a text with commas."""
    space, key = _SUBSET
    if key not in metadata.filter_metadata[space].fields:
        return None
    value = metadata.filter_metadata[space][key]
    given = [value] if isinstance(value, str) else list(value)
    return [each.strip() for text in given for each in str(text).split(",") if each.strip()]


def _wanted(body: bytes) -> tuple[str, str, float]:
    """Model, session and expected work of a request, which has not been validated yet."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        return "", "", 1.0
    bound = asked.get("max_completion_tokens") or asked.get("max_tokens")
    tokens = min(bound, 1 << 20) if isinstance(bound, int) and bound > 0 else _TOKENS
    session = asked.get("prompt_cache_key") or asked.get("user")
    work = max(1.0, len(body) / 4 + 2.0 * tokens)
    return _text(asked.get("model")), _text(session), work


def _text(value: object) -> str:
    """A text that can be hashed: JSON may have halves of characters."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


class Picker:
    """The service. Belongs to one event loop."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def process(self, messages: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """One HTTP request. It counts until the stream ends."""
        request = _Request(self._pool)
        try:
            async for message in messages:
                try:
                    for answer in request.answers(message):
                        yield answer
                except Unavailable as refused:
                    yield _unavailable(refused)
                    return
                except FailedPrecondition as wrong:
                    _log.error("gateway misconfigured", why=wrong.message)
                    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, wrong.message)
        finally:
            if request.choice is not None:
                self._pool.finished(request.choice)

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server of gRPC."""
        method = grpc.stream_stream_rpc_method_handler(
            self.process,
            request_deserializer=pb.ProcessingRequest.FromString,
            response_serializer=pb.ProcessingResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Process": method})


def _unavailable(refused: Unavailable) -> Any:
    error = {"error": {"message": refused.message, "type": "server_error", "code": None}}
    immediate = pb.ImmediateResponse(
        status=pb.HttpStatus(code=503),
        headers=_headers({"content-type": "application/json", "retry-after": "1"}),
        body=json.dumps(error).encode(),
        details="no_replica",
    )
    return pb.ProcessingResponse(immediate_response=immediate)


async def serve(pool: Pool, listen: str, tls: Certificates | None) -> None:
    """Answer until SIGTERM or SIGINT, by TLS if there are certificates.

    Raises:
        OSError: the port cannot be opened.
    """
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 2 * _LONGEST)])
    server.add_generic_rpc_handlers((Picker(pool).handler(),))
    told = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(told, server)
    await told.set("liveness", health_pb2.HealthCheckResponse.SERVING)
    for name in ("", "readiness", SERVICE):
        await told.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    try:
        if tls is None:
            server.add_insecure_port(listen)
        else:
            server.add_secure_port(listen, grpc_credentials(tls))
    except RuntimeError as error:
        raise OSError(f"--listen {listen} cannot be opened: {error}") from error
    await server.start()
    _log.info("listening", grpc=listen)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await pool.look()
    watching = asyncio.create_task(pool.watch())
    for name in ("", "readiness", SERVICE):
        await told.set(name, health_pb2.HealthCheckResponse.SERVING)
    await stop.wait()
    await told.enter_graceful_shutdown()
    watching.cancel()
    await server.stop(5)
