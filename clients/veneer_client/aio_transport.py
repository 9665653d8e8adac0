"""The asyncio client's waiting primitives; `transport` is the synchronous counterpart.

These two are written by hand, since gRPC's two interfaces, events and threads differ in
more than `await`. The rest of the synchronous client is generated from the files `aio*`.
"""

from __future__ import annotations

import asyncio
from asyncio import Event, sleep
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
from veneer_proto.v1 import adapters_pb2

from veneer_client import calls
from veneer_client.failures import cancelled, starting
from veneer_client.login import Login
from veneer_client.upload import PushOptions, Upload, prepare

__all__ = [
    "Event",
    "apart",
    "begin",
    "happens",
    "messages",
    "next_message",
    "open_channel",
    "outcome",
    "prepared",
    "sleep",
]

Answer = TypeVar("Answer")


def open_channel(login: Login, keepalive_s: float) -> grpc.aio.Channel:
    """A channel that connects on first use."""
    options = calls.channel_options(keepalive_s)
    if login.credentials is None:
        return grpc.aio.insecure_channel(login.address, options=options)
    return grpc.aio.secure_channel(login.address, login.credentials, options=options)


def begin(
    method: Any, request: Any, *, timeout_s: float | None, metadata: tuple[tuple[str, str], ...]
) -> Any:
    """Begin a unary call; `outcome` waits for its response."""
    with starting():
        return method(request, timeout=timeout_s, metadata=metadata)


async def outcome(answer: Awaitable[Answer]) -> Answer:
    """Await a call's response. gRPC raises CancelledError even if the call was cancelled and
    not the task; a task group would swallow that."""
    try:
        return await answer
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise cancelled() from error


async def next_message(stream: Any) -> Any:
    """The next message of a stream; None at its end."""
    message = await outcome(stream.read())
    return None if message is grpc.aio.EOF else message


async def apart(work: Callable[[], Answer]) -> Answer:
    """Run work that reads or writes the disk in a thread. A cancelled caller still waits for
    it to finish."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


async def happens(event: Event, within_s: float) -> bool:
    """Wait for ``event``; False if it was not set in time."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), within_s)
    return event.is_set()


async def prepared(folder: Path, name: str, options: PushOptions) -> Upload:
    """Run `prepare` outside the event loop."""
    preparing = asyncio.ensure_future(asyncio.to_thread(prepare, folder, name, options))
    try:
        return await asyncio.shield(preparing)
    except asyncio.CancelledError:
        preparing.add_done_callback(_close)  # the thread still runs to its end
        raise


def _close(preparing: asyncio.Future[Upload]) -> None:
    if not preparing.cancelled() and preparing.exception() is None:
        preparing.result().close()


async def messages(upload: Upload) -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
    """`Upload.messages`, with file reads outside the event loop."""
    read = upload.messages()
    while (message := await asyncio.to_thread(next, read, None)) is not None:
        yield message
