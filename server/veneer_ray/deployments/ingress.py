"""The ingress: Serve's proxies send it each gRPC call and HTTP request, and it routes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray.serve.handle import DeploymentHandle
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc
from veneer_server.logs import get_logger
from veneer_server.routing.records import Wanted

from veneer_ray.calls import (
    METHODS,
    CallEnded,
    Metadata,
    RayCall,
    RayMethod,
    Started,
    lost,
    passed_on,
)
from veneer_ray.deployments.publication import ANSWERS, PublishRequest
from veneer_ray.deployments.web import Web
from veneer_ray.routing.digests import Digests
from veneer_ray.routing.wanted import of_request
from veneer_ray.settings import RayCluster

_ACTIVATE: Final = "/veneer.v1.AdapterService/ActivateAdapter"
_HEALTH_S: Final = 1.0
_INFERENCE: Final = ("veneer.v1.InferenceService", "veneer.v1.ServerService")
_UP: Final = health_pb2.HealthCheckResponse.SERVING
_DOWN: Final = health_pb2.HealthCheckResponse.NOT_SERVING

_log = get_logger(__name__)


class Raw:
    """A message's bytes with the `SerializeToString` that Serve requires."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:  # noqa: N802 # protobuf's name
        return self._data


class Ingress:
    """Has a method for each of Veneer's RPCs, by its name (see the end of the module), `Check`
    and `Watch` of the health service, and `__call__` for HTTP."""

    def __init__(
        self, settings: str, engines: DeploymentHandle, registry: DeploymentHandle
    ) -> None:
        self._cluster = RayCluster.of_text(settings)
        self._engines = engines.options(stream=True)
        self._digests = Digests(self._look_up)
        self._opened: grpc.aio.Channel | None = None
        self._registry = registry  # its server is called directly
        self._web = Web(self._digests, self.answers)

    async def settings(self) -> str:
        """The cluster's settings as text, for ``veneer-ray scale``."""
        return self._cluster.as_text()

    async def __call__(self, request: Any) -> Any:
        return await self._web.answer(request)

    # ------------------------------------------------------------------ engines

    async def answers(self, method: str, call: Any) -> AsyncIterator[Any]:
        """Yield the answers of the engine chosen for a call; the last is always `CallEnded`."""
        response = getattr(self._engines, method).remote(call)
        items = aiter(response)
        ended = False
        try:
            async with asyncio.timeout(self._cluster.wait_s):
                item = await anext(items)
            while not ended:
                ended = isinstance(item, CallEnded)
                yield item
                if not ended:
                    item = await anext(items)
        except TimeoutError:
            ended = True
            response.cancel()
            yield CallEnded.by(lost("no replica accepted this call in time", "no_replica"))
        except Exception as error:  # Ray's, of many kinds: died, unreachable, full
            ended = True
            _log.warning("a call has lost its replica", why=type(error).__name__)
            yield CallEnded.by(lost("the replica handling this call has stopped"))
        finally:
            if not ended:
                response.cancel()

    async def by_engine(
        self, method: RayMethod, request: Any, context: Any
    ) -> AsyncIterator[bytes | None]:
        """Yield the messages of a call, then None once its status is set in ``context``."""
        metadata = passed_on(context.invocation_metadata())
        wanted = await of_request(request, self._digests, metadata)
        data = request.SerializeToString()
        call = RayCall(wanted, method.path, method.server_streaming, data, metadata)
        replica: Metadata = ()
        async for item in self.answers("call", call):
            match item:
                case Started():
                    replica = (("veneer-replica", item.replica),)
                case CallEnded():
                    _end(context, item, replica)
                    yield None
                case bytes():
                    yield item

    # ------------------------------------------------------------------ registry

    @property
    def registry(self) -> grpc.aio.Channel:
        """Channel to the registry, opened in the loop that uses it."""
        if self._opened is None:
            self._opened = grpc.aio.insecure_channel(
                self._cluster.registry,
                options=(
                    ("grpc.max_receive_message_length", -1),
                    ("grpc.max_reconnect_backoff_ms", 1000),
                ),
            )
        return self._opened

    async def _look_up(self, name: str, caller: Metadata) -> str:
        stub: Any = adapters_pb2_grpc.AdapterServiceStub(self.registry)
        found = await stub.GetAdapter(
            adapters_pb2.GetAdapterRequest(name=name), metadata=caller
        )
        return str(found.adapter.weights_digest)

    async def by_registry(
        self, method: RayMethod, request: Any, context: Any
    ) -> AsyncIterator[bytes | None]:
        """As `by_engine`, but the registry answers."""
        metadata = passed_on(context.invocation_metadata())
        published = PublishRequest(request) if method.name in ANSWERS else None
        made = _begin(
            self.registry, method, published.request if published else request, metadata
        )
        try:
            if method.server_streaming:
                async for message in made:
                    yield message
            else:
                answer = await made
                if published and published.loads:
                    answer = await self._load(ANSWERS[method.name].FromString(answer), metadata)
                yield answer
            _end(context, CallEnded.well(await made.trailing_metadata()), ())
        except grpc.aio.AioRpcError as error:
            _end(context, CallEnded.failed(error), ())
        finally:
            made.cancel()
        yield None

    async def _load(self, published: Any, metadata: Metadata) -> bytes:
        """Load a published adapter on an engine. A failure is only a warning, since the
        publication stands."""
        spec = f"{published.adapter.name}@{published.adapter.revision}"
        request = adapters_pb2.ActivateAdapterRequest(name=spec)
        wanted = await of_request(request, self._digests, metadata)
        call = RayCall(wanted, _ACTIVATE, False, request.SerializeToString(), metadata)
        async for item in self.answers("call", call):
            match item:
                case bytes():
                    loaded = adapters_pb2.ActivateAdapterResponse.FromString(item)
                    published.adapter.CopyFrom(loaded.adapter)
                case CallEnded() if item.code:
                    published.warnings.append(f"published, but not loaded: {item.message}")
        return bytes(published.SerializeToString())

    # ------------------------------------------------------------------ health

    async def Check(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802 # the RPC's name
        """Health of a service: an engine answers for `_INFERENCE`, the registry for the others;
        "" is always up."""
        if request.service == "":
            return health_pb2.HealthCheckResponse(status=_UP)
        if request.service in _INFERENCE:
            status = await self._engine_status(request)
            return health_pb2.HealthCheckResponse(status=status)
        stub: Any = health_pb2_grpc.HealthStub(self.registry)
        try:
            return await stub.Check(request, timeout=_HEALTH_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                _end(grpc_context, CallEnded.failed(error), ())
            return health_pb2.HealthCheckResponse(status=_DOWN)

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Yield changes of `Check`, repeated each second: a watch that stays open at an engine
        would delay its drain."""
        last = None
        while True:
            now = (await self.Check(request, grpc_context)).status
            if now != last:
                last = now
                yield health_pb2.HealthCheckResponse(status=now)
            await asyncio.sleep(_HEALTH_S)

    async def _engine_status(self, request: Any) -> int:
        data = request.SerializeToString()
        call = RayCall(Wanted(), "/grpc.health.v1.Health/Check", False, data, ())
        with suppress(TimeoutError):
            async with asyncio.timeout(_HEALTH_S):
                async for item in self.answers("call", call):
                    if isinstance(item, bytes):
                        return int(health_pb2.HealthCheckResponse.FromString(item).status)
        return int(_DOWN)


def _begin(
    channel: grpc.aio.Channel, method: RayMethod, request: Any, metadata: Metadata
) -> Any:
    kinds: dict[tuple[bool, bool], Callable[..., Any]] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
    }
    kind = kinds[method.client_streaming, method.server_streaming]
    return kind(method.path, request_serializer=_serialized)(request, metadata=metadata)


def _serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _end(context: Any, ended: CallEnded, more: Metadata) -> None:
    """Set a call's status; it reaches the proxy with the next message."""
    if ended.code:
        context.set_code(_CODES[ended.code])
        context.set_details(ended.message)
    context.set_trailing_metadata([*ended.trailing, *more])


_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


def _single(method: RayMethod) -> Callable[..., Any]:
    async def answer(self: Ingress, request: Any, grpc_context: Any) -> Raw:
        """Return the call's last message; empty if the call failed."""
        last = b""
        ask = self.by_engine if method.by_engine else self.by_registry
        async for message in ask(method, request, grpc_context):
            last = last if message is None else message
        return Raw(last)

    return answer


def _streaming(method: RayMethod) -> Callable[..., Any]:
    async def answer(self: Ingress, request: Any, grpc_context: Any) -> AsyncIterator[Raw]:
        """Yield the messages, then an empty one that carries the status (see `servicers`)."""
        ask = self.by_engine if method.by_engine else self.by_registry
        async for message in ask(method, request, grpc_context):
            yield Raw(message or b"")

    return answer


for _method in METHODS:
    _make = _streaming if _method.server_streaming else _single
    _made = _make(_method)
    _made.__name__ = _method.name
    setattr(Ingress, _method.name, _made)
