"""The asyncio client."""

# begin: async only
# The synchronous client is generated from this file and `aio_*`: run `make client-sync`.
# end: async only

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Unpack

import grpc
from veneer_proto.v1 import inference_pb2
from veneer_registry.errors import (
    DeadlineExceeded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    VeneerError,
)

from veneer_client import calls, calls_admin
from veneer_client.aio_adapters import AsyncAdapterCalls
from veneer_client.aio_handle import AsyncAdapterHandle
from veneer_client.aio_streams import AsyncGenerationStream
from veneer_client.aio_transport import sleep
from veneer_client.convert import generate_request
from veneer_client.failures import Attempts, no_such_service, not_ready, to_error
from veneer_client.readers import StreamStart
from veneer_client.server_records import (
    BudgetUse,
    Capacity,
    SelfTest,
    ServerInfo,
    ServingStatus,
    UsageReport,
)
from veneer_client.types import Chat, GenerateOptions, Generation, MessageLike, Prompt

__all__ = ["AsyncClient"]


class AsyncClient(AsyncAdapterCalls):
    """A connection to one Veneer server; close it, or use it in an ``async with``.

    Create it inside the event loop that uses it. Cancelling a task cancels its call.

    Every method raises a `VeneerError`: the server's, `ServerUnreachable` if no server
    answers, `Cancelled` once the client is closed. A call that is safe to repeat is retried
    if the server says when (see `RetryPolicy`). The methods for adapters are in
    `aio_adapters`.
    """

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
                lambda left_s: start(request, timeout=left_s, metadata=self._metadata),
                Attempts(self._retry, repeatable=True, timeout_s=timeout_s),
                lambda error: to_error(error, self.address, timeout_s=timeout_s),
            )
        )

    async def chat(
        self, messages: Iterable[MessageLike], **options: Unpack[GenerateOptions]
    ) -> Generation:
        """`generate` for a list of chat messages."""
        return await self.generate(Chat.of(messages), **options)

    def chat_stream(
        self, messages: Iterable[MessageLike], **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """`generate_stream` for a list of chat messages."""
        return self.generate_stream(Chat.of(messages), **options)

    def adapter(
        self, name: str, *, activate: bool = False, pin: bool = False
    ) -> AsyncAdapterHandle:
        """Return a handle on one adapter, for an ``async with``: all calls inside use the
        revision that the name or alias resolves to at entry, even if another one is
        published meanwhile.

        Args:
            activate: load it onto the device at entry.
            pin: keep it there until the ``with`` exits, unless it was pinned already. A pin
                is a flag, not a count: of two overlapping blocks, the one that set it
                removes it.

        Raises, at entry:
            AdapterNotFound: with metadata ``did_you_mean`` if there is a similar name.
        """
        return AsyncAdapterHandle(self, name, activate=activate, pin=pin)

    # ---------------------------------------------------------------------- server

    async def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """The server's version, base model, device and limits."""
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
        """Ask the server how many adapters and sequences would fit.

        Args:
            like: a published adapter that gives the shape. Otherwise ``rank`` (16 if unset)
                and ``modules`` (``q_proj`` ...; all if unset) give it.
            adapters: how many must fit in memory; 0 sets no requirement.
            context_length: tokens of one sequence; 0 means the model's maximum.
            concurrency: how many sequences must run at once; 0 sets no requirement.

        Raises:
            InvalidField: ``like`` together with a shape, or a shape that no adapter can have.
        """
        call = calls.plan(
            like=like,
            rank=rank,
            modules=modules,
            adapters=adapters,
            context_length=context_length,
            concurrency=concurrency,
        )
        return await self._ask(call, timeout_s)

    async def usage(
        self,
        tenant: str = "",
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        timeout_s: float | None = None,
    ) -> UsageReport:
        """Return what tenants have used: requests, tokens, and adapters stored.

        Args:
            tenant: the tenant to report on; if empty, the caller's own, or for an operator
                all tenants.
            start, end: the period, as times with a time zone. They are rounded down to the
                hour (UTC), so that consecutive periods count everything once. If unset, the
                period starts with the first record and ends now.
        """
        return await self._ask(calls.usage(tenant, start, end), timeout_s)

    async def health(
        self, service: str | None = None, *, timeout_s: float | None = None
    ) -> ServingStatus:
        """Return whether a service is ready; "" asks whether the process is alive. If unset,
        return whether the server can do its job: generate, or as a registry (``--role
        registry``) accept changes to adapters."""
        if service is not None:
            return await self._ask(calls.health(service), timeout_s)
        try:
            return await self._ask(calls.health(calls.INFERENCE), timeout_s)
        except VeneerError as error:
            if not no_such_service(error):
                raise
        return await self._ask(calls.health(calls.ADAPTERS), timeout_s)

    async def wait_until_ready(
        self,
        timeout_s: float = 300.0,
        *,
        told: Callable[[VeneerError], None] = lambda why: None,
    ) -> None:
        """Wait until the server answers generate calls, or as a registry accepts changes; it
        need not have started yet.

        Args:
            timeout_s: how long to wait at most.
            told: called about once a second with the reason for waiting: `ModelLoading`, whose
                metadata ``doing`` says what is being loaded, `ServerUnreachable`, or another
                `Unavailable`.

        Raises:
            Unavailable, DeadlineExceeded: it was not ready in time; the message says what it
                was doing.
        """
        ends, look = time.monotonic() + timeout_s, 0.0
        while True:
            left = ends - time.monotonic()
            try:
                status = await self.health(timeout_s=max(calls.LEAST_S, left))
                if status is ServingStatus.SERVING:
                    return
                why: VeneerError = not_ready(self.address)
                if left <= 0 or time.monotonic() >= look:
                    await self._once(calls.info(), calls.LEAST_S)
            except grpc.RpcError as error:
                failure = to_error(error, self.address, timeout_s=timeout_s)
                if not isinstance(failure, Unauthenticated | PermissionDenied):
                    why = failure  # health needs no permission, `info` does
            except (Unavailable, DeadlineExceeded) as error:
                why = error
            if left <= 0:
                raise why
            if time.monotonic() >= look:
                look = time.monotonic() + calls.TELL_S
                told(why)
            await sleep(calls.LOOK_S)

    async def update_budgets(
        self,
        *,
        host_cache_bytes: int | None = None,
        device_adapter_bytes: int | None = None,
        timeout_s: float | None = None,
    ) -> BudgetUse:
        """Change the memory budgets of adapters while the server runs; None keeps a budget.
        Adapters that no longer fit are evicted once no running request leases them."""
        call = calls_admin.update_budgets(
            host_cache_bytes=host_cache_bytes, device_adapter_bytes=device_adapter_bytes
        )
        return await self._ask(call, timeout_s)

    async def self_test(
        self, adapters: Iterable[str] = (), *, timeout_s: float | None = None
    ) -> SelfTest:
        """Compare the answers of base and adapters, mixed in batches, with a reference
        computed from their files.

        Args:
            adapters: names, ``name@revision`` or ``name/alias``. If empty: the two adapters
                in memory that were used last, else two registered ones.
            timeout_s: unlimited if unset, since each reference takes a while to compute.
        """
        return await self._perform(calls_admin.self_test(adapters), timeout_s)
