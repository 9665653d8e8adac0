"""The gateway's life: start, stop accepting, stop. uvicorn runs in the app's event loop."""

from __future__ import annotations

import socket
import ssl
import time
from typing import Any, Final

import uvicorn

from veneer_server.access.handshakes import Handshakes
from veneer_server.config import Address
from veneer_server.openai.core import ServingCore, ServingParts
from veneer_server.openai.extensions import Unknown
from veneer_server.openai.http.asgi import MAX_BODIES, MAX_LONG_BODIES, Bodies
from veneer_server.openai.http.connection import connection_class
from veneer_server.openai.http.cors import Cors
from veneer_server.openai.routes import make_app
from veneer_server.serving.gate import Gate
from veneer_server.serving.generation import READER_LIMIT_S, Calls
from veneer_server.serving.local_folders import LocalFolders
from veneer_server.system.hosts import AllowedHosts
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.pages import Pages

_STOP_GRACE_S: Final = 1
_NEVER_S: Final = 86400
_BACKLOG: Final = 128
"""Connections that the kernel queues until they are accepted."""

_SEND_BUFFER: Final = 256 << 10
"""Bytes that the kernel may buffer for a client that has stopped reading."""


class Gateway:
    """One HTTP server, from `start` to `stop`."""

    def __init__(
        self,
        gate: Gate,
        *,
        calls: Calls,
        metrics: Metrics,
        hosts: AllowedHosts,
        reader_limit_s: float = READER_LIMIT_S,
        max_connections: int = 512,
        tls: ssl.SSLContext | None = None,
        pages: Pages | None = None,
        cors: Cors | None = None,
        local: LocalFolders | None = None,
        unknown_fields: Unknown = "warn",
    ) -> None:
        """Args:
        hosts: host names that requests may use.
        pages: makes the pages of metrics; None creates one.
        cors: which web pages may call from a browser; None allows none.
        local: folders of this machine from which adapters may be loaded; None for none.
        unknown_fields: how to treat unknown fields of requests.
        reader_limit_s: longest wait for a client to send or read a piece.
        max_connections: most connections that may be open. A further one replaces another, see
            `queues.connection_places`, or is refused.
        tls: None for plain HTTP.
        """
        self._core = core = ServingCore(
            gate=gate,
            calls=calls,
            metrics=metrics,
            bodies=Bodies(MAX_BODIES, MAX_LONG_BODIES),
            reader_limit_s=reader_limit_s,
            started=int(time.time()),
            pages=pages or Pages(metrics.registry),
            local=local or LocalFolders(),
            unknown_fields=unknown_fields,
        )
        self._bodies = core.bodies
        app = make_app(core, hosts, cors or Cors())
        config = uvicorn.Config(
            app,
            http=connection_class(
                reader_limit_s,
                max_connections,
                gate.pace,
                app.malformed,
                keyless=not gate.access.asks,
            ),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            # The header is not worth its timer, which wakes up ten times a second.
            date_header=False,
            timeout_keep_alive=_NEVER_S,  # the connection class has its own timer
            timeout_graceful_shutdown=_STOP_GRACE_S,
        )
        config.load()
        self._handshakes = None if tls is None else Handshakes(tls)
        if self._handshakes is not None:
            connection: Any = self._handshakes.before(config.http_protocol_class)
            config.http_protocol_class = connection
        self._uvicorn = uvicorn.Server(config)
        self._uvicorn.lifespan = config.lifespan_class(config)

    def answer_by(self, loaded: ServingParts) -> None:
        """Supply the core's parts; call it before `Calls` lets the first call through."""
        self._core.loaded = loaded

    async def start(self, address: Address) -> Address:
        """Start answering requests. Before `answer_by` is called, the answer is an error that
        says the server is loading.

        Does not use `uvicorn.Server.serve`, which takes over the process's signals and wakes
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
            # Accepted sockets inherit both options. asyncio sets TCP_NODELAY only if the
            # socket names its protocol; without it a status and its body are 40 ms apart.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Otherwise the kernel lets the buffer grow to megabytes.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            listener.bind(where)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        await self._uvicorn.startup(sockets=[listener])
        return Address(address.host, listener.getsockname()[1])

    def stop_accepting(self) -> None:
        """Close the listening socket; open connections stay."""
        for server in self._uvicorn.servers:
            server.close()
        if self._handshakes is not None:
            self._handshakes.drop_all()

    async def stop(self) -> None:
        """Flush written answers, then close all connections. Safe to call again."""
        if self._uvicorn.started:
            self._uvicorn.started = False
            await self._uvicorn.shutdown()
            self._bodies.close()
