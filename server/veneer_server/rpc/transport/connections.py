"""Closes gRPC connections that wait for their peer, to make room for new ones.

gRPC closes connections beyond its limit as they arrive, whoever opened them, while idle ones
may stay for minutes: one caller could keep everyone else out. gRPC cannot be asked to close a
connection, so this module works on the process's own sockets. `OpenConnections` says which one
to close. A connection whose calls have not arrived whole counts as waiting, like one without
calls. A client whose idle connection was closed opens another by itself with its next call.
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
from veneer_server.queues.connection_places import (
    STALLED_S,
    OpenConnection,
    OpenConnections,
    host_of,
)
from veneer_server.queues.recent import Recent

LOOK_S: Final = 0.25
"""Seconds between two checks of the number of connections."""

_SOON_S: Final = 0.03
"""The same after a check that had to close some: others may be arriving by the hundred."""

_SPARE: Final = 8
"""One in this many places is kept free for new connections."""

KNOWN: Final = 4096
"""Most connections that are remembered. Beyond it, one without calls is forgotten."""

_CLOSING_S: Final = 1.0
"""How long a closed connection whose descriptor still exists is not counted."""

_DESCRIPTORS: Final = "/dev/fd"

_log = get_logger(__name__)

_Address = tuple[str, int]


@dataclass(slots=True)
class _Connection:
    """A known connection. ``used``: when its last call began or ended, or it was first seen.
    ``whole``: calls that have arrived; ``watching``: those of them that only wait for
    events."""

    place: OpenConnection
    used: float
    calls: int = 0
    whole: int = 0
    watching: int = 0


class OpenCall:
    """One open call. It reports its progress to `Connections`."""

    def __init__(self, connections: Connections, connection: _Connection) -> None:
        self._connections = connections
        self._connection = connection
        self._whole = self._watching = False

    def arrived(self, *, watching: bool = False) -> None:
        """Record that the request is whole. Args: watching: whether the call waits for events,
        maybe for ever."""
        self._whole, self._watching = True, watching
        self._connection.whole += 1
        self._connection.watching += watching
        self._connections.tell(self._connection, progressed=True)

    def earned(self, tenant: str) -> None:
        """Record that the caller has shown a valid key of this tenant; "" for one whom a server
        without keys has answered without an error."""
        self._connections.earned(self._connection, tenant)

    def ended(self) -> None:
        """Record that the call is over."""
        connection = self._connection
        connection.calls -= 1
        connection.whole -= self._whole
        connection.watching -= self._watching
        self._connections.tell(connection, progressed=self._whole)


class Connections:
    """The connections to the gRPC port. `call` and `watch` belong to one event loop."""

    def __init__(
        self, most: int, *, keyless: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args:
        most: most connections that gRPC allows to be open.
        keyless: whether callers need no key.
        clock: returns the time in seconds.
        """
        self._wanted = most - max(1, most // _SPARE)
        self._clock = clock
        self._places = OpenConnections(self._wanted, keyless=keyless, clock=clock)
        self._known: OrderedDict[_Address, _Connection] = OrderedDict()
        """Least recently used first."""
        self._by_place: dict[OpenConnection, _Address] = {}
        self._given_up: set[OpenConnection] = set()
        self._closing: dict[_Address, float] = {}
        """Closed connections, and when; gRPC takes a while to let their descriptors go."""
        self._looked = clock()
        """When the number of connections was last checked."""

    @contextmanager
    def call(self, peer: str) -> Iterator[OpenCall]:
        """Count a call while the block runs. ``peer``: gRPC's name for its connection."""
        known = self._used(_address(peer))
        known.calls += 1
        call = OpenCall(self, known)
        self.tell(known, progressed=True)  # a whole head has arrived
        try:
            yield call
        finally:
            known.used = self._clock()
            call.ended()

    def tell(self, known: _Connection, *, progressed: bool) -> None:
        """Tell `OpenConnections` what a connection now waits for."""
        if known.place not in self._by_place:
            return
        if progressed:
            self._places.progressed(known.place)
        if known.whole > known.watching:
            self._places.busy(known.place)
        elif known.watching:
            self._places.watches(known.place)
        else:
            self._places.waits(known.place, asking=known.calls > 0)

    def earned(self, known: _Connection, tenant: str) -> None:
        """Mark a connection as earned by a caller."""
        if known.place not in self._by_place:
            return
        other = self._places.earns(known.place, tenant or known.place.host)
        if other is not None:
            self._given_up.add(other)

    async def watch(self, port: int) -> None:
        """Make room on ``port`` until cancelled. After an error, which is logged once, it tries
        again: running out of descriptors is a reason to make room, not to stop."""
        failing = soon = False
        while True:
            await asyncio.sleep(min(LOOK_S, _SOON_S) if soon else LOOK_S)
            try:
                soon = False
                # A cheap first check: descriptors of all kinds outnumber our connections.
                began = self._clock()
                if self._given_up or len(os.listdir(_DESCRIPTORS)) > self._wanted:
                    soon = self._make_room(await asyncio.to_thread(_accepted, port), began)
                self._looked = began
                failing = False
            except Exception as error:
                if not failing:
                    _log.error("could not make room for new gRPC connections", error)
                failing = True

    def _make_room(self, sockets: dict[_Address, int], began: float) -> bool:
        """Close connections until few enough are left; returns whether to look again soon.

        Args:
            sockets: descriptors of the open connections.
            began: when listing them began. A connection used since may be missing.
        """
        for address, at in tuple(self._closing.items()):
            if sockets.pop(address, None) is None or began - at > _CLOSING_S:
                del self._closing[address]
        for address in self._known.keys() - sockets.keys():
            known = self._known[address]
            if not known.calls and known.used < began:
                self._forget(address)  # it is closed
        # The data of connections that are new since the last check may not have been read yet,
        # so they stay until the next check. Then those without a call go first.
        before = max(self._looked, began - STALLED_S / 2)
        for address in sockets:
            # Not `_used`, which drops another connection when many are known.
            if address not in self._known:
                self._add(address, began, before)
        if not self._places.crowded:
            self._given_up.clear()
        count, closed = len(sockets), 0
        while self._given_up or count > self._wanted:
            given_up = bool(self._given_up)
            place = self._given_up.pop() if given_up else self._places.victim(before=before)
            if place is None:
                break
            gone = self._by_place[place]
            if gone not in sockets or place.queue is None or place.since >= began:
                if given_up:  # it has called again
                    continue
                break
            self._forget(gone)
            self._closing[gone] = began
            count -= 1
            closed += _close(sockets[gone], gone)
        if closed:
            _log.info("gRPC connections closed to make room", count=closed)
        return closed > 0 or count > self._wanted

    def _used(self, address: _Address) -> _Connection:
        now = self._clock()
        self._closing.pop(address, None)
        if (known := self._known.get(address)) is None:
            known = self._add(address, now)
        known.used = now
        self._known.move_to_end(address)
        if len(self._known) > KNOWN:
            for other, each in self._known.items():
                if not each.calls and other != address:
                    self._forget(other)
                    break
        return known

    def _add(self, address: _Address, now: float, since: float | None = None) -> _Connection:
        place = self._places.join(host_of(f"{address[0]}:{address[1]}"), since)
        self._by_place[place] = address
        known = self._known[address] = _Connection(place, now)
        return known

    def _forget(self, address: _Address) -> None:
        place = self._known.pop(address).place
        self._by_place.pop(place)
        self._given_up.discard(place)
        self._places.leave(place)


def _address(peer: str) -> _Address:
    """The address in ``ipv4:10.0.0.1:5000`` or ``ipv6:%5B::1%5D:5000``."""
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


# -------------------- standings
# Whether each connection's recent messages arrived in time; see `receiving`.

LATE_S: Final = 10.0
"""How long a connection counts as late."""

PAUSE_S: Final = 0.25
"""How long a connection that lost a place is not read: its next message may be slow too."""

_KNOWN: Final = 4096
"""Most connections that are remembered."""


@dataclass(slots=True)
class _Standing:
    prompt: bool = False
    late_until: float = 0.0
    paused_until: float = 0.0


_UNKNOWN: Final = _Standing()


class Standings:
    """Records whether connections are prompt or late.

    A connection is *prompt* once a message of it was whole when it was read, until one is late.
    It is *late* for `LATE_S` after a message that did not arrive in time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Args: clock: returns the time in seconds."""
        self._clock = clock
        self._by_peer: Recent[str, _Standing] = Recent(_KNOWN)

    def was_prompt(self, peer: str) -> None:
        """Record a message that was whole when it was read."""
        self._known(peer).prompt = True

    def was_late(self, peer: str, *, displaced: bool) -> None:
        """Record a message that did not arrive in time, and whether it lost its place."""
        known, now = self._known(peer), self._clock()
        known.prompt, known.late_until = False, now + LATE_S
        if displaced:
            known.paused_until = now + PAUSE_S

    def prompt(self, peer: str) -> bool:
        """Whether a message was whole when read, and none has been late since."""
        return self._by_peer.get(peer, _UNKNOWN).prompt

    def late(self, peer: str) -> bool:
        """Whether a message was late within the last `LATE_S`."""
        return self._clock() < self._by_peer.get(peer, _UNKNOWN).late_until

    def may_be_read(self, peer: str, held: int) -> bool:
        """Whether a connection that holds ``held`` places may have another now."""
        known, now = self._by_peer.get(peer, _UNKNOWN), self._clock()
        return now >= known.paused_until and (not held or now >= known.late_until)

    def _known(self, peer: str) -> _Standing:
        known = self._by_peer[peer] = self._by_peer.get(peer) or _Standing()
        return known
