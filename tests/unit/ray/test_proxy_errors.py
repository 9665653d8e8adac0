"""Serve's gRPC proxy as `servicers` mends it, over a real socket. No Ray is needed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from enum import Enum
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from veneer_ray import servicers
from veneer_ray.calls import DETAILS, METHODS, CallEnded, lost, passed_on
from veneer_registry.errors import AdapterNotFound

from tests.server_harness import refusal

Behave = Callable[[Any], Iterator[bytes]]


class Kind(Enum):
    """FAKE: Serve's names of the kinds of calls."""

    UNARY_UNARY = "unary_unary"
    UNARY_STREAM = "unary_stream"
    STREAM_UNARY = "stream_unary"
    STREAM_STREAM = "stream_stream"


class Serves(grpc.GenericRpcHandler):
    """FAKE: a service's handlers, each replaced as Serve's proxy does it."""

    def __init__(self, handlers: grpc.GenericRpcHandler, factory: Callable[..., Any]) -> None:
        self.handlers = handlers
        self.factory = factory

    def service(self, details: Any) -> Any:
        handler = self.handlers.service(details)
        if handler is None:
            return None
        kind = Kind(
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}"
        )
        made = self.factory(service_method=details.method, streaming_type=kind)
        return handler._replace(response_serializer=None, **{kind.value: made})


class Proxy:
    """FAKE: Serve's proxy. Behaves as told instead of asking an ingress; like Serve's, it sets
    a status only where the ingress has not."""

    def __init__(self, behave: Behave) -> None:
        self.server = grpc.aio.server()
        self.service_handler_factory: Callable[..., Any] = self.make
        self.behave = behave

    def make(self, service_method: str, streaming_type: Kind) -> Any:
        async def stream(_: Any, context: Any) -> AsyncIterator[bytes]:
            for message in self.behave(context):
                yield message
            self.finish(context)

        async def single(_: Any, context: Any) -> bytes:
            last = b""
            for message in self.behave(context):
                last = message
            self.finish(context)
            return last

        return stream if streaming_type.value.endswith("_stream") else single

    @staticmethod
    def finish(context: Any) -> None:
        if not context.code():
            context.set_code(grpc.StatusCode.OK)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self.server.add_generic_rpc_handlers(
            [Serves(each, self.service_handler_factory) for each in handlers]
        )

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """As with older versions of gRPC: the generic handlers are enough."""


@asynccontextmanager
async def proxy(behave: Behave) -> AsyncIterator[grpc.aio.Channel]:
    made = Proxy(behave)
    for add in (servicers.add_inference, servicers.add_adapters, servicers.add_health):
        add(Mock(), made)  # as Serve does: no method of it is ever called
    port = made.server.add_insecure_port("127.0.0.1:0")
    await made.server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await made.server.stop(None)


def set_end(context: Any, ended: CallEnded) -> None:
    """As Serve takes it over from the ingress, with a message."""
    if ended.code:
        context.set_code(next(c for c in grpc.StatusCode if c.value[0] == ended.code))
        context.set_details(ended.message)
    context.set_trailing_metadata((("request_id", "1"), *ended.trailing))


async def stream(channel: grpc.aio.Channel) -> Any:
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    return stub.GenerateStream(inference_pb2.GenerateRequest())


def one(text: str) -> bytes:
    return inference_pb2.GenerateStreamResponse(text=text).SerializeToString()


MISSING = CallEnded.by(AdapterNotFound("no adapter is called x", metadata={"adapter": "x"}))


