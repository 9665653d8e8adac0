"""Decides which web pages may call a server without keys: protects a local server.

A browser sends requests for any page that its user opens, also to this machine. Two checks keep
pages of strangers out:

* `AllowedHosts`, against DNS rebinding. A page may make its own name resolve to 127.0.0.1. The
  browser then takes this server for the page's own, and lets the page read the answers. Its
  requests still carry the page's name as Host, so only this server's own names are accepted.
* `foreign_page`, against requests that a page may send to another origin without asking first,
  such as ``POST /pause``. Browsers say in Origin and Sec-Fetch-Site where a request comes from,
  and no page can change these headers.

A server with keys needs neither: a page of a stranger has no key. A browser shows its
certificate for any page, so callers who show nothing else are checked as if there were no keys.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Collection, Mapping
from typing import Final

from veneer_server.config import Address

ANY_HOST: Final = "*"
"""As an allowed host: every name is allowed."""

_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]*))(?::(\d*))?")
_NOBODYS: Final = (".localhost", ".svc", ".local", ".internal", ".home.arpa", ".test")
"""Suffixes of names that no stranger can register: reserved ones (RFC 6761, 6762 and 8375,
ICANN's .internal), and Kubernetes's."""
_PORTS: Final = {"http": "80", "https": "443"}


class AllowedHosts:
    """The names by which one server may be called."""

    def __init__(
        self, address: Address, names: Collection[str], *, keyless: bool = False
    ) -> None:
        """Args:
        address: where the server listens. If other machines can reach it, its names are not
            known here, so all are allowed unless some are given.
        names: allowed in addition to the address's own.
        keyless: whether callers need no key. If other machines can then reach the address,
            names that a stranger could have registered are refused unless they are given.
        """
        self._private = keyless and not (names or address.loopback)
        self._any = ANY_HOST in names or not (names or address.loopback or keyless)
        self._names = {name.lower() for name in (*names, address.host, socket.gethostname())}

    def allow(self, host: bytes | str | None) -> bool:
        """Whether a request may use this name.

        Args:
            host: the Host header; None if HTTP/1.0 has none, which no browser sends.
        """
        if host is None or self._any:
            return True
        text = (host if isinstance(host, str) else host.decode("latin-1")).strip()
        match = _HOST.fullmatch(text)
        name = ((match[1] or match[2]) if match else text).lower().removesuffix(".")
        if name in self._names or name == "localhost":
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return self._private and ("." not in name or name.endswith(_NOBODYS))
        return self._private or address.is_loopback


def foreign_page(
    method: str,
    headers: Mapping[str, str],
    allows: Callable[[str], bool] = lambda origin: False,
) -> bool:
    """Whether a browser sends a request on behalf of a page of another origin.

    Following a link (a navigation) does not count, since no other page sees the answer.

    Args:
        headers: by lower-case name. Programs other than browsers send neither Origin nor
            Sec-Fetch-Site.
        allows: whether pages of an origin may call; ``*`` stands for every origin.
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is None and site is None:
        return False
    if allows("*" if origin is None else origin):
        return False
    if origin is not None and not _same(origin, headers.get("host", "")):
        return True
    if site in (None, "none", "same-origin"):
        return False
    opened = headers.get("sec-fetch-mode") == "navigate"
    shown = headers.get("sec-fetch-dest") == "document"
    return not (opened and shown and method in ("GET", "HEAD"))


def _same(origin: str, host: str) -> bool:
    """Whether an origin matches a Host header. The scheme is not compared: a proxy may have
    terminated TLS."""
    scheme, colon, rest = origin.lower().partition("://")
    page, own = _HOST.fullmatch(rest), _HOST.fullmatch(host.strip().lower())
    if not colon or page is None or own is None or not rest:
        return False
    usual = _PORTS.get(scheme, "")
    return (page[1] or page[2], page[3] or usual) == (own[1] or own[2], own[3] or usual)
