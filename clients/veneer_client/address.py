"""Parses a server address in the forms that people write."""

from __future__ import annotations

import os
import re
from typing import Final

from veneer_registry.errors import InvalidField

__all__ = ["DEFAULT_ADDRESS", "is_plain", "is_tls", "server_address"]

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
_PORT: Final = DEFAULT_ADDRESS.rpartition(":")[2]
_PLAIN: Final = ("http", "grpc")
_TLS: Final = ("https", "grpcs")
_OTHERS: Final = frozenset({"unix", "unix-abstract", "dns", "ipv4", "ipv6", "vsock", "xds"})
"""gRPC's own schemes; such addresses are not changed."""


def server_address(given: str | None = None) -> str:
    """Return ``HOST:PORT`` from ``given``, else from ``VENEER_SERVER``, else the default.

    Also accepts ``http://HOST:PORT``, ``https://HOST:PORT`` (see `is_tls`) and a host without a
    port.

    Raises:
        InvalidField: not a server address.
    """
    text = (given or os.environ.get("VENEER_SERVER") or DEFAULT_ADDRESS).strip()
    if text.partition(":")[0] in _OTHERS and not re.fullmatch(r"[\w-]+:\d+", text):
        return text
    scheme, found, rest = text.partition("://")
    host = rest if found else text
    host = host.removesuffix("/")
    known = not found or scheme.lower() in (*_PLAIN, *_TLS)
    if not known or not re.fullmatch(r"\[[0-9a-fA-F:.%\w]+\](:\d+)?|[^\s/:]+(:\d+)?", host):
        raise _no_address(text, "give HOST:PORT, such as gpu1:50051 or [::1]:50051")
    port = re.search(r":(\d+)$", host)
    if port is None:
        return f"{host}:{_PORT}"
    if not 0 < int(port[1]) < 65536:  # gRPC would take it modulo 65536
        raise _no_address(text, "ports are 1 to 65535")
    return host


def is_tls(given: str | None) -> bool:
    """Whether the address says that the server has TLS."""
    return _scheme(given) in _TLS


def is_plain(given: str | None) -> bool:
    """Whether the address says that the server has no TLS."""
    return _scheme(given) in _PLAIN


def _scheme(given: str | None) -> str:
    scheme, found, _ = (given or "").strip().lower().partition("://")
    return scheme if found else ""


def _no_address(text: str, fix: str) -> InvalidField:
    return InvalidField(
        f"{text!r} is not the address of a Veneer server: {fix}", metadata={"field": "server"}
    )
