"""Which Host headers are answered: against DNS rebinding.

A web page may let its own name resolve to 127.0.0.1. The browser then takes this server for
the page's own, and lets it read the answers. Its requests still carry the page's name as
Host, so where only this machine can connect, only this machine's names are answered. There
are no CORS headers in any answer, so that a page of another origin cannot read one.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from typing import Final

from veneer_server.config import Address

__all__ = ["ANY_HOST", "AllowedHosts"]

ANY_HOST: Final = "*"
"""Among the allowed hosts: every name is."""

_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]*))(?::\d*)?")


class AllowedHosts:
    """The names by which one server may be called."""

    def __init__(self, address: Address, names: Collection[str]) -> None:
        """Args:
        address: where it listens. What other machines can reach has names that nobody here
            knows, so all are allowed there unless some are given.
        names: allowed beside those of the address.
        """
        self._any = ANY_HOST in names or not (names or address.loopback)
        self._names = {name.lower() for name in (*names, address.host)}

    def allow(self, host: bytes | str | None) -> bool:
        """Args: host: the Host header; None where HTTP/1.0 has none, which no browser sends."""
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
