"""File descriptors: raises the limit, and divides them between the ports.

Those for the process itself (`RESERVE`) are never given to callers, so that an engine,
loader or template process can be restarted whatever callers do.
"""

from __future__ import annotations

import contextlib
import resource
from dataclasses import dataclass
from typing import Final

from veneer_server.logs import get_logger

RESERVE: Final = 256
"""Descriptors for the process itself: files of uploads (16 each, 8 uploads), catalog,
child processes and their pipes, sockets that listen or are about to be refused."""

SCRAPES: Final = 64
"""Connections to the metrics port. Idle ones are closed to make room for new ones."""

UNREAD_SCRAPES: Final = 32
"""Connections to the metrics port that may exceed `SCRAPES` for some milliseconds. The event
loop accepts half as many at once, and twice before it reads what the first ones sent."""

HANDSHAKES: Final = 64
"""Connections to each HTTP port whose TLS handshake is not done. A further one replaces the
oldest one of the host with the most."""

UNREAD: Final = 64
"""Connections to each port that may exceed its limit for some milliseconds: data that has
arrived on the new ones is read before deciding which to close."""

TENANT: Final = 16
"""Descriptors for each tenant beside the first: its lock, its catalog, the catalog's log."""

_KEPT: Final = RESERVE + SCRAPES + UNREAD_SCRAPES + 2 * HANDSHAKES

_FEWEST: Final = 8

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Descriptors:
    """How descriptors are divided.

    Attributes:
        limit: the process's limit.
        connections: maximum open connections of each gRPC port, and of the HTTP port.
        tenants: maximum number of open tenants, at least one.
    """

    limit: int
    connections: int
    tenants: int = 1


def raise_limit(wanted: int) -> int:
    """Raise the soft limit to ``wanted`` if it is lower, or as far as the hard limit allows;
    returns the new soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted:
        new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def share_descriptors(*, wanted: int, ports: int, tenants: int = 1) -> Descriptors:
    """Raise the limit to what is needed, and divide it.

    Args:
        wanted: connections to each port, ``--max-connections``.
        ports: 1, and one more each for the HTTP gateway and the admin port.
        tenants: ``--max-tenants``. They get the descriptors that connections leave.
    """
    needed = (wanted + UNREAD) * ports + _KEPT
    limit = raise_limit(needed + (tenants - 1) * TENANT)
    room = (limit - _KEPT) // ports - UNREAD
    connections = max(_FEWEST, min(wanted, room))
    if connections < wanted:
        _log.warning(
            "low limit on open files, accepting fewer connections: raise it (ulimit -n), or "
            "lower --max-connections",
            open_files=limit,
            connections=connections,
            needed=needed,
        )
    left = max(0, limit - _KEPT - (connections + UNREAD) * ports)
    return Descriptors(limit, connections, min(tenants, 1 + left // TENANT))
