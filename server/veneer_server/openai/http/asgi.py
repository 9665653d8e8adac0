"""The HTTP level: reading JSON bodies and sending answers, bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections import OrderedDict, deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from veneer_registry.errors import Aborted, QueueFull, VeneerError

from veneer_server.access.caller import Caller
from veneer_server.openai.errors import HttpError, HttpFailure, http_failure
from veneer_server.openai.http.body import LONG_BODY, dump, parse_body, written
from veneer_server.queues.connection_places import PROGRESS, STALLED_S
from veneer_server.queues.fairness import Sender
from veneer_server.serving.gate import CallContext
from veneer_server.serving.spare_time import SpareTime, WorkBreaks

ABORT: Final = "veneer.abort"
"""Key in ``scope["state"]`` of a function that drops the connection at once."""

CONTEXT: Final = "veneer.context"
"""Key in ``scope["state"]`` of the request's `CallContext`; see `context_of`."""

CERTIFICATE: Final = "veneer.certificate"
"""Key in ``scope["state"]`` of the client's certificate, as `access.certificates.Shown`."""

EARNED: Final = "veneer.earned"
"""Key in ``scope["state"]`` of a function that takes the tenant of a caller who has shown a
valid key; "" for one whom a server without keys has answered without an error."""

MODEL: Final = "veneer.model"
"""Key in ``scope["state"]`` of the model that the path names, as Azure's paths do."""

MAX_BODY: Final = 4 << 20
"""Largest body in bytes; the limit for gRPC messages is the same."""

MAX_BODIES: Final = 64 << 20
"""Most bytes of all bodies being read or answered, counting only the first `LONG_BODY` of each.
"""

MAX_LONG_BODIES: Final = 8 * MAX_BODY
"""The same for the bytes of each body beyond `LONG_BODY`, so that long bodies leave room for
short ones. The text and protobuf made from a body take several times as much."""

DISCARDED: Final = 4 * MAX_BODY
"""Bytes of a refused body that are still read and discarded."""

MIN_READ_RATE: Final = 64 << 10
"""Bytes a second that a caller must read of a long answer, beyond the limit on one wait."""

DISCARDED_S: Final = 5.0
"""How long the rest of a refused body is read."""

