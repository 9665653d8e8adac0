"""gRPC's reflection under both of its names: ``v1``, which newer clients ask first, and
``v1alpha``, which grpcio has.

Their messages are the same on the wire, so one service answers both. It finds the contract, and
the messages of `google.rpc` that errors carry, with which clients show an error's details.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool

# Errors carry its messages: imported so that reflection finds them whatever else is loaded.
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

__all__ = ["REFLECTION", "enable_reflection"]

_V1: Final = "grpc.reflection.v1"
_V1ALPHA: Final = "grpc.reflection.v1alpha"
_SERVICE: Final = f"{_V1}.ServerReflection"

REFLECTION: Final = (_SERVICE, f"{_V1ALPHA}.ServerReflection")
"""The services' names."""

_FOUND: Final = (error_details_pb2.DESCRIPTOR, status_pb2.DESCRIPTOR)


def enable_reflection(services: Iterable[str], server: Any) -> None:
    """Answer reflection on a server that has not started.

    Args:
        services: full names of the others that it has.
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
    """From v1alpha's description to v1's, as gRPC publishes it."""
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
