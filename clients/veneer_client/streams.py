"""Streams as iterators, for both clients: read, retried, cancelled.

A stream that has told something of an answer is never started again; one that has
not, or that can go on where it was (a watch), is, when the server says when.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.errors import InternalError, VeneerError

from veneer_client import convert, convert_admin
from veneer_client.failures import Attempts, cancelled, outcome, starting
from veneer_client.records import AdapterEvent
from veneer_client.types import Chunk, GenerationEnd

__all__ = [
    "AdapterWatch",
    "AsyncAdapterWatch",
    "AsyncGenerationStream",
    "GenerationStream",
    "StreamStart",
    "WatchReader",
]

Item = TypeVar("Item")
Read = TypeVar("Read", covariant=True)


class _Reader(Protocol[Read]):
    @property
    def started(self) -> bool: ...
    def read(self, message: Any) -> Read | None: ...
    def check_ended(self) -> None: ...


class GenerationReader:
    """What a generate stream has said so far, whichever client reads it."""

    def __init__(self) -> None:
        self.started = False
        self.end: GenerationEnd | None = None

    def read(self, message: inference_pb2.GenerateStreamResponse) -> Chunk | None:
        """The message's piece of the answer; None where it only carries the end."""
        self.started = True
        self.end = convert.generation_end(message) or self.end
        chunk = convert.chunk(message)
        empty = not (chunk.text or chunk.token_ids or chunk.prompt_logprobs)
        return None if self.end and empty and chunk.finish_reason is None else chunk

    def check_ended(self) -> None:
        """Raise `InternalError` where the stream stopped without its end."""
        if self.end is None:
            raise InternalError(
                "the stream stopped without a finish reason: is there a proxy between "
                "that cuts streams? If not, report it with the server's log"
            )

    def require_end(self) -> GenerationEnd:
        """The end; RuntimeError while the stream has not been read to it."""
        if self.end is None:
            raise RuntimeError(
                "the stream has not ended: read it to its end before asking for `final`"
            )
        return self.end


class WatchReader:
    """Where a watch is, so that it can be taken up again.

    Attributes:
        sequence: the last one seen.
    """

    started = False
    """A watch goes on after an interruption, however much it has told."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence

    def request(self) -> adapters_pb2.WatchAdaptersRequest:
        """Asks for what comes after the last event seen."""
        return adapters_pb2.WatchAdaptersRequest(since_sequence=self.sequence)

    def read(self, message: adapters_pb2.WatchAdaptersResponse) -> AdapterEvent:
        """The message as a record."""
        self.sequence = message.sequence or self.sequence
        return convert_admin.adapter_event(message)

    def check_ended(self) -> None:
        """Raise `InternalError`: a watch ends only by an error, or by its reader."""
        raise InternalError(
            "the watch stopped without a reason: is there a proxy between that cuts "
            "streams? Watch again from the last sequence number"
        )


@dataclass(frozen=True, slots=True)
class StreamStart:
    """How a stream begins, and begins again.

    Attributes:
        call: starts it; takes the seconds that are left, or None.
        to_failure: the typed error of a failed call.
    """

    call: Callable[[float | None], Any]
    attempts: Attempts
    to_failure: Callable[[Any], VeneerError]

    def begin(self) -> Any:
        """The call, begun."""
        with starting():
            return self.call(self.attempts.remaining_s())


class _Stream(Generic[Item]):
    def __init__(self, start: StreamStart, reader: _Reader[Item]) -> None:
        self._start = start
        self._reader = reader
        self._cancelled = threading.Event()
        self._call = start.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        attempts = self._start.attempts
        while True:
            try:
                item = self._reader.read(next(self._call))
                attempts.succeeded()
            except StopIteration:
                self._reader.check_ended()
                raise
            except grpc.RpcError as error:
                failure = self._start.to_failure(error)
                wait = None if self._reader.started else attempts.wait_s(failure)
                if wait is None:
                    raise failure from error
                if self._cancelled.wait(wait):
                    raise cancelled() from error
                self._call = self._start.begin()
                if self._cancelled.is_set():  # `cancel` may have met the call before
                    self._call.cancel()
            except BaseException:  # Ctrl-C: nobody reads on
                self.cancel()
                raise
            else:
                if item is not None:
                    return item

    def cancel(self) -> None:
        """End the call, from any thread; does nothing when it has ended."""
        self._cancelled.set()
        self._call.cancel()


class _AsyncStream(Generic[Item]):
    def __init__(self, start: StreamStart, reader: _Reader[Item]) -> None:
        self._start = start
        self._reader = reader
        self._cancelled = asyncio.Event()
        self._call = start.begin()

    def __del__(self) -> None:
        # Left early, without `async with`: the call's own tasks refer to it, so it would
        # run on until some later garbage collection.
        call = getattr(self, "_call", None)
        if call is not None:
            call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        attempts = self._start.attempts
        while True:
            try:
                message = await outcome(self._call.read())
            except grpc.RpcError as error:
                failure = self._start.to_failure(error)
                wait = None if self._reader.started else attempts.wait_s(failure)
                if wait is None:
                    raise failure from error
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._cancelled.wait(), wait)
                if self._cancelled.is_set():
                    raise cancelled() from error
                self._call = self._start.begin()
                continue
            if message is grpc.aio.EOF:
                self._reader.check_ended()
                raise StopAsyncIteration
            item = self._reader.read(message)
            attempts.succeeded()
            if item is not None:
                return item

    def cancel(self) -> None:
        """End the call; does nothing when it has ended."""
        self._cancelled.set()
        self._call.cancel()


class GenerationStream(_Stream[Chunk]):
    """The chunks of one answer, as they come.

    Iterate once. Leaving the loop early ends the call when the stream is forgotten, at
    once with ``with`` or `cancel`; the server stops the work within a step.
    """

    def __init__(self, start: StreamStart) -> None:
        self._answer = GenerationReader()
        super().__init__(start, self._answer)

    @property
    def final(self) -> GenerationEnd:
        """Finish reason, usage and provenance; after the last chunk."""
        return self._answer.require_end()


class AsyncGenerationStream(_AsyncStream[Chunk]):
    """The chunks of one answer, as they come.

    Iterate once. Leaving the loop early ends the call when the stream is forgotten, at
    once with ``async with`` or `cancel`; the server stops the work within a step.
    """

    def __init__(self, start: StreamStart) -> None:
        self._answer = GenerationReader()
        super().__init__(start, self._answer)

    @property
    def final(self) -> GenerationEnd:
        """Finish reason, usage and provenance; after the last chunk."""
        return self._answer.require_end()


class AdapterWatch(_Stream[AdapterEvent]):
    """Events of adapters, without end, over interruptions; see `Client.watch`."""

    def __init__(self, start: StreamStart, reader: WatchReader) -> None:
        self._place = reader
        super().__init__(start, reader)

    @property
    def sequence(self) -> int:
        """Where another watch could go on."""
        return self._place.sequence


class AsyncAdapterWatch(_AsyncStream[AdapterEvent]):
    """Events of adapters, without end, over interruptions; see `Client.watch`."""

    def __init__(self, start: StreamStart, reader: WatchReader) -> None:
        self._place = reader
        super().__init__(start, reader)

    @property
    def sequence(self) -> int:
        """Where another watch could go on."""
        return self._place.sequence
