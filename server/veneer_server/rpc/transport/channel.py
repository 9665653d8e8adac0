"""gRPC's own settings and services: limits of connections, credentials, and reflection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from veneer_proto.v1 import (
    adapters_pb2_grpc,
    inference_pb2_grpc,
    replication_pb2_grpc,
    server_pb2_grpc,
)

from veneer_server.access.certificates import Certificates, Pair
from veneer_server.rpc.transport.receiving import MAX_MESSAGE, WINDOW
from veneer_server.system.descriptors import UNREAD

IDLE_LIMIT_S: Final = 300.0
"""A connection without calls is closed after this long; clients reconnect by themselves."""

HANDSHAKE_LIMIT_S: Final = 10.0
"""How long a new connection may take for the HTTP/2 handshake."""

MAX_METADATA: Final = 16 << 10
"""Most bytes of a call's headers."""

MAX_PENDING: Final = 3000
"""Most calls received but not accepted yet; each holds its headers. gRPC refuses any beyond
this. By default it would refuse some from 1,000 on, chosen at random, whoever made them."""

SPARE_STREAMS: Final = 64
"""Streams per connection in addition to the engine's running and queued requests."""


def channel_options(
    *, reader_limit_s: float, connections: int, generations: int
) -> list[tuple[str, int]]:
    """Options of the gRPC server.

    Args:
        reader_limit_s: a connection with calls is closed once its peer has not answered a
            ping for this long, because its process is stopped or its machine is gone.
        connections: most connections that may be open. Beyond these, `Connections` closes some;
            beyond another `UNREAD`, gRPC closes new ones as they arrive.
        generations: most requests that may run or wait in the engine.
    """
    limit_ms = max(1_000, int(reader_limit_s * 1000))
    return [
        # Otherwise a second server on the port would take half of this one's calls.
        ("grpc.so_reuseport", 0),
        # Clients ping a quiet server every 20 s. gRPC's default minimum interval
        # (5 minutes) would close their connections for it.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_time_ms", limit_ms * 2 // 3),
        ("grpc.keepalive_timeout_ms", limit_ms // 3),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_allowed_incoming_connections", connections + UNREAD),
        ("grpc.max_connection_idle_ms", int(IDLE_LIMIT_S * 1000)),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_LIMIT_S * 1000)),
        ("grpc.http2.settings_timeout", int(HANDSHAKE_LIMIT_S * 1000)),
        ("grpc.max_concurrent_streams", generations + SPARE_STREAMS),
        ("grpc.server.max_pending_requests", MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_metadata_size", MAX_METADATA),
        ("grpc.absolute_max_metadata_size", MAX_METADATA),
        # A stream that is not being read may send WINDOW bytes and no more. With its probe
        # on, gRPC widens the window by what it measures, up to 64 MiB on loopback.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW),
    ]


# -------------------- credentials
# gRPC's view of the server's certificate.


