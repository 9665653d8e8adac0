"""The synchronous client's waiting primitives; written by hand, see `aio_transport`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Event
from time import sleep
from typing import Any, TypeVar

import grpc
from veneer_proto.v1 import adapters_pb2

from veneer_client import calls
from veneer_client.failures import starting
from veneer_client.login import Login
from veneer_client.upload import Upload
from veneer_client.upload import prepare as prepared

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


def open_channel(login: Login, keepalive_s: float) -> grpc.Channel:
    """A channel that connects on first use."""
    options = calls.channel_options(keepalive_s)
    if login.credentials is None:
        return grpc.insecure_channel(login.address, options=options)
    return grpc.secure_channel(login.address, login.credentials, options=options)


def begin(
    method: Any, request: Any, *, timeout_s: float | None, metadata: tuple[tuple[str, str], ...]
) -> Any:
    """Begin a unary call; `outcome` waits for its response."""
    with starting():
        return method.future(request, timeout=timeout_s, metadata=metadata)


def outcome(running: Any) -> Any:
    """The response of a call; anything that ends the wait (Ctrl-C) also ends the call."""
    try:
        return running.result()
    except BaseException:
        running.cancel()
        raise


def next_message(stream: Any) -> Any:
    """The next message of a stream; None at its end."""
    return next(stream, None)


def apart(work: Callable[[], Answer]) -> Answer:
    """Run work that reads or writes the disk."""
    return work()


def happens(event: Event, within_s: float) -> bool:
    """Wait for ``event``; False if it was not set in time."""
    return event.wait(within_s)


def messages(upload: Upload) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """`Upload.messages`, which gRPC reads in its own thread."""
    return upload.messages()