_ERROR_LIMIT_S: Final = 1.0
"""Longest wait for the client to read an error."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


class ReaderStopped(Aborted):
    """The client read nothing for too long; its connection was dropped."""


class Bodies:
    """Bounds the bytes that the bodies of all requests take together, and parses the bodies.

    Long bodies are parsed in a thread, one at a time. In each iteration of the event loop
    only one piece of any long body is read: reading 30 pieces takes 10 ms.
    """

    def __init__(self, limit: int = MAX_BODIES, long_limit: int = MAX_LONG_BODIES) -> None:
        """Args: long_limit: bound for the bytes that bodies have beyond `LONG_BODY` each."""
        self._turns: deque[asyncio.Future[None]] = deque()
        self._limits = (limit, long_limit)
        self._left = [limit, long_limit]
        self._arriving: OrderedDict[BodyShare, None] = OrderedDict()
        """In order of their last progress."""
        self._parser = ThreadPoolExecutor(1, "json")
        self._breaks = WorkBreaks()

    def close(self) -> None:
        """End the thread."""
        self._parser.shutdown(wait=False, cancel_futures=True)

    async def parse(self, body: bytes) -> object:
        """The parsed JSON of a body. Raises ValueError or RecursionError if it is invalid."""
        if len(body) < LONG_BODY:
            return parse_body(body)
        return await self.thread(lambda: parse_body(body, self._breaks.rest))

    async def thread(self, work: Callable[[], T]) -> T:
        """Do work on a long body in the thread, which sleeps between bodies. Log lines of the
        work carry the request's context."""
        context, loop = contextvars.copy_context(), asyncio.get_running_loop()
        return await loop.run_in_executor(self._parser, context.run, self._paced, work)

    def _paced(self, work: Callable[[], T]) -> T:
        self._breaks.begin()
        try:
            return work()
        finally:
            self._breaks.end()

    async def turn(self) -> None:
        """Wait for the turn to read a piece of a long body."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._turns.append(turn)
        if len(self._turns) == 1:
            loop.call_soon(self._next_turn)
        await turn

    def _next_turn(self) -> None:
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():  # skip callers that have left
                turn.set_result(None)
                break
        if self._turns:
            asyncio.get_running_loop().call_soon(self._next_turn)

    @contextmanager
    def share(self) -> Iterator[BodyShare]:
        """A request's share of the bytes, until the block ends."""
        share = BodyShare(self, time.monotonic())
        try:
            yield share
        finally:
            self._give_back(share)

    @contextmanager
    def arriving(self, share: BodyShare, timeout: asyncio.Timeout) -> Iterator[None]:
        """Mark a body as arriving while the block runs. If it stalls, others may take its
        bytes: the timeout then expires at once, and ``share.lost`` is set."""
        share.timeout = timeout
        self._arriving[share] = None
        try:
            yield
        finally:
            self._arriving.pop(share, None)

    def take(self, share: BodyShare, count: int) -> None:
        """Reserve more bytes. Raises QueueFull if too few are left."""
        wanted = [
            more - had
            for had, more in zip(_parts(share.size), _parts(share.size + count), strict=True)
        ]
        now = time.monotonic()
        for pool, bytes_ in enumerate(wanted):
            if bytes_ > self._left[pool]:
                self._displace(pool, bytes_, share, now)
            if bytes_ > self._left[pool]:
                raise QueueFull(
                    f"other requests use most of the {self._limits[pool]} bytes for request "
                    "bodies of this size: retry later",
                    retry_after_s=1.0,
                )
        for pool, bytes_ in enumerate(wanted):
            self._left[pool] -= bytes_
        share.size += count
        share.sent += count
        if share.sent >= PROGRESS:
            share.sent, share.since = 0, now
            if share in self._arriving:
                self._arriving.move_to_end(share)

    def _displace(self, pool: int, wanted: int, by: BodyShare, now: float) -> None:
        """Take bytes back from bodies that have stalled, the longest stalled first."""
        for share in tuple(self._arriving):
            if self._left[pool] >= wanted or share.since > now - STALLED_S:
                return
            if share is not by and _parts(share.size)[pool]:
                share.lost = True
                assert share.timeout is not None, "it is arriving"
                share.timeout.reschedule(asyncio.get_running_loop().time())
                del self._arriving[share]
                self._give_back(share)

    def _give_back(self, share: BodyShare) -> None:
        for pool, bytes_ in enumerate(_parts(share.size)):
            self._left[pool] += bytes_
        share.size = 0


@dataclass(slots=True, eq=False)
class BodyShare:
    """One body's share of `Bodies`. Calling it takes more bytes.

    Attributes:
        since: when it last made progress, see `queues.connection_places`.
        size: bytes taken.
        received: all bytes that have arrived.
        sent: bytes that have arrived since it made progress.
        timeout: bounds the time in which it must arrive.
        lost: whether its bytes were given to others, because it stalled.
    """

    bodies: Bodies
    since: float
    size: int = 0
    received: int = 0
    sent: int = 0
    timeout: asyncio.Timeout | None = None
    lost: bool = False

    def __call__(self, count: int) -> None:
        self.received += count
        self.bodies.take(self, count)


def _parts(size: int) -> tuple[int, int]:
    """A body's bytes up to `LONG_BODY`, and those beyond."""
    return min(size, LONG_BODY), max(0, size - LONG_BODY)


def context_of(scope: Scope) -> CallContext:
    """Return the context of a request, which `Edge` has set."""
    context: CallContext = scope["state"][CONTEXT]
    return context


def caller_of(scope: Scope) -> Caller:
    """Return the caller of a request."""
    return context_of(scope).caller


