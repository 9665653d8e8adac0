"""A POST with a JSON body, from reading it to the last byte of the answer."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from fastapi.responses import StreamingResponse
from veneer_registry.errors import QueueFull, VeneerError

from veneer_server.access.caller import Caller
from veneer_server.errors import without_frames
from veneer_server.logs import get_logger
from veneer_server.openai.core import ServingCore
from veneer_server.openai.errors import PACED, HttpError
from veneer_server.openai.extensions import Ignored
from veneer_server.openai.http.asgi import (
    ABORT,
    MODEL,
    BodyShare,
    ClientGone,
    Receive,
    Reply,
    Scope,
    Send,
    context_of,
    read_json,
)
from veneer_server.openai.http.body import LONG_BODY
from veneer_server.serving.gate import CallContext, Gate


@dataclass(frozen=True, slots=True)
class Answering:
    """A request whose fields have been checked.

    Attributes:
        run: answers it, and returns what the audit log takes a revision from, if anything.
        about: what the audit log takes a name from; see `Audit.note`.
        ignored: what of the request has no effect.
    """

    run: Callable[[Reply], Awaitable[object]]
    about: object = None
    ignored: Ignored = field(default_factory=Ignored)


_KNOWN: Final = (VeneerError, HttpError)

_log = get_logger(__name__)


async def refuse(
    gate: Gate,
    context: CallContext,
    error: VeneerError | HttpError,
    *,
    method: str,
    begun: bool = False,
) -> None:
    """`Gate.refuse`; what is wrong at the HTTP level is only logged and delayed."""
    if isinstance(error, VeneerError):
        await gate.refuse(context, error, begun=begun, method=method)
        return
    gate.log(error.code, error, method=method)
    if error.status in PACED and not begun:
        await gate.pace.wait(context.caller.peer, context.size)


class JsonEndpoint(ABC):
    """An ASGI application for one path."""

    def __init__(self, core: ServingCore) -> None:
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; if the client disconnects, the work ends within a step."""
        reply, context = Reply(scope, send, self._core.reader_limit_s), context_of(scope)
        failed = None
        with self._core.bodies.share() as share:
            try:
                failed = await self._answer(scope, receive, reply, share, context)
            except ClientGone:
                return
        if failed is not None:  # may wait: the body's share has been released
            context.size = share.received
            await self._fail(reply, context, failed)

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        reply: Reply,
        share: BodyShare,
        context: CallContext,
    ) -> VeneerError | HttpError | None:
        """Read the body and answer it. Returns an error that is still to be sent."""
        core = self._core
        try:
            body = await read_json(receive, core.reader_limit_s, core.bodies, share)
        except (QueueFull, HttpError) as error:
            return without_frames(error)
        if isinstance(body, dict) and (model := scope.get("state", {}).get(MODEL)):
            body["model"] = model
        long = share.received >= LONG_BODY
        work = asyncio.create_task(self._work(body, context, reply, long=long))
        gone = asyncio.create_task(_disconnected(receive))
        del body  # the parsed body is many times as large; keep only the checked request
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.wait({work, gone})
        return None if work.cancelled() else work.result()

    async def _work(
        self, body: object, context: CallContext, reply: Reply, *, long: bool
    ) -> VeneerError | HttpError | None:
        """Answer a body. Args: long: its fields are checked off the event loop."""
        core, caller = self._core, context.caller
        try:
            with (
                core.gate.answering(context, "request failed", known=_KNOWN),
                core.calls.running(),
            ):
                if long:
                    answering = await core.bodies.thread(partial(self._check, body, caller))
                else:
                    answering = self._check(body, caller)
                del body
                context.request = answering.about
                self._tell(answering.ignored, reply)
                context.answer = await answering.run(reply)
            return None
        except _KNOWN as error:
            return without_frames(error)

    def _ignored(self) -> Ignored:
        """For one request: takes what has no effect on it."""
        return Ignored(self._core.unknown_fields)

    def _tell(self, ignored: Ignored, reply: Reply) -> None:
        """Count what has no effect, and name it in the answer's headers."""
        for label, count in ignored.counts.items():
            self._core.metrics.ignored_fields.labels(label).inc(count)
        if ignored.header:
            reply.headers["veneer-ignored"] = ignored.header

    async def _fail(
        self, reply: Reply, context: CallContext, error: VeneerError | HttpError
    ) -> None:
        name, begun = type(self).__name__, reply.started
        await refuse(self._core.gate, context, error, method=name, begun=begun)
        try:
            await reply.fail(error)
        except VeneerError:
            _log.info("the caller left before reading the error", reason=str(error))

    @abstractmethod
    def _check(self, body: object, caller: Caller) -> Answering:
        """Check the fields now, and answer later. What is returned should not keep the body.

        Runs in a thread if the body is long. No call into C may take long even there: it keeps
        the interpreter's lock. So what a caller sent as JSON is measured before it is written
        (`check_json_size`), and a list before it is looked through.

        Raises:
            InvalidField: a field is invalid.
        """


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


# -------------------- streams
# Long answers, of which each reader holds a piece at a time.

_PIECE: Final = 64 << 10


class LongAnswer(StreamingResponse):
    """An answer in pieces. A client that has not read it all within the limit is
    disconnected."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        limit_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(pieces, headers=headers)
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            scope["state"][ABORT]()
            await asyncio.sleep(0)  # lets uvicorn notice, so that it logs no error


async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
    """A body piece by piece, so that none is copied into a socket's buffer as a whole."""
    for at in range(0, len(body), _PIECE):
        yield body[at : at + _PIECE]
