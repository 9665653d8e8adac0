"""Gives every Veneer call a request id, admission control, an error status and timing.

Health and reflection calls are bounded too, and their malformed requests are refused.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from inspect import isawaitable
from typing import Any, Final

import grpc
from veneer_registry.errors import (
    Aborted,
    Cancelled,
    InvalidField,
    ModelLoading,
    VeneerError,
)

from veneer_server.access.audit import Audit
from veneer_server.access.authenticate import ONCE, Access, Credentials, repeated
from veneer_server.access.certificates import NOT_SHOWN, shown_to_grpc
from veneer_server.access.principal import ANYONE, PRINCIPAL
from veneer_server.errors import detail_for_log, internal_error, to_grpc_status, without_frames
from veneer_server.logs import REQUEST_ID, get_logger
from veneer_server.queues.refusal_pace import Pace
from veneer_server.quotas.rates import Quotas
from veneer_server.quotas.standing import rate_headers
from veneer_server.replication.asked import ASKED, Asked
from veneer_server.rpc.inference_service import GENERATE_METHODS
from veneer_server.rpc.open_calls import HEALTH_WATCH, WATCH, OpenCalls
from veneer_server.rpc.transport.connections import Call, Connections
from veneer_server.rpc.transport.decoding import (
    COUNTED_FROM,
    MAX_FIELDS,
    MAX_STREAM_FIELDS,
    decoder,
)
from veneer_server.rpc.transport.receiving import STRANGERS, WAITING, Receiving
from veneer_server.serving.calls import Calls
from veneer_server.serving.who import CALLER
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.tracing import INGRESS, Ingress

__all__ = ["CallInterceptor"]

_OURS: Final = "/veneer.v1."
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")

_PACED: Final = frozenset(
    {"INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED"}
)
"""Codes of invalid requests; see `pace`."""

_LEFT: Final = Cancelled("the caller left, or its deadline passed")
"""How the audit log has calls whose end nobody waited for."""

_WAITING: Final = frozenset({WATCH, HEALTH_WATCH})
"""Methods whose calls wait for news."""

_SIZE: ContextVar[int] = ContextVar("size", default=0)
"""Bytes of the current call's request if it is large, else 0."""

_log = get_logger(__name__)

