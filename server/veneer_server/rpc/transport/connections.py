"""Closes idle gRPC connections to make room for new ones.

gRPC closes connections beyond its limit as they arrive, whoever opened them, while idle ones
may stay for minutes: one caller could keep everyone else out. gRPC cannot be asked to close a
connection, so this module works on the process's own sockets. A client whose idle connection
was closed opens another by itself with its next call.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from veneer_server.logs import get_logger

__all__ = ["KNOWN", "Connections"]

LOOK_S: Final = 0.25
"""Seconds between two checks of the number of connections."""

_SPARE: Final = 8
"""One in this many places is kept free for new connections."""

KNOWN: Final = 4096
"""Connections without calls that are remembered."""

_DESCRIPTORS: Final = "/dev/fd"

_log = get_logger(__name__)

_Address = tuple[str, int]


@dataclass(slots=True)
class _Connection:
    """``used``: when its last call began or ended, or else when it was first seen."""

    used: float
    calls: int = 0
    has_called: bool = False


class Connections:
    """The connections to the gRPC port. `call` and `watch` belong to one event loop."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
        most: connections that gRPC allows to be open.
        clock: seconds.
        """
        self._wanted = most - max(1, most // _SPARE)
        self._clock = clock
        self._known: OrderedDict[_Address, _Connection] = OrderedDict()
        """Least recently used first."""

    @contextmanager
    def call(self, peer: str) -> Iterator[None]:
        """Keep a call's connection open while the block runs. ``peer``: gRPC's name for it."""
        known = self._used(_address(peer))
        known.has_called = True
        known.calls += 1
        try:
            yield
        finally:
            known.calls -= 1
            known.used = self._clock()

    async def watch(self, port: int) -> None:
        """Make room on ``port`` until cancelled. After an error, which is logged once, it tries
        again: running out of descriptors is a reason to make room, not to stop."""
        failing = False
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                # A cheap first check: descriptors of all kinds outnumber our connections.
                if len(os.listdir(_DESCRIPTORS)) > self._wanted:
                    began = self._clock()
                    self._make_room(await asyncio.to_thread(_accepted, port), began)
                failing = False
            except Exception as error:
                if not failing:
                    _log.error("could not make room for new gRPC connections", error)
                failing = True

    def _make_room(self, sockets: dict[_Address, int], began: float) -> None:
        """Close connections without calls until few enough are left: first those that never
        made a call, then the least recently used.

        Args:
            sockets: the open ones.
            began: when listing them began. A connection used since may be missing.
        """
        for address in self._known.keys() - sockets.keys():
            known = self._known[address]
            if not known.calls and known.used < began:
                del self._known[address]  # it is closed
        for address in sockets:
            # Not `_used`, which drops another connection when many are known.
            self._known.setdefault(address, _Connection(began))
        idle = [address for address in sockets if not self._known[address].calls]
        idle.sort(key=lambda each: (self._known[each].has_called, self._known[each].used))
        too_many = max(0, len(sockets) - self._wanted)
        closed = sum(_close(sockets[address], address) for address in idle[:too_many])
        if closed:
            _log.info("idle gRPC connections closed to make room", count=closed)

    def _used(self, address: _Address) -> _Connection:
        now = self._clock()
        known = self._known.setdefault(address, _Connection(now))
        known.used = now
        self._known.move_to_end(address)
        if len(self._known) > KNOWN:
            for other, each in self._known.items():
                if not each.calls and other != address:
                    del self._known[other]
                    break
        return known


def _address(peer: str) -> _Address:
    """Of ``ipv4:10.0.0.1:5000`` or ``ipv6:%5B::1%5D:5000``."""
    host, _, port = unquote(peer.partition(":")[2]).rpartition(":")
    return host.strip("[]"), int(port) if port.isdigit() else 0


def _accepted(port: int) -> dict[_Address, int]:
    """Descriptors of the connections accepted on ``port``, by the peer's address."""
    found = {}
    for name in os.listdir(_DESCRIPTORS):
        with suppress(OSError):
            descriptor = int(name)
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            if (address := _other_end(descriptor, port)) is not None:
                found[address] = descriptor
    return found


def _other_end(descriptor: int, port: int) -> _Address | None:
    """The peer's address, if the descriptor is a connection accepted on ``port``; else None."""
    # Not a duplicate: the number may by now be a file of SQLite's, and closing a duplicate
    # of that would release SQLite's lock.
    end = socket.socket(fileno=descriptor)
    try:
        if end.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        if end.getsockname()[1] != port:
            return None
        host, other = end.getpeername()[:2]
        return host.removeprefix("::ffff:"), other
    finally:
        end.detach()


def _close(descriptor: int, address: _Address) -> bool:
    """Shut a connection down, unless the descriptor has been reused. gRPC then closes it."""
    with suppress(OSError):
        end = socket.socket(fileno=descriptor)
        try:
            if (end.getpeername()[0].removeprefix("::ffff:"), end.getpeername()[1]) == address:
                end.shutdown(socket.SHUT_RDWR)
                return True
        finally:
            end.detach()
    return False
