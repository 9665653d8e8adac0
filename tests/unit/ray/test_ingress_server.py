"""The ingress over real sockets, with engines that die, drain and break off. The servers
behind them are FAKE: they answer as told. No Ray is needed."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from veneer_ray.calls import METHODS
from veneer_ray.digests import Digests
from veneer_ray.ingress_server import IngressServer, PortTaken
from veneer_ray.replicas import EngineReplicas, RunningEngine
from veneer_ray.settings import RayCluster
from veneer_ray.web import Web
from veneer_registry.errors import AdapterNotFound, Draining, EngineFailed, VeneerError
from veneer_server.openai.errors import http_failure
from veneer_server.rpc.status import to_grpc_status
from yarl import URL

from tests.ports import free_port
from tests.server_harness import refusal

Stream = Callable[[Any, Any], AsyncIterator[Any]]


async def words(request: Any, context: Any) -> AsyncIterator[Any]:
    """Answers with two words."""
    context.set_trailing_metadata((("x-engine", "1"),))
    for text in ("One", " day"):
        yield inference_pb2.GenerateStreamResponse(text=text)


def failing(error: VeneerError, after: int = 0) -> Stream:
    """A stream that ends with an error after some messages."""

    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(after):
            yield inference_pb2.GenerateStreamResponse(text="One")
        status = to_grpc_status(error)
        await context.abort(status.code, status.message, status.trailing)

    return answer


@dataclass
class Engine(inference_pb2_grpc.InferenceServiceServicer):
    """FAKE: an engine's server; counts the calls that it gets."""

    stream: Stream = words
    web: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]] | None = None
    calls: int = 0
    grpc: str = ""
    http: str = ""
    server: Any = None

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.calls += 1
        async for message in self.stream(request, context):
            yield message

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.calls += 1
        assert self.web is not None
        return await self.web(request)

    async def start(self, stack: AsyncExitStack) -> None:
        self.server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self.server)
        self.grpc = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()
        stack.push_async_callback(self.server.stop, None)
        runner = web.ServerRunner(web.Server(self.answer))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        stack.push_async_callback(runner.cleanup)
        self.http = "{}:{}".format(*runner.addresses[0])


@dataclass
class Cluster:
    """An ingress with its engines, by name."""

    server: IngressServer
    replicas: EngineReplicas
    engines: dict[str, RunningEngine]
    channel: grpc.aio.Channel
    http: str

    async def said(self) -> tuple[list[str], str]:
        """The words of a stream, and the replica that answered."""
        call = self.stub.GenerateStream(inference_pb2.GenerateRequest())
        texts = [message.text async for message in call]
        return texts, str(dict(await call.trailing_metadata())["veneer-replica"])

    @property
    def stub(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)


@asynccontextmanager
async def cluster(
    tmp_path: Path,
    *engines: Engine,
    wait_s: float = 0.2,
    drain_s: float = 0.1,
    registry: str = "127.0.0.1:1",
) -> AsyncIterator[Cluster]:
    """An ingress before engines ``a``, ``b``, ..., all of which have reported once."""
    async with AsyncExitStack() as stack:
        settings = RayCluster(
            tmp_path,
            registry=registry,
            grpc_port=free_port(),
            http_port=free_port(),
            wait_s=wait_s,
            drain_s=drain_s,
        )
        for engine in engines:
            await engine.start(stack)
        replicas = EngineReplicas(settings.wait_s)
        running = {
            name: RunningEngine(each.grpc, each.http, {"at": 1.0, "healthy": True})
            for name, each in zip("abcd", engines, strict=False)
        }
        replicas.update(running)
        server = IngressServer(settings, replicas)
        await server.start()
        stack.push_async_callback(server.stop)
        address = f"127.0.0.1:{settings.grpc_port}"
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        http = f"http://127.0.0.1:{settings.http_port}"
        yield Cluster(server, replicas, running, channel, http)


async def refused(call: Awaitable[Any]) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


# ------------------------------------------------------------------ dead and draining engines


