"""Where the synchronous client waits for something; written by hand, see `aio_transport`."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event
from time import sleep
from typing import Any

import grpc
from veneer_proto.v1 import adapters_pb2

from veneer_client import calls
from veneer_client.failures import starting
from veneer_client.upload import Upload
from veneer_client.upload import prepare as prepared

__all__ = [
    "Event",
    "begin",
    "happens",
    "messages",
    "next_message",
    "open_channel",
    "outcome",
    "prepared",
    "sleep",
]


def open_channel(address: str, keepalive_s: float) -> grpc.Channel:
    """A channel that connects when it is used."""
    return grpc.insecure_channel(address, options=calls.channel_options(keepalive_s))


def begin(
    method: Any, request: Any, *, timeout_s: float | None, metadata: tuple[tuple[str, str], ...]
) -> Any:
    """Begin a call with one answer; `outcome` waits for it."""
    with starting():
        return method.future(request, timeout=timeout_s, metadata=metadata)


def outcome(running: Any) -> Any:
    """The answer of a call; whatever ends the waiting (Ctrl-C) ends the call too."""
    try:
        return running.result()
    except BaseException:
        running.cancel()
        raise


def next_message(stream: Any) -> Any:
    """The next message of a stream; None at its end."""
    return next(stream, None)


def happens(event: Event, within_s: float) -> bool:
    """Wait for ``event``; False if it was not set in time."""
    return event.wait(within_s)


def messages(upload: Upload) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """`Upload.messages`; gRPC reads them in a thread of its own."""
    return upload.messages()
