"""HTTP connections whose requests are never complete, more than the server accepts, from
several addresses. None of them may take the place of a client that sends a complete request."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field

from tests.attacks.case import Bug, Target

TITLE = "half-sent HTTP bodies on more connections than there may be"
FLAGS = ("--max-connections", "64")
BUG = Bug(
    "veneer_server.openai.http.connection",
    "if answering and not sending and not self.flow.write_paused:",
    "if answering:",
)

COUNT = 80
ROUNDS = 3
"""Minimum number of rounds, however slow the machine is: two of three connections of a round
hold a place if half a body counts as a whole one."""
_BODY = json.dumps({"model": "smollm2-135m", "prompt": "Hello", "max_tokens": 1}).encode()


@dataclass
class Flood:
    """The attacker's connections, each with a random part of a request."""

    target: Target
    key: str = ""
    """Key of the half-sent requests; "" for none."""
    open: list[asyncio.StreamWriter] = field(default_factory=list)

    def shape(self) -> bytes:
        """Return a random part of a request."""
        rng = self.target.rng
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += b"Content-Type: application/json\r\n"
        if self.key or rng.random() < 0.3:
            head += f"Authorization: Bearer {self.key or 'vn_no_key'}\r\n".encode()
        size = rng.randrange(2, 4 << 20)
        part = b"{" + b" " * rng.randrange(min(size - 1, 20_000))
        length = b"Content-Length: %d\r\n\r\n" % size
        # The chunk is not whole either: dripping must not make the request invalid.
        chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (len(part) + 10_000)
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        return rng.choice((length.join((head, part)), chunked.join((head, part)), whole + head))

    async def more(self, count: int = COUNT) -> None:
        """Open more connections, each from one of several addresses."""
        host, port = self.target.openai.rsplit(":", 1)
        for _ in range(count):
            local = f"127.0.0.{self.target.rng.randrange(2, 12)}"
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(
                    host, int(port), local_addr=(local, 0)
                )
                writer.write(self.shape())
                self.open.append(writer)

    async def drip(self) -> None:
        """Send a byte on each connection, which the server must not count as progress."""
        for writer in self.open:
            if not writer.is_closing():
                writer.write(b" ")
        await asyncio.sleep(0)

    def close(self) -> None:
        for writer in self.open:
            writer.transport.abort()


class Client:
    """A client that sends complete requests."""

    def __init__(self, target: Target, key: str = "") -> None:
        self._host, port = target.openai.rsplit(":", 1)
        self._port = int(port)
        line = f"Authorization: Bearer {key}\r\n" if key else ""
        self._request = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{line}"
            f"Content-Type: application/json\r\nContent-Length: {len(_BODY)}\r\n\r\n"
        ).encode() + _BODY
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self) -> str:
        """Send a request on the open or a new connection; return what was wrong, or ""."""
        try:
            async with asyncio.timeout(60):
                if self._writer is None or self._reader is None:
                    opened = await asyncio.open_connection(self._host, self._port)
                    self._reader, self._writer = opened
                self._writer.write(self._request)
                head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = head.split("content-length: ")[1].split("\r\n")[0]
                await self._reader.readexactly(int(length))
        except (OSError, EOFError) as error:
            return type(error).__name__
        line = head.split("\r\n")[0]
        return "" if " 200 " in line else line

    def close(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
        self._writer = None


async def attack(target: Target, key: str = "", flooding: str = "") -> list[str]:
    """Flood the server: an open connection and new ones must be served throughout.

    Args:
        key: key of the callers who must be served.
        flooding: key of the attacker's half-sent requests.
    """
    loop, wrong = asyncio.get_running_loop(), []
    until = loop.time() + target.seconds
    flood, kept = Flood(target, flooding), Client(target, key)
    if said := await kept.ask():
        wrong.append(f"before the attack: {said}")
    rounds = 0
    try:
        while loop.time() < until or rounds < ROUNDS:
            rounds += 1
            await flood.more()
            await flood.drip()
            if said := await kept.ask():
                wrong.append(f"a kept connection: {said}")
                kept.close()
            new = Client(target, key)
            if said := await new.ask():
                wrong.append(f"a new client: {said}")
            new.close()
            del flood.open[: -8 * COUNT]  # the server has closed them
    finally:
        flood.close()
        kept.close()
    return wrong