async def test_a_dead_engine_fails_no_call_and_gets_none_until_it_reports_again(
    tmp_path: Path,
) -> None:
    alive, dead = Engine(), Engine()
    async with cluster(tmp_path, alive, dead) as made:
        await dead.server.stop(None)
        found = [await made.said() for _ in range(12)]
        assert found == [(["One", " day"], "a")] * 12

        again = Engine()
        async with AsyncExitStack() as stack:
            await again.start(stack)
            # The same replica, as Serve tells it, with no news from it: still marked.
            made.replicas.update(made.engines)
            assert {(await made.said())[1] for _ in range(6)} == {"a"}
            made.replicas.update({"c": RunningEngine(again.grpc, again.http, {"at": 2.0})})
            assert (await made.said())[1] == "c"


async def test_a_call_that_a_draining_engine_refuses_goes_to_another(tmp_path: Path) -> None:
    draining = Engine(failing(Draining("the server is stopping")))
    async with cluster(tmp_path, Engine(), draining) as made:
        assert [await made.said() for _ in range(12)] == [(["One", " day"], "a")] * 12
    assert draining.calls <= 1, "it was asked again although it had said that it stops"


async def test_a_stream_that_has_begun_is_not_sent_again(tmp_path: Path) -> None:
    """Neither one whose engine drains too long, nor one whose engine dies."""
    cut_off = Engine(failing(Draining("the server stopped before this was finished"), after=1))
    async with cluster(tmp_path, cut_off) as made:
        found = await refused(made.said())
        assert (found.code, found.reason) == ("UNAVAILABLE", "DRAINING")
    assert cut_off.calls == 1

    async def die(request: Any, context: Any) -> AsyncIterator[Any]:
        yield inference_pb2.GenerateStreamResponse(text="One")
        await asyncio.Event().wait()

    dying, other = Engine(die), Engine(die)
    async with cluster(tmp_path, dying, other) as made:
        call = made.stub.GenerateStream(inference_pb2.GenerateRequest())
        assert (await call.read()).text == "One"
        await (dying if dying.calls else other).server.stop(None)
        found = await refused(call.read())
    assert (found.code, found.metadata["cause"]) == ("UNAVAILABLE", "replica_lost")
    assert found.retry_after_s == 1.0
    assert dying.calls + other.calls == 1


async def test_an_engine_that_has_failed_gets_no_more_calls(tmp_path: Path) -> None:
    """The failed call itself is not repeated: it may be what the engine died of."""
    failed = Engine(failing(EngineFailed("the engine has ended")))
    async with cluster(tmp_path, Engine(), failed) as made:
        ends = []
        for _ in range(12):
            try:
                ends.append((await made.said())[1])
            except grpc.aio.AioRpcError as error:
                ends.append(refusal(error).reason)
    assert failed.calls == ends.count("ENGINE_FAILED") == 1, ends


async def test_without_engines_a_call_waits_for_one_and_then_says_so(tmp_path: Path) -> None:
    engine = Engine()
    async with cluster(tmp_path, engine, wait_s=20.0) as made:
        made.replicas.update({})
        waiting = asyncio.ensure_future(made.said())
        health = health_pb2_grpc.HealthStub(made.channel)
        request = health_pb2.HealthCheckRequest(service="veneer.v1.InferenceService")
        answer = await health.Check(request)  # type: ignore[misc]
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not waiting.done()
        made.replicas.update(made.engines)
        assert (await waiting)[1] == "a"
    async with cluster(tmp_path) as made:
        found = await refused(made.said())
        assert (found.code, found.metadata["cause"]) == ("UNAVAILABLE", "no_replica")


