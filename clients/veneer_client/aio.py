"""The client for asyncio; method for method the same as `veneer_client.client`.

What a call is, how its answer is read and when it is repeated is shared
(`calls`, `convert`, `failures`, `upload`); here is only how it is awaited.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.adapter import Tier
from veneer_registry.errors import VeneerError

from veneer_client import calls
from veneer_client.convert import generate_request
from veneer_client.failures import Attempts, RetryPolicy, outcome, starting, to_error
from veneer_client.handle import AsyncAdapterHandle
from veneer_client.records import (
    AdapterDetails,
    AdapterInfo,
    Capacity,
    Eviction,
    EvictMode,
    Pushed,
    ServerInfo,
    ServingStatus,
)
from veneer_client.streams import (
    AsyncAdapterWatch,
    AsyncGenerationStream,
    StreamStart,
    WatchReader,
)
from veneer_client.types import Chat, GenerateOptions, Generation, MessageLike, Prompt
from veneer_client.upload import Progress, PushOptions, Upload, prepare

__all__ = ["AsyncClient"]

Answer = TypeVar("Answer")
Result = TypeVar("Result")


class AsyncClient:
    """A connection to one Veneer server; close it, or use it in an ``async with``.

    Make it inside the event loop that uses it. Every method raises a `VeneerError`:
    the server's own, `ServerUnreachable` where nobody answers, `Cancelled` once it is
    closed. Calls that are safe to repeat are repeated when the server says when (see
    `RetryPolicy`).
    Cancelling the task cancels the call.
    """

    def __init__(
        self,
        address: str = calls.DEFAULT_ADDRESS,
        *,
        timeout_s: float = 30.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        keepalive_s: float = calls.KEEPALIVE_S,
    ) -> None:
        """Args:
        address: ``HOST:PORT``.
        timeout_s: deadline of every call, retries included, that is not given its
            own; generate, push and watch have none unless given.
        keepalive_s: see `calls.channel_options`.
        """
        self.address = address
        self._timeout_s = timeout_s
        self._retry = retry
        self._channel = grpc.aio.insecure_channel(
            address, options=calls.channel_options(keepalive_s)
        )

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
            StreamStart(
                lambda left_s: start(request, timeout=left_s),
                Attempts(self._retry, repeatable=True, timeout_s=timeout_s),
                lambda error: to_error(error, self.address, timeout_s=timeout_s),
            )
        )

    async def chat(
        self, messages: Iterable[MessageLike], **options: Unpack[GenerateOptions]
    ) -> Generation:
        """`generate` for the turns of a conversation."""
        return await self.generate(Chat.of(messages), **options)

    def chat_stream(
        self, messages: Iterable[MessageLike], **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """`generate_stream` for the turns of a conversation."""
        return self.generate_stream(Chat.of(messages), **options)

    def adapter(
        self, name: str, *, activate: bool = False, pin: bool = False
    ) -> AsyncAdapterHandle:
        """One adapter for an ``async with``: its calls all answer from the revision that the
        name means at entry, also when another one is published meanwhile.

        Args:
            activate: bring it to the device at entry.
            pin: keep it there until the ``with`` is left, unless it was pinned before.
                A pin is one flag, not a count: of two that overlap, the one that set
                it removes it.

        Raises, at entry:
            AdapterNotFound: metadata ``did_you_mean`` where a name is near.
        """
        return AsyncAdapterHandle(self, name, activate=activate, pin=pin)

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
                with starting():
                    running = send(_messages(upload), timeout=attempts.remaining_s())
                return upload.result(await outcome(running))
            except grpc.RpcError as error:
                failure = upload.failure or to_error(error, self.address, timeout_s=timeout_s)
                await _sleep_or_raise(attempts, failure, error)

    async def get(self, name: str, *, timeout_s: float | None = None) -> AdapterDetails:
        """One adapter, by ``name`` or ``name@revision``, and its revisions."""
        return await self._ask(calls.get(name), timeout_s)

    async def list(
        self,
        *,
        name_prefix: str = "",
        tier: Tier | None = None,
        labels: Mapping[str, str] | None = None,
        page_size: int = 100,
        timeout_s: float | None = None,
    ) -> AsyncIterator[AdapterInfo]:
        """Current revisions in name order; fetches pages as they are needed, each within
        ``timeout_s``."""
        token = ""
        while True:
            page = await self._ask(
                calls.page(
                    token,
                    page_size=page_size,
                    name_prefix=name_prefix,
                    tier=tier,
                    labels=labels or {},
                ),
                timeout_s,
            )
            for adapter in page.adapters:
                yield adapter
            token = page.next_token
            if not token:
                return

    async def activate(
        self,
        name: str,
        *,
        tier: Tier = Tier.DEVICE,
        pin: bool = False,
        timeout_s: float | None = None,
    ) -> AdapterInfo:
        """Bring an adapter to HOST or DEVICE, and keep it there if ``pin``."""
        return await self._ask(calls.activate(name, tier=tier, pin=pin), timeout_s)

    async def pin(self, name: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Bring an adapter to the device and keep it there until it is unpinned."""
        return await self._ask(calls.pin(name, pinned=True), timeout_s)

    async def unpin(self, name: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Remove the pin; the adapter stays where it is until room is needed."""
        return await self._ask(calls.pin(name, pinned=False), timeout_s)

    async def evict(
        self,
        name: str,
        *,
        mode: EvictMode = EvictMode.DRAIN,
        unpin: bool = False,
        timeout_s: float | None = None,
    ) -> Eviction:
        """Free an adapter's memory; it stays registered."""
        return await self._ask(calls.evict(name, mode=mode, unpin=unpin), timeout_s)

    async def delete(
        self, name: str, *, etag: str = "", timeout_s: float | None = None
    ) -> tuple[str, ...]:
        """Remove ``name`` with all revisions, or ``name@revision``; what was removed."""
        return await self._ask(calls.delete(name, etag=etag), timeout_s)

    def watch(self, since: int = 0, *, timeout_s: float | None = None) -> AsyncAdapterWatch:
        """Events of all adapters as they happen; see `Client.watch`."""
        start = self._channel.unary_stream(
            calls.WATCH,
            request_serializer=adapters_pb2.WatchAdaptersRequest.SerializeToString,
            response_deserializer=adapters_pb2.WatchAdaptersResponse.FromString,
        )
        reader = WatchReader(since)
        attempts = Attempts(
            self._retry, repeatable=True, timeout_s=timeout_s, reconnect_s=calls.RECONNECT_S
        )
        return AsyncAdapterWatch(
            StreamStart(
                lambda left_s: start(reader.request(), timeout=left_s),
                attempts,
                lambda error: to_error(error, self.address, timeout_s=timeout_s),
            ),
            reader,
        )

    # ---------------------------------------------------------------------- server

    async def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """What the server is."""
        return await self._ask(calls.info(), timeout_s)

    async def plan(
        self,
        *,
        like: str = "",
        rank: int = 0,
        modules: Sequence[str] = (),
        adapters: int = 0,
        context_length: int = 0,
        concurrency: int = 0,
        timeout_s: float | None = None,
    ) -> Capacity:
        """What would fit; see `Client.plan`."""
        call = calls.plan(
            like=like,
            rank=rank,
            modules=modules,
            adapters=adapters,
            context_length=context_length,
            concurrency=concurrency,
        )
        return await self._ask(call, timeout_s)

    async def health(
        self, service: str = calls.INFERENCE, *, timeout_s: float | None = None
    ) -> ServingStatus:
        """Readiness of a service; "" asks whether the process lives."""
        return await self._ask(calls.health(service), timeout_s)

    # -------------------------------------------------------------------- mechanics

    async def _ask(self, call: calls.Call[Answer, Result], timeout_s: float | None) -> Result:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return await self._perform(call, limit_s)

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
                with starting():
                    running = invoke(call.request, timeout=attempts.remaining_s())
                return call.read(await outcome(running))
            except grpc.RpcError as error:
                failure = to_error(error, self.address, timeout_s=timeout_s)
                await _sleep_or_raise(attempts, failure, error)


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
