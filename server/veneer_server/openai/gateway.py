"""The gateway's life: start, stop accepting, stop. uvicorn runs in the app's event loop."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from veneer_registry.adapter import BaseSpec
from veneer_registry.registry import Registry

from veneer_server.config import Address
from veneer_server.engine.client import EngineClient
from veneer_server.metrics import Metrics
from veneer_server.openai.generate import Core
from veneer_server.openai.routes import make_app
from veneer_server.openai.wire import ABORT, MAX_BODIES, Bodies
from veneer_server.rpc.calls import Calls
from veneer_server.rpc.generation import Generator
from veneer_server.rpc.inference_service import READER_LIMIT_S

__all__ = ["Gateway"]

_STOP_GRACE_S: Final = 1
_NEVER_S: Final = 86400
_BACKLOG: Final = 2048

_SEND_BUFFER: Final = 256 << 10
"""Kernel's share of what a reader that stopped reading may hold, in bytes."""

_AHEAD: Final = 64 << 10
"""Bytes of next requests that are kept while one is answered."""


class Gateway:
    """One HTTP server, from `start` to `stop`."""

    def __init__(
        self,
        *,
        generator: Generator,
        registry: Registry,
        engine: EngineClient,
        calls: Calls,
        metrics: Metrics,
        base: BaseSpec,
        reader_limit_s: float = READER_LIMIT_S,
    ) -> None:
        """Args: reader_limit_s: longest wait for a caller to send or to take a piece."""
        core = Core(
            generator=generator,
            registry=registry,
            engine=engine,
            calls=calls,
            metrics=metrics,
            base=base,
            bodies=Bodies(MAX_BODIES),
            reader_limit_s=reader_limit_s,
            started=int(time.time()),
        )
        config = uvicorn.Config(
            make_app(core),
            http=_connection(reader_limit_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            # Kept up to date by a timer that is not worth ten wakes a second.
            date_header=False,
            timeout_keep_alive=_NEVER_S,  # the connection's own clock rules
            timeout_graceful_shutdown=_STOP_GRACE_S,
        )
        config.load()
        self._uvicorn = uvicorn.Server(config)
        self._uvicorn.lifespan = config.lifespan_class(config)

    async def start(self, address: Address) -> Address:
        """Answer requests from now on.

        Not `uvicorn.Server.serve`: that takes over the process's signals and wakes
        up ten times a second to see whether it should stop.

        Raises:
            OSError: the address is taken or does not exist.
        """
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, where = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it. Unset, the kernel lets it grow to megabytes.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            listener.bind(where)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        await self._uvicorn.startup(sockets=[listener])
        return Address(address.host, listener.getsockname()[1])

    def stop_accepting(self) -> None:
        """Close the listening socket; running and kept-alive connections go on."""
        for server in self._uvicorn.servers:
            server.close()

    async def stop(self) -> None:
        """Let written answers get out, then close all connections. Harmless to repeat."""
        if self._uvicorn.started:
            self._uvicorn.started = False
            await self._uvicorn.shutdown()


def _connection(limit_s: float) -> type[H11Protocol]:
    """The protocol of one connection, with three things that uvicorn's own lacks."""

    class Connection(H11Protocol):
        """A limit on how long a connection may take to ask for something, so that idle
        and dripping ones do not gather; a client's leaving is seen even when it had sent
        its next request; and, for ASGI, the means to drop the connection: after a plain
        close a reader that takes nothing keeps the socket open.
        """

        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self.app_state = {**self.app_state, ABORT: transport.abort}
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()
            ahead, _ = self.conn.trailing_data
            if self.conn.their_state is h11.DONE and len(ahead) <= _AHEAD:
                # uvicorn reads no more once a next request has begun to come, and so
                # would not see the client leave.
                self.flow.resume_reading()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._late is not None:
                self._late.cancel()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """The clock runs while no request is being answered. What is left of a body
            after an early answer does not stop it, and no data winds it up again."""
            if self.cycle is not None and not self.cycle.response_complete:
                if self._late is not None:
                    self._late.cancel()
                    self._late = None
            elif self._late is None:
                self._late = self.loop.call_later(limit_s, self.transport.abort)

    return Connection
