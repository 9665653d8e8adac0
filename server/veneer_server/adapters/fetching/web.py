"""HTTPS client for GET: only to checked addresses, within bounds, following few redirects.

Each redirect is checked as the first URL was, and a token is sent to its own origin only.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import IO, Final, NoReturn
from urllib.parse import urljoin, urlsplit

from veneer_registry.errors import Aborted, AdapterInvalid, DiskFull, InvalidField

from veneer_server.adapters.fetching.addresses import Network, connect
from veneer_server.adapters.fetching.uris import Origin, parse_origin, refuse_uri

MOST_REDIRECTS: Final = 5
IDLE_S: Final = 30.0
"""Seconds that a host may be silent."""
WINDOW_S: Final = 30.0
"""Seconds over which the minimum rate is measured."""

_PIECE: Final = 256 << 10
_LONGEST_URL: Final = 8192
_PRINTABLE: Final = re.compile(r"[\x21-\x7e]+")
_DISGUISED: Final = re.compile(r"(?i)%2e|%2f|%5c|%00|\\|//|/\.\.?(/|$)")
"""Parts of a path that one side could read as another path."""
_GONE: Final = (404, 410)
_MOVED: Final = (301, 302, 303, 307, 308)


class Missing(Exception):
    """The file does not exist."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One parsed URL: the first one, or that of a redirect."""

    secure: bool
    origin: Origin
    target: str
    """Path and query."""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def place(self) -> str:
        """Host, and port if it is not the default one."""
        return self.origin.written(443 if self.secure else 80)

    @property
    def url(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.place}{self.target}"

    def __str__(self) -> str:
        """The URL without its query, which may contain a signature."""
        return self.url.partition("?")[0]


def parse_hop(url: str) -> Hop:
    """Parse a URL of http or https. Raises InvalidField (``cause``: ``redirect``)."""
    if len(url) > _LONGEST_URL or not _PRINTABLE.fullmatch(url):
        _no_redirect("a URL that is malformed")
    try:
        found = urlsplit(url)
    except ValueError:
        _no_redirect("a URL that is malformed")
    if found.scheme not in ("http", "https"):
        _no_redirect("a scheme other than https")
    if _DISGUISED.search(found.path):
        _no_redirect("an ambiguous path")
    try:
        origin = parse_origin(found.netloc)
    except InvalidField:
        _no_redirect("a host that is malformed")
    if found.scheme == "http" and ":" not in found.netloc.rpartition("]")[2]:
        origin = Origin(origin.host, 80)
    query = f"?{found.query}" if found.query else ""
    return Hop(found.scheme == "https", origin, (found.path or "/") + query)


def _led(hop: Hop, location: str) -> Hop:
    """Return the URL that a redirect leads to. Raises InvalidField."""
    try:
        return parse_hop(urljoin(hop.url, location))
    except ValueError:  # such as brackets that are no IPv6 address
        return _no_redirect("a URL that is malformed")


Permit = Callable[[Hop], tuple[Network, ...] | None]
"""Returns the private networks that a hop's host may be in; None if it may not be contacted."""


@dataclass(slots=True)
class WebClient:
    """Downloads files.

    Attributes:
        permit: decides whether a hop may be contacted.
        token: returns the Authorization header for a hop; "" for none. Only called for hops to
            the first origin.
        least_rate: minimum bytes a second, measured over `WINDOW_S`.
    """

    permit: Permit
    token: Callable[[Hop], str] = lambda hop: ""
    least_rate: int = 0
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    def get(self, url: str, into: IO[bytes], *, most: int, file: str) -> Mapping[str, str]:
        """Write the body of ``url`` to ``into``. Return the response's headers, merged with
        those of the redirects before it (names in lower case).

        Args:
            most: most bytes that the file may have.
            file: name of the file, for errors.

        Raises:
            Missing: the file does not exist.
            InvalidField: a hop may not be contacted.
            AdapterInvalid: the file is too large or sent compressed, or access is denied.
            Aborted: the file is cut short or arrives too slowly, or the host fails otherwise.
            DiskFull: the disk has no room for the file.
        """
        hop = first = parse_hop(url)
        headers: dict[str, str] = {}
        for _ in range(MOST_REDIRECTS + 1):
            networks = self.permit(hop)
            if networks is None:
                _no_redirect("a location that this server may not fetch from", str(hop))
            own = (hop.origin, hop.secure) == (first.origin, first.secure)
            token = self.token(hop) if own else ""
            try:
                with (
                    closing(_Connection(hop, networks, self.context)) as connection,
                    closing(_ask(connection, hop, token)) as answer,
                ):
                    headers |= {name.lower(): value for name, value in answer.getheaders()}
                    if answer.status not in _MOVED:
                        _check_status(answer.status, file, hop)
                        self._body(answer, into, most, file)
                        return headers
                    hop = _led(hop, answer.headers.get("location", ""))
            except (OSError, http.client.HTTPException) as error:
                raise _broken(file, str(hop), error) from error
        return _no_redirect(f"more than {MOST_REDIRECTS} redirects")

    def _body(
        self, answer: http.client.HTTPResponse, into: IO[bytes], most: int, file: str
    ) -> None:
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise _refused(file, "was sent compressed without being requested", "encoding")
        length = answer.length  # None if it is chunked, or ends with the connection
        if length is not None and length > most:
            raise too_large(file, most)
        received, window, since = 0, 0, time.monotonic()
        while data := answer.read1(_PIECE):
            received += len(data)
            window += len(data)
            if received > most:
                raise too_large(file, most)
            try:
                into.write(data)
            except OSError as error:
                raise DiskFull(
                    "the server's disk has no room for the adapter: free space, and try again",
                    detail=str(error),
                ) from error
            if (passed := time.monotonic() - since) >= WINDOW_S:
                if window < self.least_rate * passed:
                    raise Aborted(
                        f"{file} arrives too slowly, with less than {self.least_rate} bytes a "
                        "second: try again, or fetch from a faster host",
                        metadata={"file": file, "cause": "rate"},
                    )
                window, since = 0, time.monotonic()
        if length is not None and received != length:
            raise _cut_short(file, f"{received} of {length} bytes")


