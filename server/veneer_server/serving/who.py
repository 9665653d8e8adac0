"""Identifies the caller, for the history of admin calls and for taking turns."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Final
from urllib.parse import unquote

from veneer_registry.rows import Who

from veneer_server.access.principal import PRINCIPAL
from veneer_server.queues.fairness import FAIRNESS, Sender

__all__ = ["CALLER", "sender", "who_calls", "who_is_here"]

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""The connection of the current call: ``host:port``, over gRPC after ``ipv4:`` or ``ipv6:``."""

ACTOR: Final = "veneer-actor"
_LONGEST: Final = 128
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")


def who_calls(context: Any) -> Who:
    """The caller's name and its address. Where callers need not say who they are, the name is
    what metadata ``veneer-actor`` claims."""
    if name := PRINCIPAL.get().name:
        return Who(name, context.peer())
    metadata = dict(context.invocation_metadata() or ())
    given = str(metadata.get(ACTOR, ""))[:_LONGEST]
    return Who(_UNPRINTABLE.sub("?", given), context.peer())


def who_is_here() -> Who:
    """The caller of an HTTP request."""
    return Who(PRINCIPAL.get().name, CALLER.get())


def sender() -> Sender:
    """Whose turn the current call uses, wherever one caller could keep others waiting."""
    who, connection, user = PRINCIPAL.get(), CALLER.get(), FAIRNESS.get().fairness_id
    key = who.name or _host(connection)
    return Sender(who.tenant, key, user, "" if user else connection)


def _host(connection: str) -> str:
    """The host of a connection without its port; of an IPv6 address the first 64 bits, of which
    a host has as many addresses as it likes."""
    kind, _, rest = connection.partition(":")
    host = (rest if kind in ("ipv4", "ipv6") else connection).rpartition(":")[0]
    if ":" in host or "%" in host:
        host = unquote(host).strip("[]").partition("%")[0]
        with suppress(ValueError):
            address = ipaddress.IPv6Address(host)
            if (mapped := address.ipv4_mapped) is not None:
                return str(mapped)
            return str(ipaddress.IPv6Network((address, 64), strict=False))
    return host