async def test_a_health_watch_does_not_delay_the_ingress_s_end(tmp_path: Path) -> None:
    async with cluster(tmp_path, Engine(), drain_s=3600.0) as made:
        health: Any = health_pb2_grpc.HealthStub(made.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await made.server.stop()
        found = await refused(watch.read())
    assert (found.code, found.reason) == ("UNAVAILABLE", "DRAINING")


# ------------------------------------------------------------------ what passes unchanged


async def test_a_server_s_error_and_trailing_metadata_reach_the_caller(tmp_path: Path) -> None:
    missing = AdapterNotFound("no adapter is called x", metadata={"adapter": "x"})
    async with cluster(tmp_path, Engine(failing(missing, after=1))) as made:
        call = made.stub.GenerateStream(inference_pb2.GenerateRequest())
        assert (await call.read()).text == "One"
        found = await refused(call.read())
        assert (found.code, found.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
        assert found.metadata["adapter"] == "x"
        assert ("veneer-replica", "a") in tuple(await call.trailing_metadata())
    async with cluster(tmp_path, Engine()) as made:
        call = made.stub.GenerateStream(inference_pb2.GenerateRequest())
        assert [message.text async for message in call] == ["One", " day"]
        assert ("x-engine", "1") in tuple(await call.trailing_metadata())


async def test_an_engine_learns_of_its_caller_s_deadline_metadata_and_cancel(
    tmp_path: Path,
) -> None:
    seen: asyncio.Queue[Any] = asyncio.Queue()

    async def endless(request: Any, context: Any) -> AsyncIterator[Any]:
        seen.put_nowait((context.time_remaining(), dict(context.invocation_metadata())))
        yield inference_pb2.GenerateStreamResponse(text="One")
        try:
            await asyncio.Event().wait()
        finally:
            seen.put_nowait("cancelled")

    async with cluster(tmp_path, Engine(endless)) as made:
        call = made.stub.GenerateStream(
            inference_pb2.GenerateRequest(), timeout=500, metadata=(("authorization", "k"),)
        )
        await call.read()
        remaining, metadata = await seen.get()
        assert 0 < remaining < 510
        assert metadata["authorization"] == "k"
        call.cancel()
        assert await seen.get() == "cancelled"


async def test_the_registry_answers_what_is_not_an_engine_s(tmp_path: Path) -> None:
    class Registry(adapters_pb2_grpc.AdapterServiceServicer):
        """FAKE: lists one adapter."""

        async def ListAdapters(self, request: Any, context: Any) -> Any:  # noqa: N802
            return adapters_pb2.ListAdaptersResponse(
                adapters=[adapters_pb2.Adapter(name="chat")]
            )

    server = grpc.aio.server()
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(Registry(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with cluster(tmp_path, registry=f"127.0.0.1:{port}") as made:
        stub: Any = adapters_pb2_grpc.AdapterServiceStub(made.channel)
        listed = await stub.ListAdapters(adapters_pb2.ListAdaptersRequest())
        assert [each.name for each in listed.adapters] == ["chat"]
        await server.stop(None)
        found = await refused(stub.ListAdapters(adapters_pb2.ListAdaptersRequest()))
        assert (found.code, found.metadata["cause"]) == ("UNAVAILABLE", "replica_lost")


def test_each_method_is_known_once_and_memory_s_are_the_engines() -> None:
    names = [method.name for method in METHODS]
    assert len(names) == len(set(names))
    engines = {method.name for method in METHODS if method.by_engine}
    assert engines >= {"Generate", "GenerateStream", "ActivateAdapter", "GetServerInfo"}
    assert not engines & {"UploadAdapter", "ListAdapters", "SetAlias", "WatchAdapters"}
    assert not [m for m in METHODS if m.by_engine and m.client_streaming]


# ------------------------------------------------------------------ HTTP


async def echo(request: web.BaseRequest) -> web.StreamResponse:
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "target": request.raw_path,
            "body": body.decode(),
            "key": request.headers.get("authorization"),
        },
        status=201,
        headers={"x-request-id": "7"},
    )


async def stopping(request: web.BaseRequest) -> web.StreamResponse:
    failure = http_failure(Draining("the server is stopping"))
    return web.json_response(dict(failure.body), status=failure.status)


async def broken(request: web.BaseRequest) -> web.StreamResponse:
    """Breaks off within a stream."""
    response = web.StreamResponse()
    response.enable_chunked_encoding()
    await response.prepare(request)
    await response.write(b"data: One\n\n")
    assert request.transport is not None
    request.transport.close()
    return response


async def test_http_passes_both_ways_unchanged(tmp_path: Path) -> None:
    async with (
        cluster(tmp_path, Engine(web=echo)) as made,
        aiohttp.ClientSession() as session,
        session.post(
            URL(f"{made.http}/v1/completions?a=%2F", encoded=True),
            data=b"{}",
            headers={"authorization": "k"},
        ) as answer,
    ):
        assert (answer.status, answer.headers["x-request-id"]) == (201, "7")
        assert await answer.json() == {
            "method": "POST",
            "target": "/v1/completions?a=%2F",
            "body": "{}",
            "key": "k",
        }


@pytest.mark.parametrize("how", ["dead", "draining"])
async def test_an_http_request_that_has_not_begun_goes_to_another_engine(
    tmp_path: Path, how: str
) -> None:
    other = Engine(web=stopping)
    async with cluster(tmp_path, Engine(web=echo), other) as made:
        if how == "dead":
            # A port that nobody listens on.
            gone = RunningEngine(other.grpc, "127.0.0.1:1", {"at": 2.0})
            made.replicas.update({"a": made.engines["a"], "c": gone})
        async with aiohttp.ClientSession() as session:
            for _ in range(12):
                async with session.post(f"{made.http}/v1/completions", data=b"{}") as answer:
                    assert answer.status == 201, await answer.text()
    assert other.calls <= 1


async def test_an_http_answer_that_breaks_off_does_not_look_complete(tmp_path: Path) -> None:
    engine = Engine(web=broken)
    async with cluster(tmp_path, engine) as made, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientPayloadError):
            async with session.post(f"{made.http}/v1/completions", data=b"{}") as answer:
                await answer.read()
    assert engine.calls == 1


async def test_http_without_engines_and_with_too_much(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, aiohttp.ClientSession() as session:
        async with session.post(f"{made.http}/v1/completions", data=b"{}") as answer:
            assert (answer.status, answer.headers["x-should-retry"]) == (503, "true")
            assert (await answer.json())["error"]["code"] == "unavailable"
        much = BytesIO(bytes(33 << 20))
        async with session.post(f"{made.http}/v1/files", data=much) as answer:
            assert answer.status == 413


async def test_a_caller_that_waits_for_leave_to_send_gets_it(tmp_path: Path) -> None:
    async with cluster(tmp_path, Engine(web=echo)) as made:
        host, port = made.http.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n"
        )
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"{}")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 201 " in head
        writer.close()
        assert json.loads(await reader.readexactly(_length(head)))["body"] == "{}"