def check_json(content_type: str) -> None:
    """Raise HttpError unless the content type of a browser's request is JSON. A browser sends
    JSON for a page of another origin only after a preflight. Other programs need not say so:
    ``curl -d`` says that it sends a form."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise HttpError(
            415, "unsupported_media_type", "send JSON with content-type application/json"
        )


async def read_json(
    receive: Receive,
    limit_s: float,
    bodies: Bodies,
    share: BodyShare,
) -> object:
    """Read and parse the body of a request.

    Args:
        share: takes the bytes received; see `Bodies.share`.

    Raises:
        HttpError: the body is not JSON, is too large, or arrived too slowly.
        QueueFull: other bodies leave no room for it, or it stalled and others needed its room.
        ClientGone: the client disconnected before the body was complete.
    """
    try:
        async with asyncio.timeout(limit_s) as timeout:
            with bodies.arriving(share, timeout):
                body = await _read(receive, share, bodies)
    except TimeoutError as error:
        if share.lost:
            raise QueueFull(
                "the body arrived too slowly while other requests needed the memory: send it "
                "again, all at once",
                retry_after_s=1.0,
            ) from error
        raise HttpError(
            408,
            "request_timeout",
            f"the body was not complete after {limit_s:g} s: send it again",
        ) from error
    try:
        return await bodies.parse(body)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise HttpError(
            400, "invalid_json", f"the body is not valid JSON: {why[:200]}"
        ) from error


async def _read(receive: Receive, take: BodyShare, bodies: Bodies) -> bytes:
    body, more = bytearray(), True
    try:
        while more:
            if len(body) >= LONG_BODY:
                await bodies.turn()
            piece, more = await _piece(receive)
            take(len(piece))
            body += piece
            if len(body) > MAX_BODY:
                raise HttpError(
                    413,
                    "request_too_large",
                    f"the body has more than {MAX_BODY} bytes: send less",
                )
    except (HttpError, QueueFull):
        body.clear()
        if more:
            await _discard(receive, bodies)
        raise
    return bytes(body)


async def _piece(receive: Receive) -> tuple[bytes, bool]:
    """A piece of a body, and whether more follows."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


async def _discard(receive: Receive, bodies: Bodies) -> None:
    """Read the rest of a refused body. If the connection were closed with unread bytes, the
    client would see a reset instead of the answer."""
    left, more = DISCARDED, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARDED_S):
            while more and left > 0:
                await bodies.turn()
                piece, more = await _piece(receive)
                left -= len(piece)


_STREAMING: Final = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # keeps nginx from buffering events
}


@dataclass(frozen=True, slots=True)
class Framing:
    """How a stream writes its events.

    Attributes:
        begin: makes the bytes before an event's JSON.
        end: bytes after the last event of a stream that succeeded.
        failure: makes the bytes that end a stream that failed.
        after: bytes after an event's JSON.
        kind: the content type.
    """

    begin: Callable[[Any], bytes]
    end: bytes
    failure: Callable[[HttpFailure], bytes]
    after: bytes = b"\n\n"
    kind: str = "text/event-stream; charset=utf-8"

    def event(self, event: Any) -> bytes:
        """An event as bytes."""
        return self.begin(event) + dump(event) + self.after

    def pieces(self, events: Sequence[Any]) -> Iterator[bytes]:
        """Yield events as bytes, made a piece at a time."""
        for event in events:
            yield self.begin(event)
            yield from written(event)
            yield self.after


DATA_ONLY: Final = Framing(
    lambda event: b"data: ",
    b"data: [DONE]\n\n",
    lambda failure: b"data: " + dump(failure.body) + b"\n\n",
)
"""Events without names, as in chats and completions."""

LINES: Final = Framing(
    lambda event: b"",
    b"",
    lambda failure: dump(failure.body) + b"\n",
    after=b"\n",
    kind="application/x-ndjson",
)
"""A line of JSON for each event, as Ollama's clients expect."""


