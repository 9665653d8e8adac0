"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.adapter import Tier
from veneer_registry.errors import VeneerError

from veneer_client import calls
from veneer_client.convert import generate_request
from veneer_client.failures import Attempts, RetryPolicy, starting, to_error
from veneer_client.handle import AdapterHandle
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
from veneer_client.streams import AdapterWatch, GenerationStream, StreamStart, WatchReader
from veneer_client.types import Chat, GenerateOptions, Generation, MessageLike, Prompt
from veneer_client.upload import Progress, PushOptions, prepare

__all__ = ["Client"]

Answer = TypeVar("Answer")
Result = TypeVar("Result")


class Client:
    """A connection to one Veneer server; close it, or use it in a ``with``.

    Threads may share it. Every method raises a `VeneerError`: the server's own,
    `ServerUnreachable` where nobody answers, `Cancelled` once it is closed. Calls that
    are safe to repeat are repeated when the server says when (see `RetryPolicy`).
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
        self._channel = grpc.insecure_channel(
            address, options=calls.channel_options(keepalive_s)
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel running calls and close the connection."""
        self._channel.close()

    # ------------------------------------------------------------------- inference

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate, and return the whole answer."""
        return self._perform(calls.generate(prompt, options), options.get("timeout_s"))

    def generate_stream(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> GenerationStream:
        """Generate; iterate over the result for `Chunk`s, then read its ``final``."""
        request = generate_request(prompt, options)
        start = self._channel.unary_stream(
            calls.GENERATE_STREAM,
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.GenerateStreamResponse.FromString,
        )
        timeout_s = options.get("timeout_s")
        return GenerationStream(
            StreamStart(
                lambda left_s: start(request, timeout=left_s),
                Attempts(self._retry, repeatable=True, timeout_s=timeout_s),
                lambda error: to_error(error, self.address, timeout_s=timeout_s),
            )
        )

    def chat(
        self, messages: Iterable[MessageLike], **options: Unpack[GenerateOptions]
    ) -> Generation:
        """`generate` for the turns of a conversation."""
        return self.generate(Chat.of(messages), **options)

    def chat_stream(
        self, messages: Iterable[MessageLike], **options: Unpack[GenerateOptions]
    ) -> GenerationStream:
        """`generate_stream` for the turns of a conversation."""
        return self.generate_stream(Chat.of(messages), **options)

    def adapter(self, name: str, *, activate: bool = False, pin: bool = False) -> AdapterHandle:
        """One adapter for a ``with``: its calls all answer from the revision that the
        name means at entry, also when another one is published meanwhile.

        Args:
            activate: bring it to the device at entry.
            pin: keep it there until the ``with`` is left, unless it was pinned before.
                A pin is one flag, not a count: of two that overlap, the one that set
                it removes it.

        Raises, at entry:
            AdapterNotFound: metadata ``did_you_mean`` where a name is near.
        """
        return AdapterHandle(self, name, activate=activate, pin=pin)

    # -------------------------------------------------------------------- adapters

    def push(
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
        """Check an adapter folder locally, then publish it under ``name``.

        Args:
            validate_only: check everything, publish nothing.
            activate: return when the adapter is on the device.
            allow_replace: a name that holds other content may move to this one.
            progress: told the bytes sent and the bytes in all, from gRPC's thread.

        Raises:
            AdapterInvalid, BaseModelMismatch, AdapterExists, DiskFull: nothing was
                published.
        """
        upload = prepare(
            folder,
            name,
            PushOptions(labels or {}, validate_only, activate, allow_replace),
            progress,
        )
        send: Any = self._channel.stream_unary(
            calls.UPLOAD,
            request_serializer=adapters_pb2.UploadAdapterRequest.SerializeToString,
            response_deserializer=adapters_pb2.UploadAdapterResponse.FromString,
        )
        # Content decides the outcome, so sending it twice is sending it once.
        attempts = Attempts(self._retry, repeatable=True, timeout_s=timeout_s)
        while True:
            try:
                with starting():
                    running = send.future(upload.messages(), timeout=attempts.remaining_s())
                return upload.result(_result(running))
            except grpc.RpcError as error:
                failure = upload.failure or to_error(error, self.address, timeout_s=timeout_s)
                _sleep_or_raise(attempts, failure, error)

    def get(self, name: str, *, timeout_s: float | None = None) -> AdapterDetails:
        """One adapter, by ``name`` or ``name@revision``, and its revisions."""
        return self._ask(calls.get(name), timeout_s)

    def list(
        self,
        *,
        name_prefix: str = "",
        tier: Tier | None = None,
        labels: Mapping[str, str] | None = None,
        page_size: int = 100,
        timeout_s: float | None = None,
    ) -> Iterator[AdapterInfo]:
        """Current revisions in name order; fetches pages as they are needed, each within
        ``timeout_s``."""
        token = ""
        while True:
            page = self._ask(
                calls.page(
                    token,
                    page_size=page_size,
                    name_prefix=name_prefix,
                    tier=tier,
                    labels=labels or {},
                ),
                timeout_s,
            )
            yield from page.adapters
            token = page.next_token
            if not token:
                return

    def activate(
        self,
        name: str,
        *,
        tier: Tier = Tier.DEVICE,
        pin: bool = False,
        timeout_s: float | None = None,
    ) -> AdapterInfo:
        """Bring an adapter to HOST or DEVICE, and keep it there if ``pin``."""
        return self._ask(calls.activate(name, tier=tier, pin=pin), timeout_s)

    def pin(self, name: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Bring an adapter to the device and keep it there until it is unpinned."""
        return self._ask(calls.pin(name, pinned=True), timeout_s)

    def unpin(self, name: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Remove the pin; the adapter stays where it is until room is needed."""
        return self._ask(calls.pin(name, pinned=False), timeout_s)

    def evict(
        self,
        name: str,
        *,
        mode: EvictMode = EvictMode.DRAIN,
        unpin: bool = False,
        timeout_s: float | None = None,
    ) -> Eviction:
        """Free an adapter's memory; it stays registered."""
        return self._ask(calls.evict(name, mode=mode, unpin=unpin), timeout_s)

    def delete(
        self, name: str, *, etag: str = "", timeout_s: float | None = None
    ) -> tuple[str, ...]:
        """Remove ``name`` with all revisions, or ``name@revision``; what was removed."""
        return self._ask(calls.delete(name, etag=etag), timeout_s)

    def watch(self, since: int = 0, *, timeout_s: float | None = None) -> AdapterWatch:
        """Events of all adapters as they happen, without end: first what was missed
        after ``since`` (or, where the server no longer has that, RESET and what there
        is), then SYNCED, then what happens.

        It goes on by itself, without a gap, where the server restarts or the
        connection breaks, as long as `RetryPolicy` has patience.

        Args:
            since: `AdapterEvent.sequence` of the last event seen; 0 at first.
            timeout_s: of the whole watch; unset: none.
        """
        start = self._channel.unary_stream(
            calls.WATCH,
            request_serializer=adapters_pb2.WatchAdaptersRequest.SerializeToString,
            response_deserializer=adapters_pb2.WatchAdaptersResponse.FromString,
        )
        reader = WatchReader(since)
        attempts = Attempts(
            self._retry, repeatable=True, timeout_s=timeout_s, reconnect_s=calls.RECONNECT_S
        )
        return AdapterWatch(
            StreamStart(
                lambda left_s: start(reader.request(), timeout=left_s),
                attempts,
                lambda error: to_error(error, self.address, timeout_s=timeout_s),
            ),
            reader,
        )

    # ---------------------------------------------------------------------- server

    def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """What the server is."""
        return self._ask(calls.info(), timeout_s)

    def plan(
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
        """What would fit.

        Args:
            like: a published adapter whose shape is asked about; else ``rank``, unset
                16, and ``modules`` (``q_proj`` ...), unset all.
            adapters: that should be in memory; 0 asks for nothing.
            context_length: tokens of one sequence; 0 means the model's longest.
            concurrency: sequences that should run at once; 0 asks for nothing.

        Raises:
            InvalidField: ``like`` beside a shape, or a shape that no adapter can have.
        """
        call = calls.plan(
            like=like,
            rank=rank,
            modules=modules,
            adapters=adapters,
            context_length=context_length,
            concurrency=concurrency,
        )
        return self._ask(call, timeout_s)

    def health(
        self, service: str = calls.INFERENCE, *, timeout_s: float | None = None
    ) -> ServingStatus:
        """Readiness of a service; "" asks whether the process lives."""
        return self._ask(calls.health(service), timeout_s)

    # -------------------------------------------------------------------- mechanics

    def _ask(self, call: calls.Call[Answer, Result], timeout_s: float | None) -> Result:
        return self._perform(call, self._timeout_s if timeout_s is None else timeout_s)

    def _perform(self, call: calls.Call[Answer, Result], timeout_s: float | None) -> Result:
        invoke: Any = self._channel.unary_unary(
            call.method,
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=call.decode,
        )
        attempts = Attempts(self._retry, repeatable=call.repeatable, timeout_s=timeout_s)
        while True:
            try:
                with starting():
                    running = invoke.future(call.request, timeout=attempts.remaining_s())
                return call.read(_result(running))
            except grpc.RpcError as error:
                failure = to_error(error, self.address, timeout_s=timeout_s)
                _sleep_or_raise(attempts, failure, error)


def _result(running: Any) -> Any:
    """The answer of a call; whatever ends the waiting (Ctrl-C) ends the call too."""
    try:
        return running.result()
    except BaseException:
        running.cancel()
        raise


def _sleep_or_raise(attempts: Attempts, failure: VeneerError, cause: grpc.RpcError) -> None:
    wait = attempts.wait_s(failure)
    if wait is None:
        raise failure from cause
    time.sleep(wait)
