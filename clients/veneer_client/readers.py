"""How both clients start a stream, and how they read its messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.errors import InternalError, VeneerError

from veneer_client import convert, convert_admin
from veneer_client.failures import Attempts, starting
from veneer_client.records import AdapterEvent
from veneer_client.types import Chunk, GenerationEnd

__all__ = ["GenerationReader", "StreamReader", "StreamStart", "WatchReader"]

Read = TypeVar("Read", covariant=True)


class StreamReader(Protocol[Read]):
    """Reads the messages of one stream."""

    @property
    def started(self) -> bool: ...
    def read(self, message: Any) -> Read | None: ...
    def check_ended(self) -> None: ...


class GenerationReader:
    """Reads a generate stream and keeps its end."""

    def __init__(self) -> None:
        self.started = False
        self.end: GenerationEnd | None = None

    def read(self, message: inference_pb2.GenerateStreamResponse) -> Chunk | None:
        """The message's piece of the answer; None if it only carries the end."""
        self.started = True
        self.end = convert.generation_end(message) or self.end
        chunk = convert.chunk(message)
        said = chunk.text or chunk.token_ids or chunk.prompt_logprobs or chunk.tool_calls
        return None if self.end and not said and chunk.finish_reason is None else chunk

    def check_ended(self) -> None:
        """Raise `InternalError` if the stream stopped without its end."""
        if self.end is None:
            raise InternalError(
                "the stream ended without a finish reason: does a proxy in between cut off "
                "streams? If not, report this with the server's log",
                metadata={"cause": "stream_cut"},
            )

    def require_end(self) -> GenerationEnd:
        """The end. RuntimeError if the stream has not been read to its end."""
        if self.end is None:
            raise RuntimeError(
                "the stream has not ended: read it to the end before using `final`"
            )
        return self.end


class WatchReader:
    """Reads a watch and keeps its position, so that it can resume.

    Attributes:
        sequence: sequence number of the last event seen.
    """

    started = False
    """A watch can resume after an interruption, however much it has yielded."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence

    def request(self) -> adapters_pb2.WatchAdaptersRequest:
        """Request the events after the last one seen."""
        return adapters_pb2.WatchAdaptersRequest(since_sequence=self.sequence)

    def read(self, message: adapters_pb2.WatchAdaptersResponse) -> AdapterEvent:
        """The message as a record."""
        self.sequence = message.sequence or self.sequence
        return convert_admin.adapter_event(message)

    def check_ended(self) -> None:
        """Raise `InternalError`: a watch ends only by an error, or by its reader."""
        raise InternalError(
            "the watch ended without a reason: does a proxy in between cut off streams? "
            "Watch again from the last sequence number",
            metadata={"cause": "stream_cut"},
        )


@dataclass(frozen=True, slots=True)
class StreamStart:
    """How to start and restart a stream.

    Attributes:
        call: starts the stream; takes the seconds left until the deadline, or None.
        to_failure: converts the error of a failed call.
    """

    call: Callable[[float | None], Any]
    attempts: Attempts
    to_failure: Callable[[Any], VeneerError]

    def begin(self) -> Any:
        """Start the call."""
        with starting():
            return self.call(self.attempts.remaining_s())