async def test_a_stream_s_error_has_details_and_no_message_more() -> None:
    def behave(context: Any) -> Iterator[bytes]:
        yield one("a")
        set_end(context, MISSING)
        yield b""

    async with proxy(behave) as channel:
        call = await stream(channel)
        texts = []
        try:
            async for message in call:
                texts.append(message.text)
        except grpc.aio.AioRpcError as error:
            found = refusal(error)
    assert texts == ["a"], "the message that carries the end has reached the caller"
    assert (found.code, found.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert found.metadata["adapter"] == "x"


async def test_a_stream_that_ends_well_has_its_trailing_metadata() -> None:
    def behave(context: Any) -> Iterator[bytes]:
        yield one("a")
        set_end(context, CallEnded.well((("veneer-replica", "r"),)))
        yield b""

    async with proxy(behave) as channel:
        call = await stream(channel)
        assert [message.text async for message in call] == ["a"]
        assert ("veneer-replica", "r") in tuple(await call.trailing_metadata())
        assert await call.code() is grpc.StatusCode.OK


async def test_an_answer_of_one_message_may_be_empty_and_may_fail() -> None:
    ended = CallEnded()

    def behave(context: Any) -> Iterator[bytes]:
        set_end(context, ended)
        yield b""

    async with proxy(behave) as channel:
        stub: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        request = adapters_pb2.GetAdapterRequest(name="x")
        assert await stub.GetAdapter(request) == adapters_pb2.GetAdapterResponse()
        ended = MISSING
        try:
            await stub.GetAdapter(request)
        except grpc.aio.AioRpcError as error:
            found = refusal(error)
    assert found.reason == "ADAPTER_NOT_FOUND"


async def test_serve_s_own_errors_get_details_and_a_code_that_is_worth_a_retry() -> None:
    async def failing(code: grpc.StatusCode) -> Any:
        def behave(context: Any) -> Iterator[bytes]:
            yield one("a")
            context.set_code(code)
            context.set_details("a traceback of Serve's")

        async with proxy(behave) as channel:
            try:
                async for _ in await stream(channel):
                    pass
            except grpc.aio.AioRpcError as error:
                return refusal(error)

    died = await failing(grpc.StatusCode.INTERNAL)
    assert (died.code, died.metadata["cause"]) == ("UNAVAILABLE", "ingress_lost")
    assert died.retry_after_s == 1.0
    full = await failing(grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert (full.code, full.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")


async def test_a_call_that_was_cancelled_is_left_as_it_is() -> None:
    def behave(context: Any) -> Iterator[bytes]:
        yield one("a")
        context.set_code(grpc.StatusCode.CANCELLED)

    async with proxy(behave) as channel:
        call = await stream(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in call:
                pass
        assert await call.code() is grpc.StatusCode.CANCELLED
        assert not any(key == DETAILS for key, _ in await call.trailing_metadata())


async def test_the_health_service_is_there() -> None:
    up = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    def behave(context: Any) -> Iterator[bytes]:
        yield up.SerializeToString()

    async with proxy(behave) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        assert await stub.Check(health_pb2.HealthCheckRequest()) == up


def test_a_caller_s_metadata_is_passed_on_without_its_connection_s() -> None:
    given = (
        ("authorization", "Bearer k"),
        ("traceparent", "00-1"),
        ("veneer-tenant", "t"),
        ("user-agent", "grpc"),
        ("grpc-timeout", "1S"),
        ("request_id", "serve's"),
        ("application", "veneer"),
    )
    assert passed_on(given) == given[:3]
    assert passed_on(None) == ()


async def test_an_error_without_details_means_that_the_server_is_gone() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:  # nobody listens
        try:
            await channel.unary_unary("/veneer.v1.InferenceService/Generate")(b"")
        except grpc.aio.AioRpcError as error:
            ended = CallEnded.failed(error)
    assert ended.code == grpc.StatusCode.UNAVAILABLE.value[0]
    info = error_details_pb2.ErrorInfo(
        reason="UNAVAILABLE", domain="veneer", metadata={"cause": "replica_lost"}
    )
    assert info.SerializeToString() in dict(ended.trailing)[DETAILS]
    assert lost("it is gone").retry_after_s == 1.0


def test_each_method_is_known_once_and_memory_s_are_the_engines() -> None:
    names = [method.name for method in METHODS]
    assert len(names) == len(set(names)), "the ingress has one method for each name"
    engines = {method.name for method in METHODS if method.by_engine}
    assert engines >= {"Generate", "GenerateStream", "ActivateAdapter", "GetServerInfo"}
    assert not engines & {"UploadAdapter", "ListAdapters", "SetAlias", "WatchAdapters"}
    assert not [m for m in METHODS if m.by_engine and m.client_streaming]
