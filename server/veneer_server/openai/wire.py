"""HTTP below the fields: reading a JSON body, and answers that a slow reader cannot hold.

Everything here is bounded in bytes and in time.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Final

from veneer_registry.errors import Aborted, QueueFull, VeneerError

from veneer_server.openai.errors import HttpError, http_failure

__all__ = ["ABORT", "Bodies", "ClientGone", "Receive", "Reply", "Scope", "Send", "read_json"]

ABORT: Final = "veneer.abort"
"""Key in ``scope["state"]`` of a function that drops the connection at once."""

MAX_BODY: Final = 4 << 20
"""Largest body in bytes; what gRPC receives at most, too."""

MAX_BODIES: Final = 64 * MAX_BODY
"""Bytes of all bodies that are being read or answered."""

_ERROR_LIMIT_S: Final = 1.0
"""Longest wait for the client to take an error."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


class ReaderStopped(Aborted):
    """The client took nothing for too long; its connection was dropped."""


class Bodies:
    """Bounds what the bodies of all requests take together, in bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = self._left = limit

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A function that takes bytes, which are given back at the end. It raises
        QueueFull where there are not so many left."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if count > self._left:
                raise QueueFull(
                    f"requests hold {self._limit - self._left} bytes of bodies, of at most "
                    f"{self._limit}: retry later",
                    retry_after_s=1.0,
                )
            self._left -= count
            taken += count

        try:
            yield take
        finally:
            self._left += taken


async def read_json(
    scope: Scope, receive: Receive, limit_s: float, take: Callable[[int], None]
) -> object:
    """The parsed body of a request.

    Args:
        take: told of the bytes that came; see `Bodies`.

    Raises:
        HttpError: it is no JSON, too large, or came too slowly.
        QueueFull: other bodies leave it no room.
        ClientGone: the client left before it was whole.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise HttpError(
            415, "unsupported_media_type", "send JSON with content-type application/json"
        )
    try:
        async with asyncio.timeout(limit_s):
            body = await _read(receive, take)
    except TimeoutError as error:
        raise HttpError(
            408,
            "request_timeout",
            f"the body was not complete after {limit_s:g} s: send it again",
        ) from error
    try:
        return _parse(body)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise HttpError(
            400, "invalid_json", f"the body is not valid JSON: {why[:200]}"
        ) from error


async def _read(receive: Receive, take: Callable[[int], None]) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        take(len(piece))
        body += piece
        if len(body) > MAX_BODY:
            raise HttpError(
                413, "request_too_large", f"the body has more than {MAX_BODY} bytes: send less"
            )
        if not message.get("more_body", False):
            return bytes(body)


_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def _parse(body: bytes) -> object:
    parsed: object = json.loads(body, parse_constant=_no_constant)
    if _SURROGATE.search(body):
        try:
            json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half of a surrogate pair") from error
    return parsed


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is no JSON number")


_STREAMING: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold pieces back
}


class Reply:
    """One answer: a JSON document, or a stream of events. Tasks may share it.

    Attributes:
        started: status and headers are out.
    """

    def __init__(self, scope: Scope, send: Send, limit_s: float) -> None:
        """Args: limit_s: longest wait for the client to take a piece."""
        self._send = send
        self._limit_s = limit_s
        self._abort: Callable[[], None] = scope.get("state", {}).get(ABORT, lambda: None)
        self._turn = asyncio.Lock()
        self._streaming = False
        self.started = False

    async def json(self, status: int, body: object, headers: Mapping[str, str]) -> None:
        """The whole answer."""
        data = _dump(body)
        length = {"content-type": "application/json", "content-length": str(len(data))}
        await self._start(status, {**length, **headers})
        await self._body(data, more=False)

    async def events(self, events: list[object], headers: Mapping[str, str]) -> None:
        """Send server-sent events; the first ones bring status and headers along."""
        data = b"".join(b"data: " + _dump(event) + b"\n\n" for event in events)
        async with self._turn:
            if not self.started:
                self._streaming = True
                await self._start(200, {**_STREAMING, **headers})
            if data:
                await self._body(data, more=True)

    async def end_events(self) -> None:
        """The end of a stream that went well."""
        await self._body(b"data: [DONE]\n\n", more=False)

    async def fail(self, error: VeneerError | HttpError) -> None:
        """Say what went wrong, in whatever way the answer still allows."""
        if isinstance(error, ReaderStopped):
            return
        failure = http_failure(error)
        # Behind what the client has not taken it would wait as long as a piece may.
        self._limit_s = min(self._limit_s, _ERROR_LIMIT_S)
        if not self.started:
            await self.json(failure.status, failure.body, failure.headers)
        elif self._streaming:
            await self._body(b"data: " + _dump(failure.body) + b"\n\n", more=False)
        else:  # half of a document is out
            self._abort()

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._put({"type": "http.response.start", "status": status, "headers": pairs})

    async def _body(self, data: bytes, *, more: bool) -> None:
        await self._put({"type": "http.response.body", "body": data, "more_body": more})

    async def _put(self, message: MutableMapping[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                await self._send(message)
        except TimeoutError as error:
            self._abort()
            raise ReaderStopped(
                f"the caller read nothing for {self._limit_s:g} s: read the stream as it comes"
            ) from error


def _dump(body: object) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
