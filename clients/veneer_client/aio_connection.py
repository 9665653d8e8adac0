"""How the asyncio client performs calls: one channel, deadlines, retries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from os import PathLike
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from veneer_registry.errors import VeneerError

from veneer_client import calls
from veneer_client.actor import actor_metadata
from veneer_client.aio_transport import begin, open_channel, outcome, sleep
from veneer_client.calls_admin import Page
from veneer_client.failures import Attempts, RetryPolicy, to_error
from veneer_client.login import find_login
from veneer_client.replicas import lag_metadata

__all__ = ["AsyncConnection", "sleep_or_raise"]

Answer = TypeVar("Answer")
Result = TypeVar("Result")
Item = TypeVar("Item")


class AsyncConnection:
    """A channel to one server; performs a `calls.Call` on it."""

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout_s: float = 30.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        keepalive_s: float = calls.KEEPALIVE_S,
        actor: str | None = None,
        api_key: str | None = None,
        ca: str | PathLike[str] | None = None,
        cert: str | PathLike[str] | None = None,
        key: str | PathLike[str] | None = None,
        tenant: str | None = None,
        max_registry_lag_s: float | None = None,
    ) -> None:
        """Args:
        address: ``HOST:PORT``, or ``https://HOST:PORT`` for TLS; else VENEER_SERVER, else a
            profile's, else the default.
        timeout_s: default deadline of a call, retries included. Generate, push, register,
            pull, watch and self_test have none unless given one.
        keepalive_s: see `calls.channel_options`.
        actor: the caller's name for the server's history; else VENEER_ACTOR, else
            ``user@host``.
        api_key, ca, cert, key, tenant: see `login.find_login`.
        max_registry_lag_s: for a server that follows a registry: the maximum age of the view
            of the registry in which it looks up names. If its view is older, the call fails
            with `Unavailable`.
        """
        login = find_login(address, api_key=api_key, ca=ca, cert=cert, key=key, tenant=tenant)
        self.address = login.address
        self._timeout_s = timeout_s
        self._retry = retry
        lag = lag_metadata(max_registry_lag_s)
        self._metadata = (*actor_metadata(actor), *login.metadata, *lag)
        self._channel = open_channel(login, keepalive_s)

    async def __aenter__(self) -> Self:
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

    async def _ask(self, call: calls.Call[Answer, Result], timeout_s: float | None) -> Result:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return await self._perform(call, limit_s)

    async def _perform(
        self, call: calls.Call[Answer, Result], timeout_s: float | None
    ) -> Result:
        attempts = Attempts(self._retry, repeatable=call.repeatable, timeout_s=timeout_s)
        while True:
            try:
                return await self._once(call, attempts.remaining_s())
            except grpc.RpcError as error:
                failure = to_error(error, self.address, timeout_s=timeout_s)
                await sleep_or_raise(attempts.wait_s(failure), failure, error)

    async def _once(self, call: calls.Call[Answer, Result], left_s: float | None) -> Result:
        """One attempt. Raises grpc.RpcError."""
        invoke: Any = self._channel.unary_unary(
            call.method,
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=call.decode,
        )
        running = begin(invoke, call.request, timeout_s=left_s, metadata=self._metadata)
        return call.read(await outcome(running))

    async def _pages(
        self,
        page: Callable[[str], calls.Call[Any, Page[Item]]],
        timeout_s: float | None,
    ) -> AsyncIterator[Item]:
        """Items of all pages, each page fetched when needed."""
        token = ""
        while True:
            found = await self._ask(page(token), timeout_s)
            for item in found.items:
                yield item
            token = found.next_token
            if not token:
                return


async def sleep_or_raise(
    wait_s: float | None, failure: VeneerError, cause: grpc.RpcError
) -> None:
    """Wait until the next attempt; if there is none, raise the failure of the last one."""
    if wait_s is None:
        raise failure from cause
    await sleep(wait_s)
