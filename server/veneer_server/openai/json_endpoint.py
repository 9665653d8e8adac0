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
        run: answers the request. Returns the object from which the audit log takes a revision,
            if any.
        about: the object from which the audit log takes a name; see `Audit.note`.
        ignored: the request's fields and tools that have no effect.
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
    """Call `Gate.refuse`. Errors at the HTTP level are only logged and delayed."""
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
        del body  # much larger than the checked request, which is kept
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
        """Answer a body. Args: long: whether to check its fields off the event loop."""
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
        """Return a new `Ignored`, for one request."""
        return Ignored(self._core.unknown_fields)

    def _tell(self, ignored: Ignored, reply: Reply) -> None:
        """Count the fields and tools without effect, and name them in the answer's headers."""
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
        """Check the fields now, and answer later. The result should not keep the body.

        Runs in a thread if the body is long. Even there, no call into C may take long, since it
        holds the GIL. So the caller's JSON is measured before it is serialized
        (`check_json_size`), and a list before it is iterated over.

        Raises:
            InvalidField: a field is invalid.
        """


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


# -------------------- streams
# Long answers, sent so that each reader holds one piece in memory at a time.

_PIECE: Final = 64 << 10


class LongAnswer(StreamingResponse):
    """An answer sent in pieces. A client that has not read it all within the limit is
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
    """Yield a body piece by piece, so that it is not copied into a socket's buffer at once."""
    for at in range(0, len(body), _PIECE):
        yield body[at : at + _PIECE]
