"""Hostile protobuf: for every field of a request, values that no honest client sends.

Everything is written as wire bytes, since a protobuf library refuses most of it
on the caller's side.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from veneer_proto.v1 import adapters_pb2, inference_pb2, server_pb2

__all__ = ["Case", "cases", "length_delimited", "methods", "tag", "varint"]

MANY: Final = 10_000
LONG: Final = 100_000

_STRINGS: Final = (
    b"",
    "é".encode(),
    b"\x00",
    b"a\nb",
    b"../../etc/passwd",
    b"@",
    b"a@b",
    b"/",
    b"a/b/c",
    b"x" * LONG,
    "🦆".encode() * 5000,
    b"\xed\xa0\x80",  # half of a surrogate pair
    b"\xff\xfe",
    b"\xc3",
)
_NUMBERS: Final = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
_DOUBLES: Final = (0.0, -0.0, -1.0, 1e308, math.nan, math.inf, -math.inf)

_VARINTS: Final = frozenset(
    {
        FieldDescriptor.TYPE_BOOL,
        FieldDescriptor.TYPE_ENUM,
        FieldDescriptor.TYPE_INT32,
        FieldDescriptor.TYPE_INT64,
        FieldDescriptor.TYPE_UINT32,
        FieldDescriptor.TYPE_UINT64,
    }
)


@dataclass(frozen=True, slots=True)
class Case:
    """A request: what is hostile about it, and its bytes."""

    name: str
    data: bytes


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def tag(field: int, wire_type: int) -> bytes:
    return varint(field << 3 | wire_type)


def length_delimited(field: int, body: bytes) -> bytes:
    return tag(field, 2) + varint(len(body)) + body


def methods() -> Iterator[MethodDescriptor]:
    """Every method of our services."""
    for module in (inference_pb2, adapters_pb2, server_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from service.methods


def cases(message: Descriptor, base: bytes = b"") -> Iterator[Case]:
    """Hostile forms of a request.

    Args:
        base: a valid request, to which each hostile field is appended.
    """
    yield Case("empty", b"")
    yield Case("no protobuf", b"\xff" * 40)
    yield Case("cut short", (base or b"\x0a") + b"\x0a\x7f")
    yield Case("unknown field", base + length_delimited(1000, b"x" * 1000))
    yield Case("open group", base + tag(1000, 3))
    yield Case("reserved wire type", base + tag(1, 7))
    yield Case("field 0", base + b"\x00\x00")
    yield Case("deep groups", base + tag(1000, 3) * 20_000)
    for path, data in _message(message, depth=4):
        yield Case(path, base + data)
    yield Case("all at once", base + b"".join(_one_of_each(message)))


def _message(message: Descriptor, depth: int) -> Iterator[tuple[str, bytes]]:
    for field in message.fields:
        for what, data in _field(field, depth):
            yield f"{field.name}{what}", data


def _field(field: FieldDescriptor, depth: int) -> Iterator[tuple[str, bytes]]:
    number = field.number
    for wrong in (0, 1, 2, 5):
        yield f": wire type {wrong}", tag(number, wrong) + b"\x08" * 8
    for at, one in enumerate(_values(field)):
        yield f"#{at}", one
    if field.is_repeated:
        if _is_map(field):
            kind = field.message_type
            assert kind is not None
            key = kind.fields_by_name["key"].type
            entries = (
                varint(n) if key in _VARINTS else _sized(str(n).encode()) for n in range(MANY)
            )
            head = b"\x08" if key in _VARINTS else b"\x0a"
            yield (
                f"[{MANY}]",
                b"".join(length_delimited(number, head + entry) for entry in entries),
            )
        else:
            one = next(iter(_values(field)))
            yield f"[{MANY}]", one * MANY
    if field.message_type is not None and depth:
        for what, inner in _message(field.message_type, depth - 1):
            yield f".{what}", length_delimited(number, inner)


def _sized(text: bytes) -> bytes:
    return varint(len(text)) + text


def _values(field: FieldDescriptor) -> Iterator[bytes]:
    number, kind = field.number, field.type
    if kind in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        yield from (length_delimited(number, text) for text in _STRINGS)
    elif kind == FieldDescriptor.TYPE_DOUBLE:
        yield from (tag(number, 1) + struct.pack("<d", value) for value in _DOUBLES)
    elif kind == FieldDescriptor.TYPE_FLOAT:
        yield from (tag(number, 5) + struct.pack("<f", v) for v in (-1.0, math.nan, math.inf))
    elif kind in _VARINTS:
        yield from (tag(number, 0) + varint(value) for value in _NUMBERS)
        yield tag(number, 0) + b"\xff" * 11  # longer than any number
    elif kind == FieldDescriptor.TYPE_MESSAGE:
        yield length_delimited(number, b"")
        yield length_delimited(number, b"") * 2
    else:
        raise NotImplementedError(f"{field.full_name} has a type that no case knows: add it")


def _is_map(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and bool(kind.GetOptions().map_entry)


def _one_of_each(message: Descriptor) -> Iterator[bytes]:
    """Every field once, including all members of every oneof."""
    for field in message.fields:
        yield next(iter(_values(field)))


__all__.append("good")


def good(method: MethodDescriptor, adapter: str) -> Any:
    """A valid request of this method if that is cheap; else an empty message."""
    kind = method.input_type.name
    match kind:
        case "GenerateRequest":
            request = inference_pb2.GenerateRequest(prompt="Hello")
            request.stopping.max_tokens = 2
            return request
        case "GetAdapterRequest" | "UpdateAdapterRequest" | "ActivateAdapterRequest":
            return getattr(adapters_pb2, kind)(name=adapter)
        case "EvictAdapterRequest":
            return adapters_pb2.EvictAdapterRequest(name=adapter)
        case "DeleteAdapterRequest":
            return adapters_pb2.DeleteAdapterRequest(name=f"{adapter}-gone")
        case "SetAliasRequest":
            return adapters_pb2.SetAliasRequest(alias=f"{adapter}/prod", revision="0" * 12)
        case "SelfTestRequest":  # without a name it would start a real test
            return adapters_pb2.SelfTestRequest(adapters=[f"{adapter}-gone"])
        case "UploadAdapterRequest" | "GetUploadRequest":
            spec = adapters_pb2.UploadSpec(name="hostile")
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                spec.files.add(name=name, size=8, sha256="0" * 64)
            return getattr(adapters_pb2, kind)(spec=spec)
        case "PlanCapacityRequest":
            return server_pb2.PlanCapacityRequest(adapters=1)
    module = {"veneer.v1.AdapterService": adapters_pb2, "veneer.v1.ServerService": server_pb2}
    return getattr(module[method.containing_service.full_name], kind)()
