"""Takes every gRPC call through the gate, times it, and turns errors into statuses.

Health and reflection calls are bounded too, and their malformed requests are refused.

A method of our services gets the message, or the messages, and a `GrpcContext` in place of
gRPC's own context. The `GrpcContext` holds its `Caller`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from inspect import isawaitable
from typing import Any, Final

import grpc
from veneer_registry.errors import Aborted, InvalidField, VeneerError

from veneer_server.access.authenticate import ONCE, Credentials, repeated
from veneer_server.access.caller import Caller
from veneer_server.access.certificates import NOT_SHOWN, shown_to_grpc
from veneer_server.access.principal import ANYONE
from veneer_server.errors import without_frames
from veneer_server.rpc.open_calls import HEALTH_WATCH, WATCH, OpenCalls
from veneer_server.rpc.status import to_grpc_status
from veneer_server.rpc.transport.connections import Connections, OpenCall
from veneer_server.rpc.transport.receiving import (
    COUNTED_FROM,
    MAX_FIELDS,
    MAX_STREAM_FIELDS,
    STRANGERS,
    WAITING,
    Receiving,
    decoder,
)
from veneer_server.serving.gate import REQUEST_ID_FORM, CallContext, Gate
from veneer_server.serving.generation import Calls
from veneer_server.telemetry.metrics import Metrics

_OURS: Final = "/veneer.v1."

_WAITING: Final = frozenset({WATCH, HEALTH_WATCH})
"""Methods whose calls wait for events."""

# grpc's handlers and contexts are typed as Any by its stubs' generics.
_Behaviour = Callable[[Any, Any], Awaitable[Any]]
_Receive = Callable[[Any, "GrpcContext"], Awaitable[Any]]


class GrpcContext(CallContext):
    """The context of a method of our services: who calls, and the parts of gRPC's context that
    methods need.

    Attributes:
        grpc: gRPC's own context.
        write: sends a message of the answer.
        set_trailing_metadata: sets the metadata of an answer that succeeds.
    """

    __slots__ = ("grpc", "set_trailing_metadata", "write")

    def __init__(self, grpc: Any, caller: Caller) -> None:
        super().__init__(caller)
        self.grpc = grpc
        self.write: Callable[[Any], Awaitable[None]] = grpc.write
        self.set_trailing_metadata: Callable[[Any], None] = grpc.set_trailing_metadata


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
        gate: Gate,
        metrics: Metrics,
        calls: Calls,
        receiving: Receiving | None = None,
        *,
        open_calls: OpenCalls | None = None,
        connections: Connections | None = None,
        checks: Mapping[str, Callable[[bytes], None]] | None = None,
    ) -> None:
        """Args:
        receiving: decides which requests are read; None for the default bounds.
        open_calls: bounds the open calls; None for the default bounds.
        connections: tracks each connection's calls; None if connections are never closed to
            make room.
        checks: by method path, the check that runs before a request is parsed; see
            `decoder`.
        """
        self._gate = gate
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

        async def one(requests: Any, context: GrpcContext) -> Any:
            async def finish(request: Any) -> Any:
                if isinstance(request, bytes):  # large: must not block the event loop
                    context.size = len(request)
                    loop = asyncio.get_running_loop()
                    request = await loop.run_in_executor(self._decoding, decode, request)
                return request

            caller = context.caller
            stranger = self._gate.access.asks and caller.principal is ANYONE
            receiving = self._strangers if stranger else self._receiving
            request = await receiving.message(context.grpc.read, caller.peer, finish)
            if request is not grpc.aio.EOF:
                return _checked(request)
            if _gone(context.grpc):
                raise asyncio.CancelledError
            raise InvalidField("the call has no request message: send one")

        return one

    async def _paced(self, requests: Any, context: GrpcContext) -> Any:
        """The requests of a streaming call; each must arrive within the time limit."""

        async def paced() -> AsyncIterator[Any]:
            limit_s = self._receiving.limit_s
            while True:
                try:
                    async with asyncio.timeout(limit_s):
                        request = await context.grpc.read()
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
        name = method.rpartition("/")[2][:80]

        async def answered(requests: Any, context: Any) -> Any:
            headers = _headers(context)
            arrived = self._arrived(method, context, headers)
            try:
                with (
                    self._connections.call(arrived.caller.peer) as call,
                    await self._admit(arrived, headers, call),
                ):
                    request = await receive(requests, arrived)
                    call.arrived(watching=method in _WAITING)
                    with self._open.one(method, arrived.caller.tenant):
                        answer = await behaviour(request, context)
                    if not self._gate.access.asks:
                        call.earned("")
                    return answer
            except VeneerError as error:
                failure = without_frames(error)
            self._gate.count(failure)
            await self._gate.delay(arrived, failure, method=name, code=failure.code)
            return await self._abort(arrived, failure)

        return answered

    def _guard(self, method: str, behaviour: _Behaviour, receive: _Receive) -> _Behaviour:
        service, name = method.removeprefix("/").split("/", 1)
        handling = self._metrics.handling.labels(service, name)
        handled = self._metrics.handled
        gate = self._gate

        async def guarded(requests: Any, context: Any) -> Any:
            started = time.perf_counter()
            code = grpc.StatusCode.OK.name
            headers = _headers(context)
            arrived = self._arrived(method, context, headers)
            try:
                with (
                    # Writing to a caller that has left raises gRPC's own exception.
                    gate.answering(
                        arrived, "call failed", left=partial(_gone, context), method=method
                    ),
                    self._connections.call(arrived.caller.peer) as call,
                    await self._admit(arrived, headers, call),
                ):
                    self._calls.check_phase()
                    arrived.request = request = await receive(requests, arrived)
                    call.arrived(watching=method in _WAITING)
                    with (
                        self._open.one(method, arrived.caller.tenant),
                        self._calls.running(),
                    ):
                        if chosen := _request_id(request):
                            gate.rename(arrived, chosen)
                        arrived.answer = await behaviour(request, arrived)
                    if not gate.access.asks:
                        call.earned("")
                return arrived.answer
            except VeneerError as error:
                code = error.code
                failure = without_frames(error)
            except asyncio.CancelledError:
                code = _cancelled_code(context)
                raise
            finally:
                handling.observe(time.perf_counter() - started)
                handled.labels(service, name, code).inc()
            await gate.refuse(arrived, failure, method=name[:80], code=failure.code)
            # gRPC keeps an aborted call's frames for a while.
            request = arrived.request = None
            return await self._abort(arrived, failure)

        return guarded

    def _arrived(self, method: str, context: Any, headers: Mapping[str, str]) -> GrpcContext:
        caller = Caller.arriving(
            method,
            context.peer(),
            uuid.uuid4().hex,
            headers,
            time_left=context.time_remaining(),
            names_itself=True,
        )
        self._gate.arrived(caller)
        return GrpcContext(context, caller)

    async def _admit(
        self, arrived: GrpcContext, headers: Mapping[str, str], call: OpenCall
    ) -> AbstractContextManager[None]:
        """Call `Gate.admit`, before any of the request is read."""
        context, gate = arrived.grpc, self._gate
        _check_once(context)
        certificate = shown_to_grpc(context.auth_context()) if gate.access.asks else NOT_SHOWN
        admitted = await gate.admit(arrived, Credentials.of_headers(headers, certificate))
        if arrived.caller.principal is not ANYONE:
            call.earned(arrived.caller.tenant)
        return admitted

    async def _abort(self, arrived: GrpcContext, error: VeneerError) -> Any:
        """Send an error. Does not wait for the caller: if it reads nothing, gRPC queues the
        status behind the message that is stuck."""
        status = to_grpc_status(error)
        trailing = status.trailing + self._gate.limits(arrived.caller)
        return await arrived.grpc.abort(status.code, status.message, trailing)


def _headers(context: Any) -> dict[str, str]:
    metadata = context.invocation_metadata() or ()
    return {key: value for key, value in metadata if isinstance(value, str)}


def _check_once(context: Any) -> None:
    """Raise InvalidField if metadata that decides who calls is repeated."""
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
    """The checked messages of a stream. Unlike a generator, it can still be read after it has
    raised, so that a refused client can finish sending."""

    def __init__(self, requests: Any) -> None:
        self._requests = requests
        self._messages: Any = None

    def __aiter__(self) -> _Checked:
        return self

    async def __anext__(self) -> Any:
        if self._messages is None:  # gRPC warns about an iterator that is never used
            self._messages = aiter(self._requests)
        return _checked(await anext(self._messages))


async def _all(requests: Any, context: GrpcContext) -> Any:
    """The requests of a method that enforces its own bounds."""
    return _Checked(requests)


def _write_all(answers: Callable[[Any, Any], AsyncIterator[Any]]) -> _Behaviour:
    """Turn a handler that yields into one that writes."""

    async def written(requests: Any, context: Any) -> None:
        answering: Any = answers(requests, context)
        if isawaitable(answering):  # the handler writes by itself
            await answering
            return
        async for answer in answering:
            await context.write(answer)

    return written


def _serializer(
    serializer: Callable[[Any], bytes] | None,
) -> Callable[[Any], bytes] | None:
    """Extend a serializer to accept bytes that were serialised once for many callers."""
    if serializer is None:
        return None
    return lambda message: message if type(message) is bytes else serializer(message)


def _open_first(behaviour: _Behaviour) -> _Behaviour:
    """Send the initial metadata ahead of a stream's first message: if the caller never reads
    that message, the metadata would be stuck with it, and the status needs the metadata."""

    async def opened(request: Any, context: Any) -> Any:
        own = context.grpc if isinstance(context, GrpcContext) else context
        await own.send_initial_metadata(())
        return await behaviour(request, context)

    return opened


def _request_id(request: object) -> str:
    """The request id that the caller chose; empty if none. Raises InvalidField."""
    given: str = getattr(request, "request_id", "")
    if given and not REQUEST_ID_FORM.fullmatch(given):
        raise InvalidField(
            "request_id must be 1 to 128 printable ASCII characters without spaces: leave it "
            "empty to have the server generate one",
            metadata={"field": "request_id"},
        )
    return given


def _gone(context: Any) -> bool:
    """Whether the caller has left, or its deadline has passed."""
    return bool(context.cancelled() or context.done())


def _cancelled_code(context: Any) -> str:
    remaining = context.time_remaining()
    late = remaining is not None and remaining <= 0
    code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
    return code.name
