# Generated from aio.py by `make client-sync`: edit that file.
"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Unpack

import grpc
from veneer_proto.v1 import inference_pb2
from veneer_registry.errors import DeadlineExceeded, Unavailable, VeneerError

from veneer_client import calls, calls_admin
from veneer_client.client_adapters import AdapterCalls
from veneer_client.convert import generate_request
from veneer_client.failures import Attempts, not_ready, to_error
from veneer_client.handle import AdapterHandle
from veneer_client.readers import StreamStart
from veneer_client.server_records import (
    BudgetUse,
    Capacity,
    SelfTest,
    ServerInfo,
    ServingStatus,
)
from veneer_client.streams import GenerationStream
from veneer_client.transport import sleep
from veneer_client.types import Chat, GenerateOptions, Generation, MessageLike, Prompt

__all__ = ["Client"]


class Client(AdapterCalls):
    """A connection to one Veneer server; close it, or use it in a ``with``.

    Threads may share it.

    Every method raises a `VeneerError`: the server's own, `ServerUnreachable` where nobody
    answers, `Cancelled` once it is closed. Calls that are safe to repeat are repeated when
    the server says when (see `RetryPolicy`). Its methods for adapters are in
    `client_adapters`.
    """

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
                lambda left_s: start(request, timeout=left_s, metadata=self._metadata),
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
        name or alias means at entry, also when another one is published meanwhile.

        Args:
            activate: bring it to the device at entry.
            pin: keep it there until the ``with`` is left, unless it was pinned before.
                A pin is one flag, not a count: of two that overlap, the one that set
                it removes it.

        Raises, at entry:
            AdapterNotFound: metadata ``did_you_mean`` where a name is near.
        """
        return AdapterHandle(self, name, activate=activate, pin=pin)

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

    def wait_until_ready(
        self,
        timeout_s: float = 300.0,
        *,
        told: Callable[[VeneerError], None] = lambda why: None,
    ) -> None:
        """Return once generate calls are answered; a server that is not there yet is waited
        for.

        Args:
            timeout_s: so long at most.
            told: called about once a second with why it waits: `ModelLoading`, whose metadata
                ``doing`` says what is loaded, `ServerUnreachable`, or another `Unavailable`.

        Raises:
            Unavailable, DeadlineExceeded: it was not ready in time; says what it was doing.
        """
        ends, look = time.monotonic() + timeout_s, 0.0
        while True:
            left = ends - time.monotonic()
            try:
                status = self.health(timeout_s=max(calls.LEAST_S, left))
                if status is ServingStatus.SERVING:
                    return
                why: VeneerError = not_ready(self.address)
                if left <= 0 or time.monotonic() >= look:
                    self._once(calls.info(), calls.LEAST_S)
            except grpc.RpcError as error:
                why = to_error(error, self.address, timeout_s=timeout_s)
            except (Unavailable, DeadlineExceeded) as error:
                why = error
            if left <= 0:
                raise why
            if time.monotonic() >= look:
                look = time.monotonic() + calls.TELL_S
                told(why)
            sleep(calls.LOOK_S)

    def update_budgets(
        self,
        *,
        host_cache_bytes: int | None = None,
        device_adapter_bytes: int | None = None,
        timeout_s: float | None = None,
    ) -> BudgetUse:
        """Change the memory budgets of adapters while the server runs; None leaves one as
        it is. What no longer fits goes as soon as no running request holds it."""
        call = calls_admin.update_budgets(
            host_cache_bytes=host_cache_bytes, device_adapter_bytes=device_adapter_bytes
        )
        return self._ask(call, timeout_s)

    def self_test(
        self, adapters: Iterable[str] = (), *, timeout_s: float | None = None
    ) -> SelfTest:
        """Prove that base and adapters answer, mixed in one batch, as their files say.

        Args:
            adapters: names, ``name@revision`` or ``name/alias``; none: the two in
                memory that were used last, else two registered ones.
            timeout_s: unset: none, since a reference is computed for each.
        """
        return self._perform(calls_admin.self_test(adapters), timeout_s)
