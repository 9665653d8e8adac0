"""What every call of ours gets: an id, admission, a status for its error, timing."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from veneer_registry.errors import InvalidField, VeneerError

from veneer_server.errors import internal_error, to_grpc_status
from veneer_server.logs import REQUEST_ID, get_logger
from veneer_server.metrics import Metrics
from veneer_server.rpc.calls import Calls

__all__ = ["CallInterceptor"]

_OURS: Final = "/veneer.v1."
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")

_log = get_logger(__name__)

# grpc's handlers and contexts are typed as Any by its stubs' generics.
_Behaviour = Callable[[Any, Any], Awaitable[Any]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method under ``veneer.v1``; health and reflection pass as they are."""

    def __init__(self, metrics: Metrics, calls: Calls) -> None:
        self._metrics = metrics
        self._calls = calls
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        method: str = handler_call_details.method
        if not method.startswith(_OURS):
            return await continuation(handler_call_details)
        if (known := self._wrapped.get(method)) is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return None
        wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._guard(method, handler.unary_unary), **coders
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                self._guard(method, _open_first(handler.unary_stream)), **coders
            )
        return grpc.stream_unary_rpc_method_handler(
            self._guard(method, handler.stream_unary), **coders
        )

    def _guard(self, method: str, behaviour: _Behaviour) -> _Behaviour:
        service, name = method.removeprefix("/").split("/", 1)
        handling = self._metrics.handling.labels(service, name)
        handled = self._metrics.handled

        async def guarded(request: Any, context: Any) -> Any:
            started = time.perf_counter()
            code = grpc.StatusCode.OK.name
            fallback_id = uuid.uuid4().hex
            REQUEST_ID.set(fallback_id)
            try:
                with self._calls.running():
                    REQUEST_ID.set(_request_id(request) or fallback_id)
                    return await behaviour(request, context)
            except VeneerError as error:
                code = error.code
                failure = error
            except asyncio.CancelledError:
                code = _cancelled_code(context)
                raise
            except Exception as error:
                if context.cancelled() or context.done():
                    # A write to a caller that has gone fails in grpc's own way.
                    code = _cancelled_code(context)
                    raise asyncio.CancelledError from error
                failure = internal_error(REQUEST_ID.get())
                code = failure.code
                _log.error("call failed", error, method=method)
            finally:
                handling.observe(time.perf_counter() - started)
                handled.labels(service, name, code).inc()
            _log.info("call refused", method=name, code=code, reason=failure.reason)
            status = to_grpc_status(failure)
            self._metrics.failures.labels(failure.reason).inc()
            # Does not wait for the caller: where it takes nothing, the status stays in
            # gRPC behind the one message that is stuck.
            return await context.abort(status.code, status.message, status.trailing)

        return guarded


def _open_first(behaviour: _Behaviour) -> _Behaviour:
    """Send the initial metadata before a stream's messages, not with the first one: a
    first message that nobody takes would hold it back, and the status needs it."""

    async def opened(request: Any, context: Any) -> Any:
        await context.send_initial_metadata(())
        return await behaviour(request, context)

    return opened


def _request_id(request: object) -> str:
    """The caller's id, where the request carries one."""
    given: str = getattr(request, "request_id", "")
    if given and not _REQUEST_ID.fullmatch(given):
        raise InvalidField(
            "request_id must be 1 to 128 printable ASCII characters without spaces: "
            "leave it empty to let the server make one",
            metadata={"field": "request_id"},
        )
    return given


def _cancelled_code(context: Any) -> str:
    remaining = context.time_remaining()
    late = remaining is not None and remaining <= 0
    code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
    return code.name
