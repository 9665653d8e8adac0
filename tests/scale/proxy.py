"""A TCP proxy with which a test cuts, freezes or slows connections."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final, Self

_Read = asyncio.Queue[tuple[float, bytes]]

_MOST_ON_THE_WAY: Final = 1024
"""Pieces of data of one connection and direction; more wait at their sender."""


class Proxy:
    """Forwards connections to ``target``. Use it as an async context manager.

    Attributes:
        target: ``host:port`` of the server.
        address: ``host:port`` of the proxy.
        forwarded: bytes forwarded from the server.
        accepted: number of connections.
        delay_s: seconds for which each piece of data holds up those after it.
        late_s: seconds by which everything arrives late, as on a long link.
        ports: the local ports of the connections to the server.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.address = ""
        self.forwarded = self.accepted = 0
        self.delay_s = 0.0
        self.late_s = 0.0
        self.ports: set[int] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._refusing = False
        self._budget: int | None = None
        self._then_freeze = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.heal()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Cut all connections; new ones are forwarded."""
        for writer in list(self._writers):
            writer.transport.abort()

    def refuse(self) -> None:
        """Cut all connections, and new ones at once, as if the server were gone."""
        self._refusing = True
        self.cut()

    def freeze(self) -> None:
        """Forward nothing but keep connections open."""
        self._open.clear()

    def cut_after(self, size: int) -> None:
        """Cut all connections once the server has sent ``size`` more bytes."""
        self._budget, self._then_freeze = size, False

    def freeze_after(self, size: int) -> None:
        """`freeze` once the server has sent ``size`` more bytes."""
        self._budget, self._then_freeze = size, True

    def heal(self) -> None:
        """Forward again."""
        self._refusing, self._budget, self.delay_s, self.late_s = False, None, 0.0, 0.0
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._refusing:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            await self._open.wait()
            host, port = self.target.rsplit(":", 1)
            there, to = await asyncio.open_connection(host, int(port))
        except OSError:
            self._writers.discard(writer)
            writer.transport.abort()
            return
        self._writers.add(to)
        port = to.get_extra_info("sockname")[1]
        self.ports.add(port)
        for source, sink, counted in ((reader, to, False), (there, writer, True)):
            task = asyncio.get_running_loop().create_task(self._pump(source, sink, counted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if counted:
                task.add_done_callback(lambda _, port=port: self.ports.discard(port))

    async def _read(self, source: asyncio.StreamReader, read: _Read) -> None:
        """Note when each piece of data is to be sent on; b"" is the end."""
        data = b"more"
        while data:
            try:
                data = await source.read(64 << 10)
            except ConnectionError:
                data = b""
            await read.put((time.monotonic() + self.late_s, data))

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counted: bool
    ) -> None:
        read: _Read = asyncio.Queue(_MOST_ON_THE_WAY)
        reading = asyncio.get_running_loop().create_task(self._read(source, read))
        try:
            while True:
                due, data = await read.get()
                if (left := due - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                if not data:
                    break
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._open.wait()
                if counted and self._budget is not None:
                    data, self._budget = data[: self._budget], self._budget - len(data)
                    if self._budget <= 0:
                        sink.write(data)
                        self._budget = None
                        if not self._then_freeze:
                            self.cut()
                            return
                        self.freeze()
                        data = b""
                if counted:
                    self.forwarded += len(data)
                sink.write(data)
                await sink.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            reading.cancel()
            with suppress(RuntimeError):  # the loop is closing
                sink.transport.abort()
            self._writers.discard(sink)