class Reply:
    """One answer: a JSON document, or a stream of events. Tasks may share it.

    Attributes:
        framing: how a stream frames its events.
        headers: more headers of the answer, sent whatever its status.
        started: whether status and headers have been sent.
    """

    def __init__(self, scope: Scope, send: Send, limit_s: float) -> None:
        """Args: limit_s: longest wait for the client to read a piece."""
        self._send = send
        self._limit_s = limit_s
        self._path: str = scope.get("path", "")
        self._abort: Callable[[], None] = scope.get("state", {}).get(ABORT, lambda: None)
        self._turn = asyncio.Lock()
        self._streaming = False
        self._torn = False
        """Whether an event, or a document, has been sent only in part."""
        self.framing = DATA_ONLY
        self.headers: dict[str, str] = {}
        self.started = False

    async def json(self, status: int, body: object, headers: Mapping[str, str]) -> None:
        """Send the whole answer."""
        await self._whole(status, dump(body), "application/json", headers)

    async def long_json(
        self,
        status: int,
        body: object,
        headers: Mapping[str, str],
        spare: SpareTime,
        sender: Sender,
    ) -> None:
        """Send the whole answer in pieces. Each is made off the event loop, once the one before
        has been taken."""
        await self._start(status, {"content-type": "application/json", **headers})
        await self._pieces(spare.each(written(body), sender))
        await self._body(b"", more=False)

    async def made_json(self, data: bytes) -> None:
        """Send the whole answer, which is JSON already."""
        await self._whole(200, data, "application/json", {})

    async def text(self, text: str) -> None:
        """Send the whole answer, as plain text."""
        await self._whole(200, text.encode(), "text/plain; charset=utf-8", {})

    async def _whole(
        self, status: int, data: bytes, kind: str, headers: Mapping[str, str]
    ) -> None:
        length = {"content-type": kind, "content-length": str(len(data))}
        await self._start(status, {**length, **headers})
        await self._body(data, more=False)

    async def events(
        self,
        events: Sequence[object],
        headers: Mapping[str, str],
    ) -> None:
        """Send events; the first call also sends status and headers."""
        data = b"".join(map(self.framing.event, events))
        async with self._turn:
            await self._start_events(headers)
            if data:
                await self._body(data, more=True)

    async def long_events(
        self,
        events: Sequence[Any],
        headers: Mapping[str, str],
        spare: SpareTime,
        sender: Sender,
    ) -> None:
        """Like `events`, but the bytes are made a piece at a time."""
        async with self._turn:
            await self._start_events(headers)
            await self._pieces(spare.each(self.framing.pieces(events), sender))

    async def _start_events(self, headers: Mapping[str, str]) -> None:
        if not self.started:
            self._streaming = True
            kind = self.framing.kind
            await self._start(200, {"content-type": kind, **_STREAMING, **headers})

    async def _pieces(self, pieces: AsyncGenerator[bytes, None]) -> None:
        """Send pieces of an answer that may be long. The caller must read at a minimum rate, as
        the rest stays in memory: a caller that reads a little now and then would keep it there
        for hours."""
        loop = asyncio.get_running_loop()
        late_s = 0.0
        self._torn = True
        async with aclosing(pieces) as made:
            async for piece in made:
                begun = loop.time()
                await self._body(piece, more=True)
                took_s = loop.time() - begun
                late_s = max(0.0, late_s + took_s - len(piece) / MIN_READ_RATE)
                if late_s > self._limit_s:
                    self._abort()
                    raise ReaderStopped(
                        f"the caller reads less than {MIN_READ_RATE} bytes a second: read long "
                        "answers as they arrive"
                    )
        self._torn = False

    async def end_events(self) -> None:
        """End a stream that succeeded."""
        await self._body(self.framing.end, more=False)

    async def fail(self, error: VeneerError | HttpError) -> None:
        """Report an error in whatever form the answer still allows."""
        if isinstance(error, ReaderStopped):
            return
        failure = http_failure(error, self._path)
        # The error may be queued behind data that the client does not read.
        self._limit_s = min(self._limit_s, _ERROR_LIMIT_S)
        if not self.started:
            await self.json(failure.status, failure.body, failure.headers)
        elif self._streaming and not self._torn:
            await self._body(self.framing.failure(failure), more=False)
        else:  # the error would be in the middle of a document or an event
            self._abort()

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        pairs = [
            (name.encode(), value.encode("latin-1"))
            for name, value in {**headers, **self.headers}.items()
        ]
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
                f"the caller read nothing for {self._limit_s:g} s: read the stream as it "
                "arrives"
            ) from error
