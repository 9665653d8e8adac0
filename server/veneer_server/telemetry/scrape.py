"""The port that Prometheus scrapes: few connections with short time limits, one page at a time.

prometheus_client's own server starts a thread for each connection and waits forever, so idle
connections could take every file descriptor of the process.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Iterable
from http import HTTPStatus
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from veneer_registry.errors import InvalidField, PermissionDenied, Unauthenticated, Unavailable

from veneer_server.access.authenticate import ONCE, Access, Credentials
from veneer_server.access.certificates import shown
from veneer_server.access.handshakes import Handshakes
from veneer_server.access.methods import SCRAPE
from veneer_server.config import Address
from veneer_server.logs import get_logger
from veneer_server.queues.connection_places import host_of
from veneer_server.system.descriptors import SCRAPES, UNREAD_SCRAPES
from veneer_server.system.hosts import AllowedHosts, foreign_page
from veneer_server.telemetry.pages import Pages

MAX_HEAD: Final = 8 << 10
"""Maximum bytes of a request."""

_LOOK_S: Final = 0.005
"""How long there may be too many connections. Data that has arrived on the new ones is read
first, so that a whole request is never dropped unread."""

LIMIT_S: Final = 10.0
"""Seconds that a connection may be open, in total."""

_END: Final = b"\r\n\r\n"
_ONCE: Final = ONCE | {"host", "content-length", "content-type", "transfer-encoding"}

_log = get_logger(__name__)


class _Request(NamedTuple):
    method: str
    target: str
    headers: dict[str, str]


class ScrapeServer:
    """Answers scrapes from `start` to `stop`. Belongs to one event loop."""

    def __init__(
        self,
        pages: Pages,
        hosts: AllowedHosts,
        *,
        connections: int = SCRAPES,
        limit_s: float = LIMIT_S,
        access: Access | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Args:
        pages: makes the answers; its creator closes it.
        hosts: host names that requests may use.
        connections: maximum number of open connections. A further one replaces one that has
            not sent a request, or else one that has not read its answer, or else any; among
            these, the oldest one of the host with the most connections.
        limit_s: seconds that each may be open.
        access: authenticates scrapes; None lets everybody in.
        tls: None for plain HTTP.
        """
        self.access = access or Access()
        self._handshakes = None if tls is None else Handshakes(tls, limit_s=limit_s)
        self.limit_s = limit_s
        self.hosts = hosts
        self._most = connections
        self._pages = pages
        self.open: dict[_Connection, None] = {}
        """Connections, oldest first."""
        self._server: asyncio.Server | None = None

    async def start(self, address: Address) -> Address:
        """Answer from now on. Raises OSError if the address cannot be bound."""

        def connect() -> asyncio.Protocol:
            return _Connection(self)

        if self._handshakes is not None:
            connect = self._handshakes.before(connect)
        self._server = await asyncio.get_running_loop().create_server(
            connect, address.host, address.port, backlog=UNREAD_SCRAPES // 2
        )
        return Address(address.host, self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Close all connections. Safe to call again."""
        if self._server is not None:
            self._server.close()
        if self._handshakes is not None:
            self._handshakes.drop_all()
        for connection in tuple(self.open):
            connection.drop()

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self.open)

    # ------------------------------------------------------- for the connections

    def opened(self, connection: _Connection) -> None:
        """Add a new connection; if there are too many, others are dropped soon."""
        self.open[connection] = None
        if len(self.open) > self._most + UNREAD_SCRAPES:
            self._trim()
        elif len(self.open) == self._most + 1:
            asyncio.get_running_loop().call_later(_LOOK_S, self._trim)

    def _trim(self) -> None:
        """Drop connections while there are too many."""
        while len(self.open) > self._most:
            hosts = Counter(each.host for each in self.open)
            # The oldest of those that are equal.
            least = min(self.open, key=lambda each: (each.worth(), -hosts[each.host]))
            least.drop()
            self.open.pop(least, None)

    def closed(self, connection: _Connection) -> None:
        """Remove a connection that has ended."""
        self.open.pop(connection, None)

    async def page(self, request: _Request) -> bytes:
        """The whole answer to a request; its path is ignored."""
        page = await self._pages.page(
            urlsplit(request.target).query,
            request.headers.get("accept", ""),
            request.headers.get("accept-encoding", ""),
        )
        if page is None:
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, ("Retry-After", "1"))
        body = b"" if request.method == "HEAD" else page.body
        return _response("200 OK", page.headers, body, len(page.body))


class _Connection(asyncio.Protocol):
    """Reads one request, sends one answer, closes."""

    def __init__(self, server: ScrapeServer) -> None:
        self.asked = False
        """Whether a whole request has arrived."""
        self.answered = False
        """Whether the answer has been written; the client may not have read all of it."""
        self.host = ""
        """The peer's host, see `host_of`."""
        self._server = server
        self._head = bytearray()
        self._transport: asyncio.Transport | None = None
        self._late: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self.host = host_of(f"{peer[0]}:{peer[1]}") if isinstance(peer, tuple) else ""
        loop = asyncio.get_running_loop()
        self._late = loop.call_later(self._server.limit_s, self.drop)
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        if self._task is not None:
            self._task.cancel()
        self._server.closed(self)

    def worth(self) -> int:
        """If there are too many connections, those with the lowest value are dropped first."""
        if not self.asked:
            return 0
        return 1 if self.answered else 2

    def drop(self) -> None:
        """Close the connection, discarding unsent data."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.asked:
            return  # one answer per connection
        self._head += data
        end = self._head.find(_END)
        if end < 0 and len(self._head) <= MAX_HEAD:
            return
        self.asked = True
        if not 0 <= end <= MAX_HEAD:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif (request := _parse(bytes(self._head[:end]))) is None:
            self._refuse(HTTPStatus.BAD_REQUEST)
        elif request.method not in ("GET", "HEAD"):
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED)
        elif not self._server.hosts.allow(request.headers.get("host")):
            self._refuse(HTTPStatus.FORBIDDEN)
        else:
            self._task = asyncio.get_running_loop().create_task(self._reply(request))

    def _refuse(self, status: HTTPStatus) -> None:
        self._send(_refusal(status))

    async def _reply(self, request: _Request) -> None:
        try:
            assert self._transport is not None
            certificate = shown(self._transport)
            credentials = Credentials.of_headers(request.headers, certificate)
            strangers = not (self._server.access.asks and credentials.secret)
            if strangers and foreign_page(request.method, request.headers):
                self._refuse(HTTPStatus.FORBIDDEN)
                return
            await self._server.access.admit(SCRAPE, credentials)
            self._send(await self._server.page(request))
        except Unauthenticated:
            self._send(_refusal(HTTPStatus.UNAUTHORIZED, ("WWW-Authenticate", "Bearer")))
        except InvalidField:
            self._refuse(HTTPStatus.BAD_REQUEST)
        except PermissionDenied:
            self._refuse(HTTPStatus.FORBIDDEN)
        except Unavailable:  # the token issuer cannot be reached
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        except Exception as error:
            _log.error("a scrape failed", error)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR)

    def _send(self, answer: bytes) -> None:
        assert self._transport is not None
        self.answered = True
        self._transport.write(answer)
        self._transport.close()  # once all of it is sent, or the time is up


def _parse(head: bytes) -> _Request | None:
    """Parse a request's head; return None if it is not valid HTTP."""
    line, *fields = head.decode("latin-1").split("\r\n")
    words = line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return None
    headers = {}
    for field in fields:
        name, colon, value = field.partition(":")
        if not colon:
            return None
        name = name.strip().lower()
        if name in _ONCE and name in headers:
            return None  # ambiguous
        headers[name] = value.strip()
    return _Request(words[0], words[1], headers)


def _refusal(status: HTTPStatus, *headers: tuple[str, str]) -> bytes:
    return _response(f"{status.value} {status.phrase}", headers, b"", 0)


def _response(
    status: str, headers: Iterable[tuple[str, str]], body: bytes, length: int
) -> bytes:
    lines = [f"HTTP/1.1 {status}"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines += [f"Content-Length: {length}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body
