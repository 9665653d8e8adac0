"""Which Host headers are accepted: a defence against DNS rebinding.

A web page may make its own name resolve to 127.0.0.1. The browser then takes this server for
the page's own, and lets the page read the responses. Its requests still carry the page's name
as Host, so if only this machine can connect, only this machine's names are accepted. No
response has CORS headers, so that a page of another origin cannot read one.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from typing import Final

from veneer_server.config import Address

__all__ = ["ANY_HOST", "AllowedHosts"]

ANY_HOST: Final = "*"
"""As an allowed host: every name is allowed."""

_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]*))(?::\d*)?")


class AllowedHosts:
    """The names by which one server may be called."""

    def __init__(self, address: Address, names: Collection[str]) -> None:
        """Args:
        address: where the server listens. If other machines can reach it, its names are not
            known here, so all are allowed unless some are given.
        names: allowed in addition to the address's own.
        """
        self._any = ANY_HOST in names or not (names or address.loopback)
        self._names = {name.lower() for name in (*names, address.host)}

    def allow(self, host: bytes | str | None) -> bool:
        """Args: host: the Host header; None if HTTP/1.0 has none, which no browser sends."""
        if host is None or self._any:
            return True
        text = (host if isinstance(host, str) else host.decode("latin-1")).strip()
        match = _HOST.fullmatch(text)
        name = ((match[1] or match[2]) if match else text).lower().removesuffix(".")
        return name in self._names or name == "localhost" or _is_loopback(name)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