def grpc_credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Make credentials that give each new connection the newest certificate."""
    last = certificates.current

    def newest() -> Any:
        nonlocal last
        pair = certificates.current
        if pair is last:
            return None  # no change
        last = pair
        return _configuration(pair)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(last), newest, require_client_authentication=last.client_ca is not None
    )


def _configuration(pair: Pair) -> Any:
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.chain)], pair.client_ca)


# -------------------- later
# gRPC services that are registered before their servicers exist.


class Later:
    """A stand-in with the methods of a servicer, which `answer_by` supplies later. A server
    must know its methods when it starts, before the base is loaded. Until the base is loaded,
    `CallInterceptor` lets no call through."""

    def __init__(self, kind: type) -> None:
        """Args: kind: the generated class of the servicer."""
        self._kind = kind
        self._servicer: Any = None

    def answer_by(self, servicer: object) -> None:
        """Forward calls to this servicer from now on."""
        self._servicer = servicer

    def __getattr__(self, name: str) -> Callable[[Any, Any], Awaitable[Any]]:
        if name.startswith("_") or not hasattr(self._kind, name):
            raise AttributeError(name)

        async def call(request: Any, context: Any) -> Any:
            return await getattr(self._servicer, name)(request, context)

        return call


class LaterServices:
    """The services of the contract, each of them a `Later`; the same on every port."""

    def __init__(self) -> None:
        # They have the methods of the classes that the generated functions expect.
        self._inference: Any = Later(inference_pb2_grpc.InferenceServiceServicer)
        self._adapters: Any = Later(adapters_pb2_grpc.AdapterServiceServicer)
        self._about: Any = Later(server_pb2_grpc.ServerServiceServicer)
        self._replication: Any = Later(replication_pb2_grpc.ReplicationServiceServicer)

    def add_to(self, server: Any) -> None:
        """Register with a server that has not started."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._inference, server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self._adapters, server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(self._about, server)
        replication_pb2_grpc.add_ReplicationServiceServicer_to_server(self._replication, server)

    def answer_by(
        self,
        inference: inference_pb2_grpc.InferenceServiceServicer,
        adapters: adapters_pb2_grpc.AdapterServiceServicer,
        about: server_pb2_grpc.ServerServiceServicer,
        replication: replication_pb2_grpc.ReplicationServiceServicer,
    ) -> None:
        """Forward calls to these servicers from now on."""
        self._inference.answer_by(inference)
        self._adapters.answer_by(adapters)
        self._about.answer_by(about)
        self._replication.answer_by(replication)


# -------------------- reflection
# gRPC's reflection under both of its names: ``v1``, which newer clients try first, and
# ``v1alpha``, which grpcio has.
#
# Their messages are the same on the wire, so one service answers both. It describes the
# contract, and the messages of `google.rpc` that errors carry, so that clients can show an
# error's details. Those are imported above, so that reflection finds them whatever else is
# loaded.


_V1: Final = "grpc.reflection.v1"
_V1ALPHA: Final = "grpc.reflection.v1alpha"
_SERVICE: Final = f"{_V1}.ServerReflection"

REFLECTION: Final = (_SERVICE, f"{_V1ALPHA}.ServerReflection")
"""The services' names."""

_FOUND: Final = (error_details_pb2.DESCRIPTOR, status_pb2.DESCRIPTOR)


def enable_reflection(services: Iterable[str], server: Any) -> None:
    """Answer reflection on a server that has not started.

    Args:
        services: full names of the server's other services.
        server: a `grpc.aio.Server`, whose own type its stubs do not give to servicers.
    """
    pool = descriptor_pool.Default()
    _describe_v1(pool)
    for file in _FOUND:
        assert pool.FindFileByName(file.name) is not None
    servicer = reflection.aio.ReflectionServicer([*services, *REFLECTION], pool=pool)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    # The messages of v1alpha: only their names differ, and those are not on the wire.
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": method}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))


def _describe_v1(pool: descriptor_pool.DescriptorPool) -> None:
    """Add v1's own description to ``pool``, unless a library has done so."""
    try:
        pool.FindServiceByName(_SERVICE)
        return
    except KeyError:
        pass
    made = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(made)
    _rename(made)
    pool.AddSerializedFile(made.SerializeToString())


def _rename(made: descriptor_pb2.FileDescriptorProto) -> None:
    """Turn v1alpha's description into v1's, as gRPC publishes it."""
    made.options.Clear()
    made.name = "grpc/reflection/v1/reflection.proto"
    made.package = _V1
    made.options.go_package = "google.golang.org/grpc/reflection/grpc_reflection_v1"
    made.options.java_package = "io.grpc.reflection.v1"
    made.options.java_outer_classname = "ServerReflectionProto"
    made.options.java_multiple_files = True
    old, new = f".{_V1ALPHA}.", f".{_V1}."
    for message in made.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(old, new, 1)
    for service in made.service:
        for method in service.method:
            method.input_type = method.input_type.replace(old, new, 1)
            method.output_type = method.output_type.replace(old, new, 1)
