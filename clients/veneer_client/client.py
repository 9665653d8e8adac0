"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
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
from veneer_client.upload import Progress, PushOptions, prepare

__all__ = ["Client", "GenerationStream"]

Answer = TypeVar("Answer")
Result = TypeVar("Result")


class Client:
    """A connection to one Veneer server; close it, or use it in a ``with``.

    Threads may share it. Every method raises a `VeneerError`: the server's own, or
    `ServerUnreachable` where nobody answers. Calls that are safe to repeat are
    repeated when the server says when (see `RetryPolicy`).
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
        self._channel = grpc.insecure_channel(address, options=calls.CHANNEL_OPTIONS)

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
            lambda left_s: start(request, timeout=left_s),
            Attempts(self._retry, repeatable=True, timeout_s=timeout_s),
            lambda error: to_error(error, self.address, timeout_s=timeout_s),
        )

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
        send = self._channel.stream_unary(
            calls.UPLOAD,
            request_serializer=adapters_pb2.UploadAdapterRequest.SerializeToString,
            response_deserializer=adapters_pb2.UploadAdapterResponse.FromString,
        )
        # Content decides the outcome, so sending it twice is sending it once.
        attempts = Attempts(self._retry, repeatable=True, timeout_s=timeout_s)
        while True:
            try:
                return upload.result(send(upload.messages(), timeout=attempts.remaining_s()))
            except grpc.RpcError as error:
                failure = upload.failure or to_error(error, self.address, timeout_s=timeout_s)
                _sleep_or_raise(attempts, failure, error)

    def get(self, name: str) -> AdapterDetails:
        """One adapter, by ``name`` or ``name@revision``, and its revisions."""
        return self._ask(calls.get(name))

    def list(
        self,
        *,
        name_prefix: str = "",
        tier: Tier | None = None,
        labels: Mapping[str, str] | None = None,
        page_size: int = 100,
    ) -> Iterator[AdapterInfo]:
        """Current revisions in name order; fetches pages as they are needed."""
        token = ""
        while True:
            page = self._ask(
                calls.page(
                    token,
                    page_size=page_size,
                    name_prefix=name_prefix,
                    tier=tier,
                    labels=labels or {},
                )
            )
            yield from page.adapters
            token = page.next_token
            if not token:
                return

    def activate(
        self, name: str, *, tier: Tier = Tier.DEVICE, pin: bool = False
    ) -> AdapterInfo:
        """Bring an adapter to HOST or DEVICE, and keep it there if ``pin``."""
        return self._ask(calls.activate(name, tier=tier, pin=pin))

    def evict(
        self, name: str, *, mode: EvictMode = EvictMode.DRAIN, unpin: bool = False
    ) -> Eviction:
        """Free an adapter's memory; it stays registered."""
        return self._ask(calls.evict(name, mode=mode, unpin=unpin))

    def delete(self, name: str, *, etag: str = "") -> tuple[str, ...]:
        """Remove ``name`` with all revisions, or ``name@revision``; what was removed."""
        return self._ask(calls.delete(name, etag=etag))

    # ---------------------------------------------------------------------- server

    def info(self) -> ServerInfo:
        """What the server is."""
        return self._ask(calls.info())

    def health(self, service: str = calls.INFERENCE) -> ServingStatus:
        """Readiness of a service; "" asks whether the process lives."""
        return self._ask(calls.health(service))

    # -------------------------------------------------------------------- mechanics

    def _ask(self, call: calls.Call[Answer, Result]) -> Result:
        return self._perform(call, self._timeout_s)

    def _perform(self, call: calls.Call[Answer, Result], timeout_s: float | None) -> Result:
        invoke: Any = self._channel.unary_unary(
            call.method,
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=call.decode,
        )
        attempts = Attempts(self._retry, repeatable=call.repeatable, timeout_s=timeout_s)
        while True:
            try:
                return call.read(invoke(call.request, timeout=attempts.remaining_s()))
            except grpc.RpcError as error:
                failure = to_error(error, self.address, timeout_s=timeout_s)
                _sleep_or_raise(attempts, failure, error)


class GenerationStream:
    """The chunks of one answer, as they come.

    Iterate once. Leaving early: use it in a ``with``, or call `cancel`; the server
    stops the work within a step.
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

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while True:
            try:
                chunk = self._reader.read(next(self._call))
            except StopIteration:
                self._reader.check_ended()
                raise
            except grpc.RpcError as error:
                failure = self._to_failure(error)
                if self._reader.started:
                    raise failure from error
                _sleep_or_raise(self._attempts, failure, error)
                self._call = self._start(self._attempts.remaining_s())
            else:
                if chunk is not None:
                    return chunk

    @property
    def final(self) -> GenerationEnd:
        """Finish reason, usage and provenance; after the last chunk."""
        return self._reader.require_end()

    def cancel(self) -> None:
        """End the call; does nothing when it has ended."""
        self._call.cancel()


def _sleep_or_raise(attempts: Attempts, failure: VeneerError, cause: grpc.RpcError) -> None:
    wait = attempts.wait_s(failure)
    if wait is None:
        raise failure from cause
    time.sleep(wait)
