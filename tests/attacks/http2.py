"""Just enough HTTP/2 to begin a gRPC call and never end it, which no normal client can do."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from types import TracebackType
from typing import Final, Self

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW, _MAX_STREAMS = 4, 3
_FRAME: Final = 16 << 10
_CANCEL: Final = (8).to_bytes(4)


def grpc_message(size: int, *, whole: bool = False) -> bytes:
    """Build a length-prefixed message of ``size`` bytes, without its last byte unless
    ``whole``."""
    return b"\0" + struct.pack(">I", size) + b"x" * (size - (not whole))


class Connection:
    """One HTTP/2 connection. It obeys flow control: data that may not be sent waits.

    Attributes:
        ended: numbers of the streams that the server has ended.
        lost: set when the server has closed the connection.
        max_streams: the server's limit; None if it sets none.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ended: set[int] = set()
        self.lost = asyncio.Event()
        self.max_streams: int | None = None
        self._reader = reader
        self._writer = writer
        self._ready = asyncio.Event()
        self._change = asyncio.Event()
        self._initial = self._window = 65535
        self._windows: dict[int, int] = {}
        self._next = 1
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, address: str) -> Self:
        """Connect, and wait for the server's settings."""
        host, port = address.rsplit(":", 1)
        connection = cls(*await asyncio.open_connection(host, int(port)))
        await connection.begin()
        return connection

    async def begin(self) -> None:
        """Send the preface, and wait for the server's settings."""
        self._writer.write(_PREFACE + _frame(_SETTINGS, 0, 0))
        self._task = asyncio.create_task(self._read())
        await self._ready.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection."""
        if self._task is not None:
            self._task.cancel()
        self._writer.transport.abort()

    def call(self, method: str) -> int:
        """Begin a call; return the number of its stream."""
        stream, self._next = self._next, self._next + 2
        self._windows[stream] = self._initial
        self._writer.write(_frame(_HEADERS, _END_HEADERS, stream, _headers(method)))
        return stream

    async def send(
        self, stream: int, data: bytes, *, patience_s: float, piece: int = _FRAME
    ) -> int:
        """Send as much as the server's window allows; give up after ``patience_s`` without
        progress. Return the number of bytes sent."""
        sent = 0
        while sent < len(data) and stream not in self.ended and not self.lost.is_set():
            allowed = min(self._window, self._windows[stream], piece, len(data) - sent)
            if allowed <= 0:
                try:
                    async with asyncio.timeout(patience_s):
                        await self._change.wait()
                except TimeoutError:
                    break
                continue
            self._writer.write(_frame(_DATA, 0, stream, data[sent : sent + allowed]))
            self._window -= allowed
            self._windows[stream] -= allowed
            sent += allowed
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()
        return sent

    def reset(self, stream: int) -> None:
        """Reset a stream."""
        self._writer.write(_frame(_RESET, 0, stream, _CANCEL))

    def ping(self, times: int = 1) -> None:
        """Send ``times`` pings at once."""
        self._writer.write(_frame(_PING, 0, 0, b"veneer--") * times)

    async def until_ended(self, stream: int) -> None:
        """Wait until the server has ended the stream, or the connection."""
        while stream not in self.ended and not self.lost.is_set():
            await self._change.wait()

    async def _read(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(9)
                size, kind, flags = int.from_bytes(head[:3]), head[3], head[4]
                body = await self._reader.readexactly(size)
                self._take(kind, flags, int.from_bytes(head[5:]), body)
                self._tell()
        self.lost.set()
        self._ready.set()
        self._tell()

    def _tell(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _take(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            for key, value in struct.iter_unpack(">HI", body):
                if key == _MAX_STREAMS:
                    self.max_streams = value
                if key == _INITIAL_WINDOW:
                    for each in self._windows:
                        self._windows[each] += value - self._initial
                    self._initial = value
            self._writer.write(_frame(_SETTINGS, _ACK, 0))
            self._ready.set()
        elif kind == _WINDOW:
            more = int.from_bytes(body)
            if stream:
                self._windows[stream] = self._windows.get(stream, 0) + more
            else:
                self._window += more
        elif kind == _PING and not flags & _ACK:
            self._writer.write(_frame(_PING, _ACK, 0, body))
        elif kind == _RESET or (kind == _HEADERS and flags & _END_STREAM):
            self.ended.add(stream)


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + body


def _headers(method: str) -> bytes:
    """Encode a call's headers as HPACK without tables or Huffman codes."""
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "attack"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    )
    return b"".join(
        b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
        for name, value in fields
    )