def _length(head: bytes) -> int:
    lines = head.decode().lower().splitlines()
    return int(next(each for each in lines if each.startswith("content-length")).split()[1])


# ------------------------------------------------------------------ ports


async def test_a_port_of_another_program_is_refused_with_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer_ray.ingress_server._PORT_S", 0.0)
    # With SO_REUSEPORT, as Serve's proxies have it: the system would share the port.
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag, ports in (
            ("--grpc-port", {"grpc_port": port, "http_port": free_port()}),
            ("--http-port", {"grpc_port": free_port(), "http_port": port}),
        ):
            settings = RayCluster(tmp_path, drain_s=0.1, **ports)
            server = IngressServer(settings, EngineReplicas(0.1))
            with pytest.raises(PortTaken, match=f"{port} .* choose another with {flag}"):
                await server.start()
            await server.stop()


async def test_ingresses_of_one_cluster_share_its_ports_and_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path / "one", Engine()) as made:
        settings = made.server._cluster  # private: the ports
        second = IngressServer(settings, EngineReplicas(0.1))
        await second.start()
        await second.stop()
        assert (await made.said())[1] == "a"
        monkeypatch.setattr("veneer_ray.ingress_server._PORT_S", 0.0)
        other = RayCluster(
            tmp_path / "two",
            grpc_port=settings.grpc_port,
            http_port=settings.http_port,
            drain_s=0.1,
        )
        third = IngressServer(other, EngineReplicas(0.1))
        with pytest.raises(PortTaken):
            await third.start()
        await third.stop()


@pytest.mark.parametrize("host", ["127.0.0.2", "0.0.0.0", "localhost"])
async def test_its_http_port_answers_at_the_address_that_was_given(host: str) -> None:
    port = free_port()
    made = Web(Digests(nobody), EngineReplicas(0.1), 0.1)
    await made.start(host, port)
    assert await made.not_ready() == ""
    await made.stop()
    assert f"port {port} does not answer" in await made.not_ready()


async def nobody(name: str, caller: Any) -> str:
    raise ConnectionError


async def test_it_is_ready_once_an_engine_answers_behind_both_ports(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        assert await made.server.not_ready() == "no engine is ready"
    settings = RayCluster(tmp_path, grpc_port=free_port(), http_port=free_port(), drain_s=0.1)
    server = IngressServer(settings, EngineReplicas(0.1))
    assert f"port {settings.grpc_port} does not answer" in await server.not_ready()
    await server.stop()
