"""One HTTP connection: uvicorn's, with bounds, strict parsing and paced refusals."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from veneer_registry.errors import QueueFull

from veneer_server.access.certificates import shown
from veneer_server.logs import get_logger
from veneer_server.openai.errors import HttpError, http_failure
from veneer_server.openai.http.asgi import ABORT, CERTIFICATE, EARNED
from veneer_server.openai.http.strict import StrictConnection
from veneer_server.queues.connection_places import OpenConnection, OpenConnections, host_of
from veneer_server.queues.refusal_pace import RefusalPace
from veneer_server.system.descriptors import UNREAD

_AHEAD: Final = 64 << 10
"""Bytes of pipelined requests that are buffered while one is answered."""

_MALFORMED: Final = 512 << 10
"""Bytes that a malformed request counts as in `RefusalPace`: long heads and tiny chunks take
1 ms to read, and each such request needs a new connection."""

_LOOK_S: Final = 0.005
"""How long there may be too many connections. Data that has arrived on the new ones is read
first, so that a whole request is never dropped unread."""

_MOST_CLOSING, _CLOSING_S = UNREAD // 2, 1.0
"""Most connections that may keep sending after a refusal, and for how many seconds."""

_log = get_logger(__name__)

# Silences uvicorn's warnings about bad requests, which we log ourselves, and about
# `Upgrade` headers.
_uvicorn_log: Final = logging.getLogger("veneer_server.openai.uvicorn")
_uvicorn_log.setLevel(logging.ERROR)


def _too_many_connections(most: int) -> bytes:
    """The answer to a connection over the limit, sent without waiting for a request."""
    failure = http_failure(
        QueueFull(
            f"{most} connections are open, this server's maximum: retry, or start it with a "
            "larger --max-connections",
            retry_after_s=1.0,
        )
    )
    body = json.dumps(failure.body).encode()
    headers = {
        **failure.headers,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    lines = [f"HTTP/1.1 {failure.status} {HTTPStatus(failure.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def connection_class(
    limit_s: float,
    most: int,
    pace: RefusalPace,
    on_malformed: Callable[[HttpError], None],
    *,
    keyless: bool = True,
) -> type[H11Protocol]:
    """Make the protocol class of one server's connections, which extends uvicorn's.

    Args:
        limit_s: how long a connection may go without a request being answered.
        most: most connections that may be open.
        pace: delays refusals.
        on_malformed: called for each request that is not valid HTTP/1.1.
        keyless: whether callers need no key.
    """

    places = OpenConnections(most, keyless=keyless)
    by_caller: dict[str, Connection] = {}
    by_place: dict[OpenConnection, Connection] = {}
    refused: dict[OpenConnection, None] = {}
    closing: set[Connection] = set()
    refusal = _too_many_connections(most)

    class Connection(H11Protocol):
        """What this adds to uvicorn's protocol:

        * A limit on how long a connection may take to send a request, so that idle and
          dripping ones do not accumulate.
        * A client's disconnect is noticed even if it had already sent its next request.
        * ASGI gets a way to drop the connection: after a plain close, a client that reads
          nothing keeps the socket open.
        * Messages are parsed strictly. A refused one is counted and answered like any other
          bad request.
        * At most ``most`` connections. A further one replaces the one that
          `OpenConnections` names.
        """

        _late: asyncio.TimerHandle | None = None
        _refused = False
        _place: OpenConnection
        _head = True
        """Whether it waits for a request's head."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.conn = self._strict = StrictConnection()
            self.logger = _uvicorn_log

        def send_400_response(self, msg: str) -> None:
            """Called by uvicorn when `StrictConnection` has refused a message."""
            self._refused = True
            if self._place in by_place:
                refused[self._place] = None
            refusal = self._strict.refusal
            why = str(refusal)[:200] if refusal is not None else msg
            status = refusal.error_status_hint if refusal is not None else 400
            error = HttpError(
                status, "malformed_request", f"the request is not valid HTTP: {why}"
            )
            on_malformed(error)
            _log.often(error.code, "call refused", method="http", reason=error.code)
            if self.cycle is not None:
                self.cycle.disconnected = True  # wakes readers of the body and writers
                self.cycle.message_event.set()
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.abort()  # another answer has been sent in part
                return
            wait_s = pace.charge(self._caller(), _MALFORMED)
            self.loop.call_later(wait_s, self._send_refusal, error)

        def _caller(self) -> str:
            host, port = self.client or ("", 0)
            return f"{host}:{port}"

        def _send_refusal(self, error: HttpError) -> None:
            if self.transport.is_closing():
                return
            failure = http_failure(error)
            body = json.dumps(failure.body).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                *failure.headers.items(),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=failure.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
            self._close_read()

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self.app_state = {
                **self.app_state,
                ABORT: transport.abort,
                CERTIFICATE: shown(transport),
                EARNED: self._earned,
            }
            super().connection_made(transport)
            caller = self._caller()
            self._place = places.join(host_of(caller))
            by_place[self._place] = by_caller[caller] = self
            full = len(places) > most and places.alone(self._place)
            if full and next(_delayed(), None) is None:
                self.give_way()  # all others are being answered
                return
            if len(places) > most + UNREAD - _MOST_CLOSING:
                _trim()
            elif len(places) == most + 1:
                self.loop.call_later(_LOOK_S, _trim)
            self._watch()

        def give_way(self) -> None:
            """Close the connection, for another one to take its place."""
            self._leave()
            begun = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
            resting = self._place.owner is not None and self.conn.their_state is h11.IDLE
            if begun or resting or self.transport.is_closing():
                self.transport.abort()
                return
            if self.cycle is not None:
                self.cycle.disconnected = True  # wakes readers of the body and writers
                self.cycle.message_event.set()
            self._refused = True
            self.transport.write(refusal)
            self._close_read()

        def _close_read(self) -> None:
            """Close once the client has closed, or after a short time. Data that it still sends
            is read and discarded: left unread, it would turn the close into a reset, and the
            answer would be lost."""
            if len(closing) >= _MOST_CLOSING:
                self.transport.close()
                return
            closing.add(self)
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.flow.resume_reading()
            self.loop.call_later(_CLOSING_S, self.transport.abort)

        def _earned(self, owner: str) -> None:
            """Note that the caller has shown a valid key of this tenant or, if the server has
            no keys, has been answered without an error."""
            if self._place not in by_place:
                return
            if (other := places.earns(self._place, owner or self._place.host)) is not None:
                by_place[other].give_way()
            self._watch()

        def _leave(self) -> None:
            if by_place.pop(self._place, None) is not None:
                places.leave(self._place)
                refused.pop(self._place, None)
                if by_caller.get(self._caller()) is self:
                    del by_caller[self._caller()]

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._place in by_place:
                places.progressed(self._place)
                self._watch()

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return  # discarded: unread bytes would turn the close into a reset
            super().data_received(data)
            if self._place in by_place:
                places.progressed(self._place, len(data))
                self._watch()
            ahead, _ = self.conn.trailing_data
            if self.conn.their_state is h11.DONE and len(ahead) <= _AHEAD:
                # uvicorn stops reading once the next request has begun to arrive, and
                # would then not notice that the client has disconnected.
                self.flow.resume_reading()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._place in by_place:
                places.progressed(self._place)
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._late is not None:
                self._late.cancel()
            self._leave()
            closing.discard(self)
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Run the timer while no request is being answered. The rest of a body after an
            early answer does not stop it, and no data restarts it."""
            answering = self.cycle is not None and not self.cycle.response_complete
            if self._place in by_place:
                self._tell(answering)
            if answering:
                if self._late is not None:
                    self._late.cancel()
                    self._late = None
            elif self._late is None and not self.transport.is_closing():
                self._late = self.loop.call_later(limit_s, self.transport.abort)

        def _tell(self, answering: bool) -> None:
            """Tell `places` whether the connection waits for its peer."""
            sending = self.conn.their_state is h11.SEND_BODY
            if answering and self._head:
                places.progressed(self._place)  # a whole head has arrived
            self._head = not answering
            if answering and not sending and not self.flow.write_paused:
                places.busy(self._place)
            else:
                asking = answering or sending or bool(self.conn.trailing_data[0])
                places.waits(self._place, asking=asking)
                if len(places) > most:
                    self.loop.call_soon(_trim)

    def _delayed() -> Iterator[OpenConnection]:
        """Places whose refusal is being delayed: malformed requests', and those of callers that
        have not earned their place."""
        yield from refused
        for caller in pace.delayed():
            found = by_caller.get(caller)
            if found is not None and found._place.owner is None:
                yield found._place

    def _trim() -> None:
        """Close connections while there are too many."""
        while len(places) > most:
            victim = places.victim(_delayed()) or next(reversed(by_place))  # the newest
            by_place[victim].give_way()

    return Connection
