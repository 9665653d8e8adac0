"""The doors of the cluster: one gRPC port and one HTTP port, from which calls go to the engines
and to the registry. Does not import Ray.

The ports are the ingress's own and not those of Serve's proxies. So they do not depend on how
another team has started Serve, and a token passes one process of ours instead of two actors.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc
from veneer_registry.errors import Draining, VeneerError
from veneer_server.routing.records import Wanted
from veneer_server.rpc.status import GrpcStatus, to_grpc_status

from veneer_ray.calls import (
    METHODS,
    NOT_BEGUN,
    UNFIT,
    Metadata,
    RayMethod,
    pairs,
    passed_back,
    passed_on,
    reason_of,
)
from veneer_ray.digests import Digests
from veneer_ray.publication import ANSWERS, PublishRequest
from veneer_ray.replicas import EngineChoice, EngineReplicas
from veneer_ray.settings import RayCluster
from veneer_ray.wanted import of_request
from veneer_ray.web import Web

_HEALTH: Final = "grpc.health.v1.Health"
_HEALTH_S: Final = 1.0
_INFERENCE: Final = ("veneer.v1.InferenceService", "veneer.v1.ServerService")
_UP: Final = health_pb2.HealthCheckResponse.SERVING
_DOWN: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_MOST_MESSAGE: Final = 4 << 20
"""As at the servers."""
_PORT_S: Final = 5.0
"""How long a port may be kept by an ingress that is being replaced."""


class PortTaken(RuntimeError):
    """A port belongs to another program."""


class IngressServer:
    """The doors and what is behind them. Belongs to one event loop.

    Args:
        replicas: the engines.
    """

    def __init__(self, cluster: RayCluster, replicas: EngineReplicas) -> None:
        self._cluster = cluster
        self._replicas = replicas
        self._registry = grpc.aio.insecure_channel(
            cluster.registry,
            options=(
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ),
        )
        digests = Digests(self._look_up)
        self._digests = digests
        self._web = Web(digests, replicas, cluster.drain_s)
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", _MOST_MESSAGE),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            )
        )
        self._server.add_generic_rpc_handlers(self._handlers())
        self._claims: list[int] = []
        self._stopping = False
        self._watches: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Listen on both ports.

        Raises:
            PortTaken: another program has one of them; the error names the flag.
        """
        cluster = self._cluster
        await self._claim("", cluster.grpc_port, "--grpc-port")
        await self._claim(cluster.http_host, cluster.http_port, "--http-port")
        self._server.add_insecure_port(f"[::]:{cluster.grpc_port}")
        await self._server.start()
        await self._web.start(cluster.http_host, cluster.http_port)

    async def stop(self) -> None:
        """Accept nothing more; end watches, and let other calls finish within ``drain_s``."""
        self._stopping = True
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(self._server.stop(self._cluster.drain_s), self._web.stop())
        for claim in self._claims:
            os.close(claim)
        self._claims.clear()
        await self._registry.close()
        await self._replicas.close()

    async def not_ready(self) -> str:
        """Why the ports or the engines behind them do not answer; "" if they do."""
        cluster = self._cluster
        async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.grpc_port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=_INFERENCE[0])
            try:
                answer = await stub.Check(request, timeout=2 * _HEALTH_S)
            except grpc.aio.AioRpcError as error:
                return f"port {cluster.grpc_port} does not answer: {error.code().name}"
            if answer.status != _UP:
                return "no engine is ready"
        return await self._web.not_ready()

    async def _claim(self, host: str, port: int, flag: str) -> None:
        """Make sure that nobody but ingresses of this cluster listens on a port. They share it
        (SO_REUSEPORT), as any other program of this user could, hence the lock: each holds it
        shared, and who can have it alone is the only ingress here."""
        self._cluster.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._cluster.data_dir / f"ingress-{port}.lock"
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._claims.append(lock)
        until = asyncio.get_running_loop().time() + _PORT_S
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if is_free(host, port):
                return
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(lock, fcntl.LOCK_SH)
                return  # another ingress of ours listens
            # Perhaps the ingress that this one replaces, whose connections close just now.
            if asyncio.get_running_loop().time() > until:
                raise PortTaken(
                    f"port {port} of {socket.gethostname()} is taken by another program: "
                    f"choose another with {flag}, or stop that program"
                )
            await asyncio.sleep(0.2)

    @asynccontextmanager
    async def _watching(self, context: Any) -> AsyncIterator[None]:
        """A call that has no end of its own: it ends when the ingress stops."""
        task = asyncio.current_task()
        assert task is not None, "calls run in tasks"
        self._watches.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            error = Draining("the ingress is stopping: watch again", retry_after_s=1.0)
            await _abort(context, to_grpc_status(error))
        finally:
            self._watches.discard(task)

    # ------------------------------------------------------------------ methods

    def _handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        services: dict[str, dict[str, Any]] = {}
        for method in METHODS:
            made: Any = {
                (False, False): grpc.unary_unary_rpc_method_handler,
                (False, True): grpc.unary_stream_rpc_method_handler,
                (True, False): grpc.stream_unary_rpc_method_handler,
            }[method.client_streaming, method.server_streaming](
                self._answerer(method), request_deserializer=method.request.FromString
            )
            services.setdefault(method.service, {})[method.name] = made
        request: Any = health_pb2.HealthCheckRequest
        services[_HEALTH] = {
            "Check": grpc.unary_unary_rpc_method_handler(
                self._check, request.FromString, _serialized
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                self._watch, request.FromString, _serialized
            ),
        }
        return tuple(
            grpc.method_handlers_generic_handler(service, methods)
            for service, methods in services.items()
        )

    def _answerer(self, method: RayMethod) -> Callable[..., Any]:
        ask = self._by_engine if method.by_engine else self._by_registry

        async def answer(request: Any, context: Any) -> bytes | None:
            try:
                return await ask(method, request, context)
            except VeneerError as error:
                status = to_grpc_status(error)
            except grpc.aio.AioRpcError as error:
                status = passed_back(error)
            await _abort(context, status)
            return None

        return answer

    async def _by_engine(self, method: RayMethod, request: Any, context: Any) -> bytes | None:
        """Answer from the engine chosen for the call. A call that has not begun there goes to
        another one."""
        metadata = passed_on(context.invocation_metadata())
        wanted = await of_request(request, self._digests, metadata)
        data = request.SerializeToString()
        while True:
            async with self._replicas.chosen(wanted) as engine:
                replica = ("veneer-replica", engine.replica)
                context.set_trailing_metadata((replica,))
                call = _begin(engine.channel, method, data, metadata, context)
                answer = _Answer(call, context, (replica,))
                try:
                    return await answer.pass_back()
                except grpc.aio.AioRpcError as error:
                    if not self._may_retry(engine, error) or answer.begun:
                        raise

    def _may_retry(self, engine: EngineChoice, error: grpc.aio.AioRpcError) -> bool:
        """Whether a failed call has not begun; marks the engine if it cannot answer others."""
        reason = reason_of(error)
        gone = error.code() is grpc.StatusCode.UNAVAILABLE and not reason
        if gone or reason in UNFIT:
            self._replicas.failed(engine.replica)
        return reason in NOT_BEGUN

    async def _by_registry(self, method: RayMethod, request: Any, context: Any) -> bytes | None:
        metadata = passed_on(context.invocation_metadata())
        published = PublishRequest(request) if method.name in ANSWERS else None
        sent = published.request if published else request
        call = _begin(self._registry, method, sent, metadata, context)
        if method.name == "WatchAdapters":
            async with self._watching(context):
                return await _Answer(call, context).pass_back()
        answer = await _Answer(call, context).pass_back()
        if published and published.loads and answer is not None:
            return await self._load(ANSWERS[method.name].FromString(answer), metadata)
        return answer

    async def _look_up(self, name: str, caller: Metadata) -> str:
        stub: Any = adapters_pb2_grpc.AdapterServiceStub(self._registry)
        found = await stub.GetAdapter(
            adapters_pb2.GetAdapterRequest(name=name), metadata=caller
        )
        return str(found.adapter.weights_digest)

    async def _load(self, published: Any, metadata: Metadata) -> bytes:
        """Load a published adapter on an engine. A failure is only a warning, since the
        publication stands."""
        spec = f"{published.adapter.name}@{published.adapter.revision}"
        request = adapters_pb2.ActivateAdapterRequest(name=spec)
        wanted = await of_request(request, self._digests, metadata)
        failure = ""
        try:
            async with self._replicas.chosen(wanted) as engine:
                stub: Any = adapters_pb2_grpc.AdapterServiceStub(engine.channel)
                loaded = await stub.ActivateAdapter(request, metadata=metadata)
                published.adapter.CopyFrom(loaded.adapter)
        except VeneerError as error:
            failure = error.message
        except grpc.aio.AioRpcError as error:
            failure = passed_back(error).message
        if failure:
            published.warnings.append(f"published, but not loaded: {failure}")
        return bytes(published.SerializeToString())

    # ------------------------------------------------------------------ health

    async def _check(self, request: Any, context: Any) -> Any:
        """Health of a service: an engine answers for `_INFERENCE`, the registry for the others;
        "" is always up."""
        try:
            return await self._status(request)
        except grpc.aio.AioRpcError as error:
            await _abort(context, passed_back(error))

    async def _watch(self, request: Any, context: Any) -> None:
        """Send changes of `_check`, repeated each second: a watch that stays open at an engine
        would delay its drain."""
        last = None
        async with self._watching(context):
            while True:
                try:
                    now = await self._status(request)
                except grpc.aio.AioRpcError:  # an unknown service, which may come
                    now = health_pb2.HealthCheckResponse(
                        status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                    )
                if now != last:
                    last = now
                    await context.write(now)
                await asyncio.sleep(_HEALTH_S)

    async def _status(self, request: Any) -> Any:
        """Raises AioRpcError if no server knows the service."""
        if request.service == "":
            return health_pb2.HealthCheckResponse(status=_UP)
        down = health_pb2.HealthCheckResponse(status=_DOWN)
        with suppress(TimeoutError, VeneerError):
            async with asyncio.timeout(_HEALTH_S):
                if request.service in _INFERENCE:
                    async with self._replicas.chosen(Wanted()) as engine:
                        return await _health(engine.channel, request) or down
                return await _health(self._registry, request) or down
        return down


