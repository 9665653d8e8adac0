"""The client for asyncio; method for method the same as `veneer_client.client`.

What a call is, how its answer is read and when it is repeated is shared
(`calls`, `convert`, `failures`, `upload`); here is only how it is awaited.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.adapter import Tier
from veneer_registry.errors import VeneerError

from veneer_client import calls
from veneer_client.convert import generate_request
from veneer_client.failures import Attempts, RetryPolicy, to_error
from veneer_client.types import (
    AdapterDetails,
    AdapterInfo,
    Chunk,
    Eviction,
    EvictMode,
    GenerateOptions,
    Generation,
    GenerationEnd,
    Prompt,
    Pushed,
    ServerInfo,
    ServingStatus,
)
from veneer_client.upload import Progress, PushOptions, Upload, prepare

__all__ = ["AsyncClient", "AsyncGenerationStream"]

Answer = TypeVar("Answer")
Result = TypeVar("Result")


class AsyncClient:
    """A connection to one Veneer server; close it, or use it in an ``async with``.

    Make it inside the event loop that uses it. Every method raises a `VeneerError`:
    the server's own, or `ServerUnreachable` where nobody answers. Calls that are
    safe to repeat are repeated when the server says when (see `RetryPolicy`).
    Cancelling the task cancels the call.
    """

    def __init__(
        self,
        address: str = calls.DEFAULT_ADDRESS,
        *,
        timeout_s: float = 30.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
    ) -> None:
        """Args:
        address: ``HOST:PORT``.
        timeout_s: deadline of every call but generate and push, which have their own.
        """
        self.address = address
        self._timeout_s = timeout_s
        self._retry = retry
        self._channel = grpc.aio.insecure_channel(address, options=calls.CHANNEL_OPTIONS)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel running calls and close the connection."""
        await self._channel.close()

    # ------------------------------------------------------------------- inference

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate, and return the whole answer."""
        return await self._perform(calls.generate(prompt, options), options.get("timeout_s"))

    def generate_stream(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """Generate; ``async for`` over the result for `Chunk`s, then read its ``final``."""
        request = generate_request(prompt, options)
        start = self._channel.unary_stream(
            calls.GENERATE_STREAM,
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.GenerateStreamResponse.FromString,
        )
        timeout_s = options.get("timeout_s")
        return AsyncGenerationStream(
            lambda left_s: start(request, timeout=left_s),
            Attempts(self._retry, repeatable=True, timeout_s=timeout_s),
            lambda error: to_error(error, self.address, timeout_s=timeout_s),
        )

    # -------------------------------------------------------------------- adapters

    async def push(
        self,
        folder: Path,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
        activate: bool = False,
        allow_replace: bool = False,
        progress: Progress = lambda sent, total: None,
        timeout_s: float | None = None,
    ) -> Pushed:
        """Check an adapter folder locally, then publish it; see `Client.push`."""
        options = PushOptions(labels or {}, validate_only, activate, allow_replace)
        upload = await asyncio.to_thread(prepare, folder, name, options, progress)
        send = self._channel.stream_unary(
            calls.UPLOAD,
            request_serializer=adapters_pb2.UploadAdapterRequest.SerializeToString,
            response_deserializer=adapters_pb2.UploadAdapterResponse.FromString,
        )
        # Content decides the outcome, so sending it twice is sending it once.
        attempts = Attempts(self._retry, repeatable=True, timeout_s=timeout_s)
        while True:
            try:
                answer = await send(_messages(upload), timeout=attempts.remaining_s())
                return upload.result(answer)
            except grpc.RpcError as error:
                failure = upload.failure or to_error(error, self.address, timeout_s=timeout_s)
                await _sleep_or_raise(attempts, failure, error)

    async def get(self, name: str) -> AdapterDetails:
        """One adapter, by ``name`` or ``name@revision``, and its revisions."""
        return await self._ask(calls.get(name))

    async def list(
        self,
        *,
        name_prefix: str = "",
        tier: Tier | None = None,
        labels: Mapping[str, str] | None = None,
        page_size: int = 100,
    ) -> AsyncIterator[AdapterInfo]:
        """Current revisions in name order; fetches pages as they are needed."""
        token = ""
        while True:
            page = await self._ask(
                calls.page(
                    token,
                    page_size=page_size,
                    name_prefix=name_prefix,
                    tier=tier,
                    labels=labels or {},
                )
            )
            for adapter in page.adapters:
                yield adapter
            token = page.next_token
            if not token:
                return

    async def activate(
        self, name: str, *, tier: Tier = Tier.DEVICE, pin: bool = False
    ) -> AdapterInfo:
        """Bring an adapter to HOST or DEVICE, and keep it there if ``pin``."""
        return await self._ask(calls.activate(name, tier=tier, pin=pin))

    async def evict(
        self, name: str, *, mode: EvictMode = EvictMode.DRAIN, unpin: bool = False
    ) -> Eviction:
        """Free an adapter's memory; it stays registered."""
        return await self._ask(calls.evict(name, mode=mode, unpin=unpin))

    async def delete(self, name: str, *, etag: str = "") -> tuple[str, ...]:
        """Remove ``name`` with all revisions, or ``name@revision``; what was removed."""
        return await self._ask(calls.delete(name, etag=etag))

    # ---------------------------------------------------------------------- server

    async def info(self) -> ServerInfo:
        """What the server is."""
        return await self._ask(calls.info())

    async def health(self, service: str = calls.INFERENCE) -> ServingStatus:
        """Readiness of a service; "" asks whether the process lives."""
        return await self._ask(calls.health(service))

    # -------------------------------------------------------------------- mechanics

    async def _ask(self, call: calls.Call[Answer, Result]) -> Result:
        return await self._perform(call, self._timeout_s)

    async def _perform(
        self, call: calls.Call[Answer, Result], timeout_s: float | None
    ) -> Result:
        invoke: Any = self._channel.unary_unary(
            call.method,
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=call.decode,
        )
        attempts = Attempts(self._retry, repeatable=call.repeatable, timeout_s=timeout_s)
        while True:
            try:
                return call.read(await invoke(call.request, timeout=attempts.remaining_s()))
            except grpc.RpcError as error:
                failure = to_error(error, self.address, timeout_s=timeout_s)
                await _sleep_or_raise(attempts, failure, error)


