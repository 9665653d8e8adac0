"""gRPC connections: one without calls makes room for the next where there are many.

gRPC closes connections beyond its bound as they come, whosever they are, and those without
calls may stay for minutes: one caller could keep all others out. It closes none on request,
so this looks at the process's own sockets. A client whose quiet connection was closed opens
another one with its next call, unasked.
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
"""Between two looks at how many connections there are."""

_SPARE: Final = 8
"""One in so many places is kept free for new connections."""

KNOWN: Final = 4096
"""Connections without calls that are remembered."""

_DESCRIPTORS: Final = "/dev/fd"

_log = get_logger(__name__)

_Address = tuple[str, int]


@dataclass(slots=True)
class _Connection:
    """``used``: when its last call began or ended, or it was first seen."""

    used: float
    calls: int = 0
    has_called: bool = False


class Connections:
    """Who is connected to the gRPC port. `call` and `watch` belong to one event loop."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
        most: connections that gRPC lets be open.
        clock: seconds.
        """
        self._wanted = most - max(1, most // _SPARE)
        self._clock = clock
        self._known: OrderedDict[_Address, _Connection] = OrderedDict()
        """Those used last, at the end."""

    @contextmanager
    def call(self, peer: str) -> Iterator[None]:
        """While the block runs, the connection of a call, as gRPC names it, stays open."""
        known = self._used(_address(peer))
        known.has_called = True
        known.calls += 1
        try:
            yield
        finally:
            known.calls -= 1
            known.used = self._clock()

    async def watch(self, port: int) -> None:
        """Make room on ``port`` until cancelled. What goes wrong is logged once, and tried
        again: descriptors that have run out are a reason to make room, not to stop."""
        failing = False
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                # Of all kinds: a cheap look, and few of them cannot be many of ours.
                if len(os.listdir(_DESCRIPTORS)) > self._wanted:
                    began = self._clock()
                    self._make_room(await asyncio.to_thread(_accepted, port), began)
                failing = False
            except Exception as error:
                if not failing:
                    _log.error("no room was made for new gRPC connections", error)
                failing = True

    def _make_room(self, sockets: dict[_Address, int], began: float) -> None:
        """Close those without calls until few enough are left: first such as never made
        one, then those whose last one is longest ago.

        Args:
            sockets: those that are open.
            began: when they began to be listed. One that called later may lack in them.
        """
        for address in self._known.keys() - sockets.keys():
            known = self._known[address]
            if not known.calls and known.used < began:
                del self._known[address]  # it has gone
        for address in sockets:
            # Not `_used`, which forgets another one where many are known.
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
    """Descriptors of the connections that came to ``port``, by the other end's address."""
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
    """Of a connection that came to ``port``; else None."""
    # Not a duplicate, whose closing could end SQLite's lock of a file that has taken the
    # descriptor's number meanwhile.
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
    """End a connection, unless the descriptor is another's by now. gRPC closes it then."""
    with suppress(OSError):
        end = socket.socket(fileno=descriptor)
        try:
            if (end.getpeername()[0].removeprefix("::ffff:"), end.getpeername()[1]) == address:
                end.shutdown(socket.SHUT_RDWR)
                return True
        finally:
            end.detach()
    return False
