"""A POST with a JSON body, from reading it to the last byte of the answer."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

from veneer_registry.errors import Cancelled, ModelLoading, QueueFull, VeneerError

from veneer_server.errors import detail_for_log, internal_error, without_frames
from veneer_server.logs import REQUEST_ID, get_logger
from veneer_server.openai.endpoints.core import Core
from veneer_server.openai.errors import PACED, HttpError, http_failure
from veneer_server.openai.http.asgi import (
    ClientGone,
    Receive,
    Reply,
    Scope,
    Send,
    Share,
    read_json,
)
from veneer_server.openai.http.body import LONG_BODY
from veneer_server.serving.who import CALLER

__all__ = ["Answering", "JsonEndpoint"]


@dataclass(frozen=True, slots=True)
class Answering:
    """A request whose fields have been checked.

    Attributes:
        run: answers it, and returns what the audit log takes a revision from, if anything.
        about: what the audit log takes a name from; see `Audit.note`.
    """

    run: Callable[[Reply], Awaitable[object]]
    about: object = None


@dataclass(frozen=True, slots=True)
class _Failed:
    """An error that is still to be sent. Attributes: about: as in `Answering`."""

    error: VeneerError | HttpError
    about: object = None


_LEFT: Final = Cancelled("the caller left")
"""How the audit log has calls whose end nobody waited for."""

_log = get_logger(__name__)


class JsonEndpoint(ABC):
    """An ASGI application for one path.

    Attributes:
        method: as in `access.methods.METHODS`.
    """

    method: ClassVar[str]

    def __init__(self, core: Core) -> None:
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; if the client disconnects, the work ends within a step."""
        reply = Reply(scope, send, self._core.reader_limit_s)
        failed = None
        with self._core.bodies.share() as share:
            try:
                failed = await self._answer(scope, receive, reply, share)
            except ClientGone:
                return
        if failed is not None:  # may wait: the body's share has been released
            await self._fail(reply, failed, share.received)

    async def _answer(
        self, scope: Scope, receive: Receive, reply: Reply, share: Share
    ) -> _Failed | None:
        """Read the body and answer it."""
        core = self._core
        try:
            body = await read_json(receive, core.reader_limit_s, core.bodies, share)
        except (QueueFull, HttpError) as error:
            return _Failed(without_frames(error))
        work = asyncio.create_task(self._work(body, reply, long=share.received >= LONG_BODY))
        gone = asyncio.create_task(_disconnected(receive))
        del body  # the parsed body is many times as large; keep only the checked request
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.wait({work, gone})
        return None if work.cancelled() else work.result()

    async def _work(self, body: object, reply: Reply, *, long: bool) -> _Failed | None:
        """Answer a body. Args: long: its fields are checked off the event loop."""
        about = None
        try:
            with self._core.calls.running():
                if long:
                    answering = await self._core.bodies.thread(partial(self._check, body))
                else:
                    answering = self._check(body)
                del body
                about = answering.about
                done = await answering.run(reply)
            self._core.audit.note(self.method, CALLER.get(), request=about, answer=done)
            return None
        except asyncio.CancelledError:
            self._core.audit.note(self.method, CALLER.get(), _LEFT, request=about)
            raise
        except VeneerError as error:
            return _Failed(without_frames(error), about)
        except Exception as error:
            _log.error("request failed", error)
            return _Failed(internal_error(REQUEST_ID.get()), about)

    async def _fail(self, reply: Reply, failed: _Failed, size: int) -> None:
        error = failed.error
        reason = error.reason if isinstance(error, VeneerError) else error.code
        if isinstance(error, VeneerError):
            self._core.metrics.failures.labels(reason).inc()
            self._core.audit.note(self.method, CALLER.get(), error, request=failed.about)
        if not isinstance(error, ModelLoading):  # waiting clients retry over and over
            why = {"reason": reason, **detail_for_log(error)}
            _log.often(reason, "call refused", method=type(self).__name__, **why)
        if not reply.started and http_failure(error).status in PACED:
            await self._core.pace.wait(CALLER.get(), size)
        try:
            await reply.fail(error)
        except VeneerError:
            _log.info("the caller left before reading the error", reason=str(error))

    @abstractmethod
    def _check(self, body: object) -> Answering:
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