async def _health(channel: grpc.aio.Channel, request: Any) -> Any:
    """A server's answer; None if it does not answer."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        return await stub.Check(request, timeout=_HEALTH_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            raise
        return None


def _begin(
    channel: grpc.aio.Channel, method: RayMethod, request: Any, metadata: Metadata, context: Any
) -> Any:
    """Begin a call at a server, with the rest of the caller's deadline."""
    kinds: dict[tuple[bool, bool], Callable[..., Any]] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
    }
    kind = kinds[method.client_streaming, method.server_streaming]
    made = kind(method.path, request_serializer=_serialized)
    return made(request, metadata=metadata, timeout=context.time_remaining())


class _Answer:
    """A server's answer on its way to the caller.

    Args:
        more: trailing metadata in addition to the server's.

    Attributes:
        begun: whether the caller has got a message.
    """

    def __init__(self, call: Any, context: Any, more: Metadata = ()) -> None:
        self._call = call
        self._context = context
        self._more = more
        self.begun = False

    async def pass_back(self) -> bytes | None:
        """Pass messages and trailing metadata to the caller; return the message of a call that
        has a single one. Raises AioRpcError if the call has failed."""
        call, context = self._call, self._context
        answer: bytes | None = None
        try:
            if isinstance(call, grpc.aio.UnaryStreamCall):
                async for message in call:
                    self.begun = True
                    await context.write(message)
            else:
                answer = await call
            context.set_trailing_metadata((*pairs(await call.trailing_metadata()), *self._more))
            return answer
        finally:
            call.cancel()


async def _abort(context: Any, status: GrpcStatus) -> None:
    kept = tuple(context.trailing_metadata() or ())
    await context.abort(status.code, status.message, (*status.trailing, *kept))


def _serialized(message: Any) -> bytes:
    return message if isinstance(message, bytes) else bytes(message.SerializeToString())


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens on a port of this machine; ``host`` "" is all interfaces."""
    kinds = [socket.AF_INET, socket.AF_INET6] if not host else [_kind(host)]
    for kind in kinds:
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return False  # of any other error, the server itself tells
    return True


def _kind(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