class _Connection(http.client.HTTPConnection):
    """Connects to a checked address; with https, TLS still verifies the host's own name."""

    def __init__(
        self, hop: Hop, networks: tuple[Network, ...], context: ssl.SSLContext
    ) -> None:
        super().__init__(hop.origin.host, hop.origin.port, timeout=IDLE_S)
        self._hop = hop
        self._networks = networks
        self._context = context

    def connect(self) -> None:
        connected = connect(self._hop.origin, self._networks, IDLE_S)
        self.sock: socket.socket = connected
        if self._hop.secure:
            try:
                self.sock = self._context.wrap_socket(
                    connected, server_hostname=self._hop.origin.host
                )
            except BaseException:
                connected.close()
                raise


def _ask(connection: _Connection, hop: Hop, token: str) -> http.client.HTTPResponse:
    connection.putrequest("GET", hop.target, skip_host=True, skip_accept_encoding=True)
    connection.putheader("Host", hop.place)
    connection.putheader("Accept-Encoding", "identity")
    connection.putheader("User-Agent", "veneer")
    connection.putheader("Connection", "close")
    if token:
        connection.putheader("Authorization", token)
    connection.endheaders()
    return connection.getresponse()


def _check_status(status: int, file: str, hop: Hop) -> None:
    if status == 200:
        return
    if status in _GONE:
        raise Missing
    if status in (401, 403):
        raise AdapterInvalid(
            f"{file}: the URI's host denies access ({status}): the operator can set a token "
            "with --fetch-token, or the file does not exist",
            metadata={"file": file, "cause": "access", "status": str(status)},
            detail=str(hop),
        )
    raise Aborted(
        f"{file}: the URI's host answers with status {status}: check the URI, or try again "
        "later",
        metadata={"file": file, "cause": "status", "status": str(status)},
        detail=str(hop),
    )


def _no_redirect(where: str, detail: str = "") -> NoReturn:
    refuse_uri(
        f"it redirects to {where}: give the URI of the files themselves, or ask the operator "
        "to allow that location",
        cause="redirect",
        detail=detail,
    )


def _refused(file: str, why: str, cause: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{file} {why}: serve the file uncompressed", metadata={"file": file, "cause": cause}
    )


def too_large(file: str, most: int) -> AdapterInvalid:
    """Return the error for a file with more than ``most`` bytes."""
    return AdapterInvalid(
        f"{file} has more than {most} bytes: make it smaller, or start the server with a "
        "larger --max-adapter-bytes",
        metadata={"file": file, "cause": "size", "limit": str(most)},
    )


def _cut_short(file: str, detail: str) -> Aborted:
    return Aborted(
        f"{file} was cut short by the URI's host: try again",
        metadata={"file": file, "cause": "cut_short"},
        detail=detail,
    )


def _broken(file: str, where: str, error: Exception) -> Aborted:
    if isinstance(error, ssl.SSLError):
        return Aborted(
            f"{file}: the URI's host cannot be trusted: its certificate must be signed by an "
            "authority of the system, or of SSL_CERT_FILE in the server's environment",
            metadata={"field": "uri", "cause": "certificate"},
            detail=f"{where}: {error}",
        )
    if isinstance(error, TimeoutError):
        return Aborted(
            f"{file}: the URI's host was silent for {IDLE_S:g} s: try again",
            metadata={"file": file, "cause": "silent"},
            detail=where,
        )
    return _cut_short(file, f"{where}: {error}")