# grpc's handlers and contexts are typed as Any by its stubs' generics.
_Behaviour = Callable[[Any, Any], Awaitable[Any]]
_Receive = Callable[[Any, Any], Awaitable[Any]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method: bounds what callers may hold, and turns malformed requests and
    Veneer errors into statuses.

    Methods under ``veneer.v1`` are also counted, logged and admitted by phase; health and
    reflection answer in every phase.

    A unary-request method is registered as if it took a stream of requests. The wire format
    is the same, but gRPC then reads only on demand, so a request that never arrives whole
    can be abandoned (see `receiving`).
    """

    def __init__(
        self,
        metrics: Metrics,
        calls: Calls,
        receiving: Receiving | None = None,
        *,
        open_calls: OpenCalls | None = None,
        connections: Connections | None = None,
        checks: Mapping[str, Callable[[bytes], None]] | None = None,
        pace: Pace | None = None,
        access: Access | None = None,
        audit: Audit | None = None,
        quotas: Quotas | None = None,
        elsewhere: Set[str] = frozenset(),
    ) -> None:
        """Args:
        receiving: decides which requests are read; None for the default bounds.
        open_calls: bounds the open calls; None for the default bounds.
        connections: tracks each connection's calls; None if none are closed to make room.
        checks: by method path, the check that runs before a request is parsed; see
            `decoder`.
        pace: delays refusals; None for the default.
        access: lets calls in; None lets everybody in.
        audit: notes calls that change something or are refused.
        quotas: whose rest a refused generate call is told.
        elsewhere: methods that only another port answers.
        """
        self._audit = audit or Audit(None)
        self._quotas = quotas or Quotas()
        self._access = access or Access()
        self._elsewhere = elsewhere
        self._pace = pace or Pace()
        self._checks = checks or {}
        self._metrics = metrics
        self._calls = calls
        self._receiving = receiving or Receiving()
        self._strangers = Receiving(
            places=STRANGERS, slow=1, waiting=WAITING // 8, limit_s=self._receiving.limit_s
        )
        self._open = open_calls or OpenCalls()
        self._connections = connections or Connections(1)
        self._wrapped: dict[str, Any] = {}
        # One thread: decoding holds the GIL, so more would only contend with the event loop.
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="decode")

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        method: str = handler_call_details.method
        if (known := self._wrapped.get(method)) is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return None
        wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:
        decode = decoder(
            handler.request_deserializer,
            self._checks.get(method),
            most=MAX_STREAM_FIELDS if handler.request_streaming else MAX_FIELDS,
        )
        coders = {
            "request_deserializer": decode,
            "response_serializer": _serializer(handler.response_serializer),
        }
        guard = self._guard if method.startswith(_OURS) else self._answer
        if handler.unary_unary or handler.unary_stream:
            coders["request_deserializer"] = lambda data: (
                data if len(data) >= COUNTED_FROM else decode(data)
            )
        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(
                guard(method, handler.unary_unary, self._one(decode)), **coders
            )
        if handler.unary_stream:
            return grpc.stream_stream_rpc_method_handler(
                guard(method, _open_first(handler.unary_stream), self._one(decode)), **coders
            )
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(
                guard(method, handler.stream_unary, _all), **coders
            )
        # Reflection: one response for each request.
        return grpc.stream_stream_rpc_method_handler(
            guard(method, _write_all(handler.stream_stream), self._paced), **coders
        )

    # ----------------------------------------------------------- a call's requests

    def _one(self, decode: Callable[[bytes], Any]) -> _Receive:
        """The receiver for methods that take a single request."""

        async def finish(request: Any) -> Any:
            if isinstance(request, bytes):  # large: must not block the event loop
                _SIZE.set(len(request))
                loop = asyncio.get_running_loop()
                request = await loop.run_in_executor(self._decoding, decode, request)
            return request

        async def one(requests: Any, context: Any) -> Any:
            stranger = self._access.asks and PRINCIPAL.get() is ANYONE
            receiving = self._strangers if stranger else self._receiving
            request = await receiving.message(context.read, context.peer(), finish)
            if request is not grpc.aio.EOF:
                return _checked(request)
            if context.cancelled() or context.done():
                raise asyncio.CancelledError
            raise InvalidField("the call has no request message: send one")

        return one

    async def _paced(self, requests: Any, context: Any) -> Any:
        """The requests of a streaming call; each must arrive within the time limit."""

        async def paced() -> AsyncIterator[Any]:
            limit_s = self._receiving.limit_s
            while True:
                try:
                    async with asyncio.timeout(limit_s):
                        request = await context.read()
                except TimeoutError as error:
                    raise Aborted(
                        f"no request arrived within {limit_s:g} s; call again when you have a "
                        "request",
                        metadata={"cause": "no_request"},
                    ) from error
                if request is grpc.aio.EOF:
                    return
                yield _checked(request)

        return paced()

    # ---------------------------------------------------------------------- guards

    def _answer(self, method: str, behaviour: _Behaviour, receive: _Receive) -> _Behaviour:
        """Guards health and reflection: enforces the bounds and reports Veneer errors."""

        async def answered(requests: Any, context: Any) -> Any:
            try:
                with (
                    self._connections.call(context.peer()) as call,
                    await self._admit(method, context, call),
                ):
                    request = await receive(requests, context)
                    call.arrived(watching=method in _WAITING)
                    with self._open.one(method):
                        answer = await behaviour(request, context)
                    if not self._access.asks:
                        call.earned("")
                    return answer
            except VeneerError as error:
                failure = without_frames(error)
            return await self._refuse(method, failure, context)

        return answered

    def _guard(self, method: str, behaviour: _Behaviour, receive: _Receive) -> _Behaviour:
        service, name = method.removeprefix("/").split("/", 1)
        handling = self._metrics.handling.labels(service, name)
        handled = self._metrics.handled

        async def guarded(requests: Any, context: Any) -> Any:
            started = time.perf_counter()
            code = grpc.StatusCode.OK.name
            request, fallback_id = None, uuid.uuid4().hex
            REQUEST_ID.set(fallback_id)
            CALLER.set(peer := context.peer())
            try:
                with self._connections.call(peer) as call:
                    INGRESS.set(Ingress.of(f"{service}/{name}", _headers(context)))
                    with await self._admit(method, context, call):
                        self._calls.check_phase()
                        request = await receive(requests, context)
                        call.arrived(watching=method in _WAITING)
                        with self._open.one(method), self._calls.running():
                            REQUEST_ID.set(_request_id(request) or fallback_id)
                            answer = await behaviour(request, context)
                        if not self._access.asks:
                            call.earned("")
                self._audit.note(method, peer, request=request, answer=answer)
                return answer
            except VeneerError as error:
                code = error.code
                failure = without_frames(error)
            except asyncio.CancelledError:
                code = _cancelled_code(context)
                self._audit.note(method, peer, _LEFT, request=request)
                raise
            except Exception as error:
                if context.cancelled() or context.done():
                    # Writing to a caller that has left raises grpc's own exception.
                    code = _cancelled_code(context)
                    self._audit.note(method, peer, _LEFT, request=request)
                    raise asyncio.CancelledError from error
                failure = internal_error(REQUEST_ID.get())
                code = failure.code
                _log.error("call failed", error, method=method)
            finally:
                handling.observe(time.perf_counter() - started)
                handled.labels(service, name, code).inc()
            self._audit.note(method, peer, failure, request=request)
            request = None  # grpc keeps an aborted call's frames for a while
            return await self._refuse(method, failure, context)

        return guarded

    async def _admit(
        self, method: str, context: Any, call: Call
    ) -> AbstractContextManager[None]:
        """Before anything of the request is read. Unless it is an answer that is generated, the
        call ends, while the result is entered, once its caller is not let in any more."""
        _check_once(context)
        headers = _headers(context)
        certificate = shown_to_grpc(context.auth_context()) if self._access.asks else NOT_SHOWN
        credentials = Credentials.of_headers(headers, certificate)
        principal = await self._access.admit(method, credentials, self._elsewhere)
        if principal is not ANYONE:
            call.earned(principal.tenant)
        ASKED.set(Asked.of(headers))
        if method in GENERATE_METHODS:
            return nullcontext()
        return self._access.while_admitted(method, credentials, self._elsewhere)

    async def _refuse(self, method: str, error: VeneerError, context: Any) -> Any:
        name = method.rpartition("/")[2]
        if not isinstance(error, ModelLoading):  # waiting clients retry over and over
            why = {"code": error.code, "reason": error.reason, **detail_for_log(error)}
            _log.often(error.reason, "call refused", method=name[:80], **why)
        status = to_grpc_status(error)
        self._metrics.failures.labels(error.reason).inc()
        if error.code in _PACED:
            await self._pace.wait(context.peer(), _SIZE.get())
        # Does not wait for the caller: if it reads nothing, gRPC queues the status behind
        # the message that is stuck.
        trailing = status.trailing
        if method in GENERATE_METHODS:
            trailing += rate_headers(self._quotas, PRINCIPAL.get().accounts)
        return await context.abort(status.code, status.message, trailing)


def _headers(context: Any) -> dict[str, str]:
    metadata = context.invocation_metadata() or ()
    return {key: value for key, value in metadata if isinstance(value, str)}


def _check_once(context: Any) -> None:
    """Raise InvalidField if metadata that decides who calls is there twice."""
    names = [key for key, _ in context.invocation_metadata() or ()]
    if len(set(names)) < len(names):
        for name in ONCE:
            if names.count(name) > 1:
                raise repeated(name)


def _checked(request: Any) -> Any:
    """The decoded message. Raises the error that `decoder` returned in its place, if any."""
    if isinstance(request, VeneerError):
        raise request
    return request


class _Checked:
    """The checked messages of a stream. Unlike a generator, it can be read further after it
    has raised, so that a refused client can finish sending."""

    def __init__(self, requests: Any) -> None:
        self._requests = requests
        self._messages: Any = None

    def __aiter__(self) -> _Checked:
        return self

    async def __anext__(self) -> Any:
        if self._messages is None:  # gRPC warns about an iterator that is never used
            self._messages = aiter(self._requests)
        return _checked(await anext(self._messages))


async def _all(requests: Any, context: Any) -> Any:
    """The requests of a method that enforces its own bounds."""
    return _Checked(requests)


def _write_all(answers: Callable[[Any, Any], AsyncIterator[Any]]) -> _Behaviour:
    """Turn a handler that yields into one that writes."""

    async def written(requests: Any, context: Any) -> None:
        answering: Any = answers(requests, context)
        if isawaitable(answering):  # it writes by itself
            await answering
            return
        async for answer in answering:
            await context.write(answer)

    return written


def _serializer(
    serializer: Callable[[Any], bytes] | None,
) -> Callable[[Any], bytes] | None:
    """Accepts messages, and bytes that were serialised once for many callers."""
    if serializer is None:
        return None
    return lambda message: message if type(message) is bytes else serializer(message)


def _open_first(behaviour: _Behaviour) -> _Behaviour:
    """Send the initial metadata ahead of a stream's first message: if the caller never reads
    that message, the metadata would be stuck with it, and the status needs the metadata."""

    async def opened(request: Any, context: Any) -> Any:
        await context.send_initial_metadata(())
        return await behaviour(request, context)

    return opened


def _request_id(request: object) -> str:
    """The request id that the caller chose; empty if none. Raises InvalidField."""
    given: str = getattr(request, "request_id", "")
    if given and not _REQUEST_ID.fullmatch(given):
        raise InvalidField(
            "request_id must be 1 to 128 printable ASCII characters without spaces: leave it "
            "empty to have the server generate one",
            metadata={"field": "request_id"},
        )
    return given


def _cancelled_code(context: Any) -> str:
    remaining = context.time_remaining()
    late = remaining is not None and remaining <= 0
    code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
    return code.name
