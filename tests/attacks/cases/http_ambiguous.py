"""Requests that two parsers could read differently, tiny chunks and foreign Host headers, on
many connections."""

from __future__ import annotations

import asyncio
import time

from tests.attacks.case import Target
from tests.hostile.callers import http_answer

TITLE = "ambiguous HTTP, tiny chunks, foreign hosts"

AT_ONCE = 12
_HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
_NEXT = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n"

REQUESTS: dict[str, tuple[int, bytes]] = {
    "both lengths": (400, _HEAD + _CHUNKED + b"Content-Length: 4\r\n\r\n0\r\n\r\n" + _NEXT),
    "two lengths": (400, _HEAD + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\n{}" + _NEXT),
    "a folded header": (400, _HEAD + b"X: a\r\n b\r\nContent-Length: 2\r\n\r\n{}" + _NEXT),
    "LF alone": (400, _HEAD + b"X: a\nContent-Length: 2\r\n\r\n{}" + _NEXT),
    "a bad chunk size": (400, _HEAD + _CHUNKED + b"\r\nxyz\r\n" + _NEXT),
    "tiny chunks": (400, _HEAD + _CHUNKED + b"\r\n" + b"1\r\n \r\n" * 100_000),
    "a long head": (431, _HEAD + b"X: " + b"a" * 100_000),
    "many headers": (431, _HEAD + b"a:\r\n" * 25_000 + b"\r\n"),
    "a foreign host": (403, b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n"
                            b"Connection: close\r\n\r\n"),
    "rubbish": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
}  # fmt: skip


async def attack(target: Target) -> list[str]:
    wrong: list[str] = []

    async def one(name: str) -> None:
        wanted, data = REQUESTS[name]
        status, answer = await http_answer(target.openai, data)
        # A refusal may be lost if the server closes the connection with unread data.
        if status not in (wanted, 0) or answer.count(b"HTTP/1.1 ") > 1:
            wrong.append(f"{name}: {status} {answer[:200]!r}")

    ends = time.monotonic() + target.seconds
    while True:
        for name in REQUESTS:
            await asyncio.gather(*(one(name) for _ in range(AT_ONCE)))
        if time.monotonic() >= ends:
            return sorted(set(wrong))