class AsyncGenerationStream:
    """The chunks of one answer, as they come.

    Iterate once. Leaving early: use it in an ``async with``, or call `cancel`; the
    server stops the work within a step.
    """

    def __init__(
        self,
        start: Callable[[float | None], Any],
        attempts: Attempts,
        to_failure: Callable[[grpc.RpcError], VeneerError],
    ) -> None:
        self._start = start
        self._attempts = attempts
        self._to_failure = to_failure
        self._reader = calls.StreamReader()
        self._call = start(attempts.remaining_s())

    async def __aenter__(self) -> AsyncGenerationStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            try:
                message = await self._call.read()
            except grpc.RpcError as error:
                failure = self._to_failure(error)
                if self._reader.started:
                    raise failure from error
                await _sleep_or_raise(self._attempts, failure, error)
                self._call = self._start(self._attempts.remaining_s())
                continue
            if message is grpc.aio.EOF:
                self._reader.check_ended()
                raise StopAsyncIteration
            chunk = self._reader.read(message)
            if chunk is not None:
                return chunk

    @property
    def final(self) -> GenerationEnd:
        """Finish reason, usage and provenance; after the last chunk."""
        return self._reader.require_end()

    def cancel(self) -> None:
        """End the call; does nothing when it has ended."""
        self._call.cancel()


async def _messages(upload: Upload) -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
    """`Upload.messages`, its file reads outside the event loop."""
    messages = upload.messages()
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message


async def _sleep_or_raise(
    attempts: Attempts, failure: VeneerError, cause: grpc.RpcError
) -> None:
    wait = attempts.wait_s(failure)
    if wait is None:
        raise failure from cause
    await asyncio.sleep(wait)
