"""File descriptors: raising the limit, and how many each port may take.

What is left for the process itself (`RESERVE`) is never given to callers: an engine, a
loader or a template's process can be started again whatever they do.
"""

from __future__ import annotations

import contextlib
import resource
from dataclasses import dataclass
from typing import Final

from veneer_server.logs import get_logger

__all__ = ["RESERVE", "SCRAPES", "Descriptors", "raise_limit", "share_descriptors"]

RESERVE: Final = 256
"""Descriptors for the process itself: files of uploads (16 each, 8 uploads), catalog,
child processes and their pipes, sockets that listen or are about to be refused."""

SCRAPES: Final = 64
"""Connections to the metrics port. One that asks for nothing makes room for the next; with so
many, none can be pushed out between its connecting and its asking."""

_FEWEST: Final = 8

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Descriptors:
    """How they are shared out.

    Attributes:
        limit: of the process.
        connections: that the gRPC port, and the HTTP port, may have open each.
    """

    limit: int
    connections: int


def raise_limit(wanted: int) -> int:
    """Raise the soft limit to ``wanted`` where it is less, or as far as the hard one allows;
    gives what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted:
        new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def share_descriptors(*, wanted: int, ports: int) -> Descriptors:
    """Raise the limit to what is needed, and share it out.

    Args:
        wanted: connections to each port, ``--max-connections``.
        ports: 1, or 2 with the HTTP gateway.
    """
    limit = raise_limit(wanted * ports + RESERVE + SCRAPES)
    room = (limit - RESERVE - SCRAPES) // ports
    connections = max(_FEWEST, min(wanted, room))
    if connections < wanted:
        _log.warning(
            "the limit of open files is low, so fewer connections are taken: raise it "
            "(ulimit -n), or lower --max-connections",
            open_files=limit,
            connections=connections,
            needed=wanted * ports + RESERVE + SCRAPES,
        )
    return Descriptors(limit, connections)
