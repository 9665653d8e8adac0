"""Calls gRPC methods by name, with JSON in and out: for those without a typed client.

Needs no generated code: the server describes its methods (gRPC reflection).
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import MethodDescriptor
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from veneer_registry.errors import InvalidField

from veneer_client import calls
from veneer_client.actor import actor_metadata
from veneer_client.failures import to_error
from veneer_client.login import find_login
from veneer_client.transport import open_channel

__all__ = ["Method", "ReflectionClient"]


@dataclass(frozen=True, slots=True)
class Method:
    """A method that the server describes; ``name`` is ``package.Service/Method``."""

    name: str
    request: str
    answer: str
    client_streaming: bool
    server_streaming: bool


class _Metadata(grpc.StreamStreamClientInterceptor):
    """Adds metadata to reflection's own call, which takes none."""

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(_Details(details, self._metadata), requests)


class _Details(grpc.ClientCallDetails):
    """A call's details with other metadata."""

    def __init__(self, details: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self.method = details.method
        self.timeout = details.timeout
        self.metadata = metadata
        self.credentials = details.credentials
        self.wait_for_ready = details.wait_for_ready
        self.compression = details.compression


class ReflectionClient:
    """Lists a server's methods and calls them; use it in a ``with``."""

    def __init__(self, address: str | None) -> None:
        login = find_login(address)
        self.address = login.address
        self._metadata = (*actor_metadata(None), *login.metadata)
        self._channel = grpc.intercept_channel(
            open_channel(login, calls.KEEPALIVE_S), _Metadata(login.metadata)
        )
        self._database = ProtoReflectionDescriptorDatabase(self._channel)
        self._pool = descriptor_pool.DescriptorPool(self._database)

    def __enter__(self) -> ReflectionClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def methods(self) -> tuple[Method, ...]:
        """All methods, by service and name.

        Raises:
            ServerUnreachable: no server answers.
            Unimplemented: the server has no reflection.
        """
        return tuple(
            Method(
                name=f"{service}/{method.name}",
                request=method.input_type.full_name,
                answer=method.output_type.full_name,
                client_streaming=method.client_streaming,
                server_streaming=method.server_streaming,
            )
            for service in self._services()
            for method in self._service(service).methods
        )

    def call(
        self, method: str, request: str, *, timeout_s: float | None = None
    ) -> Iterator[str]:
        """Call ``method`` with a JSON request; yields each answer as JSON.

        Args:
            method: ``package.Service/Method``, or ``Method`` if only one service has it.
            request: the request message as JSON, "" for an empty one.

        Raises:
            InvalidField: no such method, it streams requests, or the JSON does not
                fit its request.
            VeneerError: the server's error.
        """
        service, found = self._find(method)
        if found.client_streaming:
            raise InvalidField(
                f"{found.name} takes a stream of requests, which JSON on a command line "
                "cannot give: to upload an adapter, use `veneer adapter push`",
                metadata={"field": "method"},
            )
        message = self._message(found, request)
        answer_class = message_factory.GetMessageClass(found.output_type)
        open_call = (
            self._channel.unary_stream if found.server_streaming else self._channel.unary_unary
        )
        invoke: Any = open_call(
            f"/{service}/{found.name}",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=answer_class.FromString,
        )
        try:
            answers = invoke(message, timeout=timeout_s, metadata=self._metadata)
            for answer in answers if found.server_streaming else (answers,):
                yield json_format.MessageToJson(
                    answer,
                    preserving_proto_field_name=True,
                    descriptor_pool=self._pool,
                    indent=None if found.server_streaming else 2,
                    ensure_ascii=False,
                )
        except grpc.RpcError as error:
            raise to_error(error, self.address, timeout_s=timeout_s) from error

    def _services(self) -> tuple[str, ...]:
        try:
            return tuple(sorted(self._database.get_services()))
        except grpc.RpcError as error:
            raise to_error(error, self.address, timeout_s=None) from error

    def _service(self, name: str) -> Any:
        return self._pool.FindServiceByName(name)

    def _find(self, method: str) -> tuple[str, MethodDescriptor]:
        wanted_service, _, wanted = method.lstrip("/").rpartition("/")
        if not wanted_service and wanted.count("."):  # package.Service.Method
            wanted_service, _, wanted = wanted.rpartition(".")
        found = [
            (service, candidate)
            for service in self._services()
            if wanted_service in ("", service)
            for candidate in self._service(service).methods
            if candidate.name == wanted
        ]
        if len(found) == 1:
            return found[0]
        if found:
            options = ", ".join(f"{service}/{m.name}" for service, m in found)
            why = f"several services have a method {method!r}: name one of {options}"
        else:
            why = f"the server has no method {method!r}: `veneer call` lists them"
        raise InvalidField(why, metadata={"field": "method"})

    def _message(self, method: MethodDescriptor, request: str) -> Any:
        message = message_factory.GetMessageClass(method.input_type)()
        name = method.input_type.full_name
        try:
            _check(json.loads(request or "{}"), method.input_type, "")
            json_format.Parse(request or "{}", message, descriptor_pool=self._pool)
        except json.JSONDecodeError as error:
            raise _misfit(f"the JSON does not fit {name}: it is not JSON: {error}") from error
        except RecursionError as error:
            raise _misfit("the request is nested too deeply") from error
        except _Misfit as error:
            raise _misfit(f"the JSON does not fit {name}: {error}") from error
        except json_format.ParseError as error:
            why = str(error).partition("\n")[0].rstrip(".")
            raise _misfit(f"the JSON does not fit {name}: {why}") from error
        return message


class _Misfit(ValueError):
    """A part of a request does not fit; the message says which, and what would."""


def _misfit(why: str) -> InvalidField:
    return InvalidField(why, metadata={"field": "request"})


def _check(value: object, message: Any, path: str) -> None:
    """Raise `_Misfit` for the first part that does not have its field's type. The error of
    `json_format` would only name the Python operation that failed on it."""
    if message.full_name.startswith("google.protobuf."):
        return  # timestamps and the like have JSON forms of their own
    if not isinstance(value, dict):
        raise _Misfit(f"{path or 'it'}: give an object, {{...}}")
    names = {field.json_name: field for field in message.fields} | dict(message.fields_by_name)
    for name, part in value.items():
        field = names.get(name)
        at = f"{path}.{name}" if path else name
        if field is None:
            near = difflib.get_close_matches(name, message.fields_by_name, n=1)
            known = ", ".join(message.fields_by_name) or "none"
            dot = f"{path}." if path else ""
            hint = f"; did you mean {dot}{near[0]}?" if near else ""
            raise _Misfit(f"there is no field {at}; its fields: {known}{hint}")
        if part is not None:
            _check_field(part, field, at)


def _check_field(value: Any, field: Any, path: str) -> None:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        if not isinstance(value, dict):
            raise _Misfit(f"{path}: give an object, {{...}}")
        for key, part in value.items():
            _check_one(key, entry.fields_by_name["key"], f"the key {key!r} of {path}")
            _check_one(part, entry.fields_by_name["value"], f"{path}.{key}")
    elif field.is_repeated:
        if not isinstance(value, list):
            raise _Misfit(f"{path}: give a list, [...]")
        for number, part in enumerate(value):
            _check_one(part, field, f"{path}[{number}]")
    else:
        _check_one(value, field, path)


def _check_one(value: Any, field: Any, path: str) -> None:
    match field.cpp_type:
        case field.CPPTYPE_MESSAGE:
            _check(value, field.message_type, path)
        case field.CPPTYPE_STRING:
            if not isinstance(value, str):
                raise _Misfit(f'{path}: give a string, "..."')
        case field.CPPTYPE_ENUM:
            names = [each.name for each in field.enum_type.values]
            named = isinstance(value, str) and (
                value in names or value.removeprefix("-").isdigit()
            )
            if not named and not isinstance(value, int):
                raise _Misfit(f"{path}: give a string, one of {', '.join(names)}")
        case field.CPPTYPE_BOOL:
            if not isinstance(value, bool) and value not in ("true", "false"):
                raise _Misfit(f"{path}: give true or false")
        case _:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if isinstance(value, str):  # JSON has no other form for large numbers and keys
                with contextlib.suppress(ValueError):
                    float(value)
                    number = True
            if not number:
                raise _Misfit(f"{path}: give a number")
