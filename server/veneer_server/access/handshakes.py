"""TLS for asyncio servers, with a limit on the connections that are still in their handshake.

asyncio's own servers tell the protocol about a connection only after its handshake, and wait a
minute for it: strangers who never finish their handshakes could take every file descriptor.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from veneer_server.queues.connection_places import host_of
from veneer_server.system.descriptors import HANDSHAKES

LIMIT_S: Final = 10.0
"""How long a handshake may take."""

_Factory = Callable[..., asyncio.Protocol]


class Handshakes:
    """The handshakes of one server. Belongs to one event loop."""

    def __init__(
        self, context: ssl.SSLContext, *, most: int = HANDSHAKES, limit_s: float = LIMIT_S
    ) -> None:
        """Args:
        most: most handshakes at once. A further one replaces the oldest handshake of the host
            that has the most.
        """
        self.context = context
        self.limit_s = limit_s
        self._most = most
        self._open: dict[_Handshake, None] = {}
        self._hosts: Counter[str] = Counter()

    def before(self, factory: _Factory) -> _Factory:
        """Wrap a protocol factory: a connection gets its protocol from ``factory`` only after
        its handshake."""
        return lambda *args, **kwargs: _Handshake(self, lambda: factory(*args, **kwargs))

    def begin(self, handshake: _Handshake) -> None:
        """Register an accepted connection."""
        if len(self._open) >= self._most:
            max(self._open, key=lambda each: self._hosts[each.host]).drop()
        self._open[handshake] = None
        self._hosts[handshake.host] += 1

    def end(self, handshake: _Handshake) -> None:
        """Remove a connection whose handshake has ended, or that was dropped."""
        if handshake in self._open:
            del self._open[handshake]
            self._hosts[handshake.host] -= 1
            if not self._hosts[handshake.host]:
                del self._hosts[handshake.host]

    def drop_all(self) -> None:
        """Close all connections that are in their handshake."""
        for handshake in tuple(self._open):
            handshake.drop()


class _Handshake(asyncio.Protocol):
    """A connection until its handshake is done."""

    def __init__(self, all_: Handshakes, make: Callable[[], asyncio.Protocol]) -> None:
        self._all = all_
        self._make = make
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self.host = ""
        """The peer's host, see `host_of`."""
        self._hello = bytearray()
        """Data that arrived before `start_tls` took over: uvloop reads at once."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self.host = host_of(f"{peer[0]}:{peer[1]}") if isinstance(peer, tuple) else ""
        self._all.begin(self)
        self._task = asyncio.get_running_loop().create_task(self._run(transport))

    def data_received(self, data: bytes) -> None:
        self._hello += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.end(self)

    def drop(self) -> None:
        """Close the connection."""
        self._all.end(self)
        if self._transport is not None:
            self._transport.abort()

    async def _run(self, transport: asyncio.Transport) -> None:
        loop, early = asyncio.get_running_loop(), _Early()
        if transport.is_closing():
            return
        starting = asyncio.ensure_future(
            loop.start_tls(
                transport,
                early,
                self._all.context,
                server_side=True,
                ssl_handshake_timeout=self._all.limit_s,
            )
        )
        # `start_tls` begins in the loop's next round, and its protocol in the one after that,
        # before the loop has read any more.
        loop.call_soon(loop.call_soon, self._pass_on, transport)
        try:
            secured: Any = await starting
        except (OSError, EOFError):  # TLS errors and time-outs are OSErrors
            transport.abort()
            return
        finally:
            self._all.end(self)
        if secured is None or secured.is_closing():
            return
        protocol = self._make()
        secured.set_protocol(protocol)
        protocol.connection_made(secured)
        if early.data and not secured.is_closing():
            protocol.data_received(bytes(early.data))
        if early.lost:
            protocol.connection_lost(early.error)

    def _pass_on(self, transport: asyncio.Transport) -> None:
        tls: Any = transport.get_protocol()
        if tls is self or transport.is_closing():
            return  # the handshake has ended already
        rest = memoryview(bytes(self._hello))
        while rest:
            buffer = memoryview(tls.get_buffer(len(rest)))
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            tls.buffer_updated(count)
            rest = rest[count:]


class _Early(asyncio.Protocol):
    """Keeps the data that arrives right after a handshake, before the connection has its own
    protocol."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lost = False
        self.error: Exception | None = None

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost, self.error = True, exc
