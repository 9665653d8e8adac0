"""Decodes requests; one that is malformed or holds too much is the caller's error.

If a deserializer raises, gRPC answers UNKNOWN, logs a traceback and counts no metric. So a
deserializer here never raises: it returns the error in the request's place, and the
interceptor raises it inside the call, where every error is handled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from veneer_registry.errors import InvalidField, MalformedMessage, VeneerError

__all__ = [
    "COUNTED_FROM",
    "MAX_FIELDS",
    "MAX_STREAM_FIELDS",
    "count_fields",
    "count_numbers",
    "decoder",
    "holds",
    "last_value",
    "values",
]

MAX_FIELDS: Final = 32_768
"""Fields of one message on the wire, including those of nested messages. Parsing holds the
GIL: 4 MiB of empty messages take 65 ms and 90 MB."""

MAX_STREAM_FIELDS: Final = 512
"""The same for each message of a stream, which is counted and parsed on the event loop: that
takes less than a millisecond. An upload's first message has 300 at most, a chunk has 4."""

COUNTED_FROM: Final = 2 * MAX_FIELDS
"""From this size in bytes on, a message's fields are counted, in a thread, before it is
parsed. A smaller message cannot have too many: a field takes at least two bytes."""

_NOT_LAST: Final = bytes(range(128, 256))
"""Bytes of a varint that are not its last."""

_Parse = Callable[[bytes], Any]


def decoder(
    parse: _Parse,
    check: Callable[[bytes], None] | None = None,
    *,
    most: int = MAX_FIELDS,
) -> _Parse:
    """A deserializer that returns a VeneerError where ``parse`` would raise.

    Args:
        parse: a generated message's ``FromString``.
        check: runs before a message of `COUNTED_FROM` bytes or more is parsed; raises
            VeneerError.
        most: fields that a message may have, including those of nested messages.
    """
    kind: type[Any] = parse.__self__  # type: ignore[attr-defined]  # a class method
    descriptor: Descriptor = kind.DESCRIPTOR

    def decode(data: bytes) -> Any:
        try:
            # A field takes at least two bytes.
            if len(data) > 2 * most and count_fields(data, descriptor, most) > most:
                return InvalidField(
                    f"the {descriptor.name} has more than {most} fields and entries: send "
                    "fewer, and token ids packed",
                    metadata={"field": descriptor.name},
                )
            if check is not None and len(data) >= COUNTED_FROM:
                check(data)
            return parse(data)
        except VeneerError as error:
            return error
        except (DecodeError, RecursionError, ValueError) as error:
            return _malformed(descriptor, error)

    return decode


def _malformed(descriptor: Descriptor, error: Exception) -> VeneerError:
    why = " ".join(str(error).split())[:200]
    return MalformedMessage(
        f"the request is not a valid {descriptor.full_name}: {why}; use this server's "
        ".proto files, and UTF-8 in strings",
        metadata={"message": descriptor.full_name},
    )


def last_value(data: bytes, field: int) -> bytes:
    """The last of `values`, which is the one that parsing keeps; empty if there is none."""
    found = values(data, field)
    return found[-1] if found else b""


def values(data: bytes, field: int) -> list[bytes]:
    """Contents (text, messages or packed numbers) of the top-level fields with this number,
    as far as the message is well-formed. For messages with few fields."""
    at, found = 0, []
    try:
        while at < len(data):
            number, at = _varint(data, at)
            wire_type = number & 7
            if wire_type == 0:
                _, at = _varint(data, at)
            elif wire_type == 1:
                at += 8
            elif wire_type == 2:
                size, at = _varint(data, at)
                if number >> 3 == field:
                    found.append(data[at : at + size])
                at += size
            elif wire_type == 5:
                at += 4
    except IndexError:
        pass
    return found


def holds(data: bytes, field: int) -> bool:
    """Whether a message that is well-formed so far has a number at its top level under this
    field number. For messages with few fields."""
    at, found = 0, False
    try:
        while at < len(data):
            number, at = _varint(data, at)
            wire_type = number & 7
            if wire_type == 0:
                found = found or number >> 3 == field
                _, at = _varint(data, at)
            elif wire_type == 2:
                size, at = _varint(data, at)
                at += size
            else:
                at += {1: 8, 5: 4}.get(wire_type, 0)
    except IndexError:
        pass
    return found


def count_numbers(packed: bytes) -> int:
    """How many numbers a packed field holds, without parsing them."""
    return len(packed.translate(None, _NOT_LAST))


def count_fields(data: bytes, kind: Descriptor, most: int = MAX_FIELDS) -> int:
    """Fields of a message and of its nested messages, or ``most`` + 1 if there are more.

    Reads only tags and lengths and leaves malformed data to the parser. A packed field
    counts as one.
    """
    count = 0
    todo = [(0, len(data), kind)]
    try:
        while todo:
            at, end, kind = todo.pop()
            inside = kind.fields_by_number
            while at < end:
                count += 1
                if count > most:
                    return count
                number, at = _varint(data, at)
                wire_type = number & 7
                if wire_type == 0:
                    while data[at] & 128:
                        at += 1
                    at += 1
                elif wire_type == 1:
                    at += 8
                elif wire_type == 2:
                    size, at = _varint(data, at)
                    field = inside.get(number >> 3)
                    if size and field is not None and field.message_type is not None:
                        todo.append((at, min(at + size, end), field.message_type))
                    at += size
                elif wire_type == 5:
                    at += 4
    except IndexError:  # cut short
        pass
    return count


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and the offset just after it."""
    byte = data[at]
    at += 1
    if byte < 128:
        return byte, at
    number, shift = byte & 127, 7
    while shift < 70:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
    raise IndexError("a varint of more than ten bytes")
