"""Frames between processes: a 4-byte big-endian length, then that many bytes of MessagePack."""

from __future__ import annotations

import socket
import struct
from typing import Final

LENGTH: Final = struct.Struct(">I")
"""Prefix of a frame: the number of bytes that follow."""


def framed(body: bytes) -> bytes:
    """Make a frame of a body."""
    return LENGTH.pack(len(body)) + body


def read_frame(connection: socket.socket) -> bytes | None:
    """The body of the next frame; None if the other side has closed."""
    head = _exactly(connection, LENGTH.size)
    return None if head is None else _exactly(connection, LENGTH.unpack(head)[0])


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    body = bytearray()
    while len(body) < size:
        part = connection.recv(size - len(body))
        if not part:
            return None
        body += part
    return bytes(body)
