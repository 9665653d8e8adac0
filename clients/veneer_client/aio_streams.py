"""Streams as iterators, with retries and cancellation.

A stream that has yielded part of an answer is never retried. One that has not, or that can
resume (a watch), is retried if the server says when.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Generic, Self, TypeVar

import grpc

from veneer_client.aio_transport import Event, happens, next_message
from veneer_client.failures import cancelled
from veneer_client.readers import GenerationReader, StreamReader, StreamStart, WatchReader
from veneer_client.records import AdapterEvent
from veneer_client.types import Chunk, GenerationEnd

__all__ = ["AsyncAdapterWatch", "AsyncGenerationStream"]

Item = TypeVar("Item")


class _AsyncStream(Generic[Item]):
    def __init__(self, start: StreamStart, reader: StreamReader[Item]) -> None:
        self._start = start
        self._reader = reader
        self._cancelled = Event()
        self._call = start.begin()

    # begin: async only
    def __del__(self) -> None:
        # The loop was left early, without `async with`: the call's own tasks refer to the
        # call, so it would run until some later garbage collection.
        call = getattr(self, "_call", None)
        if call is not None:
            call.cancel()

    # end: async only
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
                message = await next_message(self._call)
                if message is not None:
                    item = self._reader.read(message)
                    attempts.succeeded()
            except grpc.RpcError as error:
                failure = self._start.to_failure(error)
                wait = None if self._reader.started else attempts.wait_s(failure)
                if wait is None:
                    raise failure from error
                if await happens(self._cancelled, wait):
                    raise cancelled() from error
                self._call = self._start.begin()
                if self._cancelled.is_set():  # another thread may have cancelled the old call
                    self._call.cancel()
            except BaseException:  # Ctrl-C, or the task was cancelled: there is no reader left
                self.cancel()
                raise
            else:
                if message is None:
                    self._reader.check_ended()
                    raise StopAsyncIteration
                if item is not None:
                    return item

    def cancel(self) -> None:
        """End the call; does nothing if it has ended."""
        self._cancelled.set()
        self._call.cancel()


class AsyncGenerationStream(_AsyncStream[Chunk]):
    """The chunks of one answer, as they arrive.

    Iterate once. Leaving the loop early ends the call when the stream is garbage-collected,
    or at once with ``async with`` or `cancel`; the server stops the work within a step.
    """

    def __init__(self, start: StreamStart) -> None:
        self._answer = GenerationReader()
        super().__init__(start, self._answer)

    @property
    def final(self) -> GenerationEnd:
        """Finish reason, usage and provenance; available after the last chunk."""
        return self._answer.require_end()


class AsyncAdapterWatch(_AsyncStream[AdapterEvent]):
    """An endless stream of adapter events that survives interruptions; see
    `AsyncClient.watch`."""

    def __init__(self, start: StreamStart, reader: WatchReader) -> None:
        self._place = reader
        super().__init__(start, reader)

    @property
    def sequence(self) -> int:
        """The sequence number from which another watch can resume."""
        return self._place.sequence
