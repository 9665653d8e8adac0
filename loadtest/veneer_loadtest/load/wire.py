"""Messages between the load generator and its worker processes.

Messages are MessagePack, each preceded by its length in four bytes, over the worker's standard
input and output.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from veneer_loadtest.load.records import Record
from veneer_loadtest.load.spec import LoadSpec
from veneer_loadtest.load.targets import TargetSpec


class WorkerMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages."""


class WorkerSetup(WorkerMessage, frozen=True):
    """First message: send every ``of``-th request of the load, from number ``worker`` on."""

    load: LoadSpec
    target: TargetSpec
    worker: int
    of: int
    timeout_s: float


class BeginLoad(WorkerMessage, frozen=True):
    """Start the load at time ``at`` of ``time.monotonic()``, a clock that processes share."""

    at: float


class StopLoad(WorkerMessage, frozen=True):
    """Send no more requests, cancel the running ones, and report the rest."""


ToWorker = WorkerSetup | BeginLoad | StopLoad


class WorkerReady(WorkerMessage, frozen=True):
    """The worker can send its first request."""


class LoadProgress(WorkerMessage, frozen=True):
    """Requests that ended since the last report; ``sent`` counts from the start."""

    sent: int
    records: list[Record]


class WorkerDone(WorkerMessage, frozen=True):
    """The last message. ``cpu_s``: since `BeginLoad`; ``sent``: in total."""

    sent: int
    cpu_s: float


class WorkerFailed(WorkerMessage, frozen=True):
    """The last message of a worker that cannot continue."""

    message: str
    metadata: dict[str, str]


FromWorker = WorkerReady | LoadProgress | WorkerDone | WorkerFailed

_LENGTH_BYTES: Final = 4
_encoder: Final = msgspec.msgpack.Encoder()
_to_worker: Final[msgspec.msgpack.Decoder[ToWorker]] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: Final[msgspec.msgpack.Decoder[FromWorker]] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    """Encode a message as a frame."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


async def read_frame(stream: asyncio.StreamReader) -> bytes | None:
    """Read the next frame's body; return None if the other side has closed the pipe."""
    try:
        size = await stream.readexactly(_LENGTH_BYTES)
        return await stream.readexactly(int.from_bytes(size, "little"))
    except asyncio.IncompleteReadError:
        return None


def decode_to_worker(body: bytes) -> ToWorker:
    """Decode a frame's body."""
    return _to_worker.decode(body)


def decode_from_worker(body: bytes) -> FromWorker:
    """Decode a frame's body."""
    return _from_worker.decode(body)
