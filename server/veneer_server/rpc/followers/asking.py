"""Calls that a follower passes on to its registry, with the caller's own credentials."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, Final, TypeVar

import grpc
from veneer_proto.v1 import adapters_pb2_grpc
from veneer_registry.errors import PermissionDenied

from veneer_server.access.authenticate import PASSED_ON
from veneer_server.access.principal import PRINCIPAL
from veneer_server.follower.registry_channel import RegistryChannel, to_error
from veneer_server.follower.standing import Standing
from veneer_server.replication.asked import ASKED, Asked

__all__ = ["Asking", "Progress"]

T = TypeVar("T")

AWAY_S: Final = 15.0
"""A call ends after so long without progress, if nothing is heard of the registry meanwhile. On
a half-open connection gRPC's keepalive did not end it (tried for 60 s)."""


class Progress:
    """When a call last took or gave a message."""

    def __init__(self) -> None:
        self.made()

    def made(self) -> None:
        self._at = time.monotonic()

    @property
    def ago_s(self) -> float:
        return time.monotonic() - self._at


class Asking:
    """Calls of the registry's AdapterService. They raise what the registry raises,
    `Unavailable` if it does not answer, `FailedPrecondition` if it knows callers in another way
    than this server, and `PermissionDenied` if the caller has only a certificate."""

    def __init__(
        self, channel: RegistryChannel, standing: Standing, *, asks_callers: bool
    ) -> None:
        """Args: asks_callers: whether callers of this server say who they are."""
        self._channel = channel
        self._standing = standing
        self._asks_callers = asks_callers

    async def answer(
        self,
        method: str,
        request: Any,
        *,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """The answer of a call.

        Args:
            request: a message, or an iterator of messages.
            progress: told by the iterator of each message.
        """
        call = self._begin(method, request, timeout_s)
        try:
            return await self._while_heard(call, progress or Progress())
        except grpc.aio.AioRpcError as error:
            raise to_error(error, self._channel.place.address) from error
        finally:
            call.cancel()

    async def messages(
        self, method: str, request: Any, *, timeout_s: float | None = None
    ) -> AsyncGenerator[Any, None]:
        """What a call streams."""
        call = self._begin(method, request, timeout_s)
        try:
            while True:
                message = await self._while_heard(call.read(), Progress())
                if message is grpc.aio.EOF:
                    return
                yield message
        except grpc.aio.AioRpcError as error:
            raise to_error(error, self._channel.place.address) from error
        finally:
            call.cancel()

    async def _while_heard(self, awaited: Awaitable[T], progress: Progress) -> T:
        answering = asyncio.ensure_future(awaited)
        try:
            while not (await asyncio.wait({answering}, timeout=AWAY_S / 4))[0]:
                silent_s = min(self._standing.lag_s, progress.ago_s)
                if silent_s > AWAY_S and not self._standing.connected:
                    raise self._standing.unreachable("this call", "it is silent")
            return answering.result()
        finally:
            answering.cancel()

    def _begin(self, method: str, request: Any, timeout_s: float | None) -> Any:
        self._standing.check_fit()
        asked = ASKED.get() or Asked()
        if self._asks_callers and not asked.secret:
            # The registry would see the certificate of this server's own connection.
            raise PermissionDenied(
                f"{method} needs the registry, and a client certificate cannot be forwarded "
                "to it: send a key or token, or call the registry at "
                f"{self._standing.registry}",
                metadata={"method": method, "cause": "certificate"},
            )
        stub = adapters_pb2_grpc.AdapterServiceStub(self._channel.channel)
        tenant = PRINCIPAL.get().tenant
        return getattr(stub, method)(
            request, metadata=(*asked.caller, (PASSED_ON, tenant)), timeout=timeout_s
        )
