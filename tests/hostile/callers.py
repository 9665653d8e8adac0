"""Callers that send raw bytes and return the response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

SECONDS = 60.0
"""Time within which every call must be answered."""


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The ErrorInfo's reason, or ""."""
    trailing: dict[str, Any] = dict(error.trailing_metadata() or ())
    packed = trailing.get("grpc-status-details-bin")
    if packed is None:
        return ""
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(packed).details:
        if detail.Unpack(info):
            return info.reason
    return ""


async def grpc_outcome(
    channel: grpc.aio.Channel,
    path: str,
    messages: Sequence[bytes],
    *,
    kind: str = "unary_unary",
) -> str:
    """``OK``, or the status and reason of a call: ``INVALID_ARGUMENT INVALID_FIELD``.

    Args:
        path: ``/service/method``.
        kind: named like gRPC's handlers; of a stream only the first response is read.
    """
    try:
        if kind == "unary_unary":
            await channel.unary_unary(path)(messages[0], timeout=SECONDS)
        elif kind == "stream_unary":
            await channel.stream_unary(path)(_each(messages), timeout=SECONDS)
        else:
            stream = channel.unary_stream(path)(messages[0], timeout=SECONDS)
            async for _ in stream:
                stream.cancel()
                break
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name} {reason_of(error)}".strip()
    return "OK"


async def _each(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def http_answer(address: str, data: bytes, *, pieces: int = 1 << 20) -> tuple[int, bytes]:
    """Status and all bytes of a server's response until it closes the connection; status 0 if
    it closes without a response. A valid request must have ``Connection: close``."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    answer = b""
    try:
        async with asyncio.timeout(SECONDS):
            sending = asyncio.ensure_future(_send(writer, data, pieces))
            try:
                while piece := await reader.read(1 << 16):
                    answer += piece
            except ConnectionError:
                pass
            finally:
                sending.cancel()
                await asyncio.wait({sending})
    finally:
        writer.close()
    head = answer.split(b" ", 2)
    return (int(head[1]) if len(head) > 1 and head[1].isdigit() else 0), answer


async def _send(writer: asyncio.StreamWriter, data: bytes, pieces: int) -> None:
    try:
        for at in range(0, len(data), pieces):
            writer.write(data[at : at + pieces])
            await writer.drain()
    except ConnectionError:
        pass  # refused before everything was sent
