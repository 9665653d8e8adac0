"""The endpoint picker, asked in Envoy's ext_proc protocol over a socket.

Engines are fake: HTTP ports with a metrics page that the test writes. `test_gateway.py` has
real pages and a real Envoy.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_registry.errors import Unavailable
from veneer_server.picker import ext_proc_pb2 as pb
from veneer_server.picker.pool import Pool, Source
from veneer_server.picker.service import DESTINATION, SERVICE, Picker

from tests.unit.server.rpc.front_harness import until

BASE = "base"


class FakeEngine:
    """FAKE: a metrics page as of ``--metrics-names vllm``, and nothing else."""

    def __init__(self) -> None:
        self.requests = 0
        self.ready = True
        self.adapters: list[str] = []
        self.keys: list[str] = []
        self._server: asyncio.Server | None = None
        self.address = ""

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=tls)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    def page(self) -> str:
        labels = f'{{model_name="{BASE}",engine="0"}}'
        return "".join(
            (
                f"veneer_ready {float(self.ready)}\n",
                f"vllm:num_requests_running{labels} {self.requests}\n",
                f"vllm:num_requests_waiting{labels} 0.0\n",
                'vllm:lora_requests_info{max_lora="8",waiting_lora_adapters="",'
                f'running_lora_adapters="{",".join(self.adapters)}"}} 1.7e+09\n',
            )
        )

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        self.keys += [line for line in head.splitlines() if line.startswith("authorization")]
        body = self.page().encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()


class Gateway:
    """Calls the picker as Envoy does in full-duplex mode: a stream for each HTTP request."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._process: Any = channel.stream_stream(
            f"/{SERVICE}/Process",
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )

    @asynccontextmanager
    async def stream(self, *messages: Any) -> AsyncIterator[Any]:
        call = self._process()
        try:
            for message in messages:
                await call.write(message)
            yield call
        finally:
            call.cancel()

    @asynccontextmanager
    async def request(
        self, body: bytes, *, subset: Any = None, piece: int = 7
    ) -> AsyncIterator[str]:
        """A request that runs inside the block; its replica. The body passes unchanged."""
        pieces = [body[at : at + piece] for at in range(0, len(body), piece)] or [b""]
        async with self.stream(headers(subset), *bodies(pieces)) as call:
            first = await call.read()
            if first.HasField("immediate_response"):
                yield str(first.immediate_response.status.code)
                return
            passed = b""
            while True:
                sent = (await call.read()).request_body.response.body_mutation
                passed += sent.streamed_response.body
                if sent.streamed_response.end_of_stream:
                    break
            assert passed == body
            yield destination(first)

    async def ask(self, model: str, **more: Any) -> str:
        """The replica of a short request."""
        async with self.request(json.dumps({"model": model}).encode(), **more) as replica:
            return replica


def headers(subset: Any = None, *, modes: int = pb.FULL_DUPLEX_STREAMED) -> Any:
    made = pb.ProcessingRequest(
        request_headers=pb.HttpHeaders(),
        protocol_config=pb.ProtocolConfiguration(
            request_body_mode=modes,  # type: ignore[arg-type]
            response_body_mode=pb.FULL_DUPLEX_STREAMED,
        ),
    )
    if subset is not None:
        hint = made.metadata_context.filter_metadata["envoy.lb.subset_hint"]
        hint.update({"x-gateway-destination-endpoint-subset": subset})
    return made


def bodies(pieces: Iterable[bytes]) -> list[Any]:
    made = [pb.ProcessingRequest(request_body=pb.HttpBody(body=each)) for each in pieces]
    made[-1].request_body.end_of_stream = True
    return made


def destination(answer: Any) -> str:
    """The chosen replica: the same in header and metadata, in place of the caller's own."""
    (option,) = answer.request_headers.response.header_mutation.set_headers
    assert option.header.key == DESTINATION
    assert option.append_action == pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    value = option.header.raw_value.decode()
    assert answer.dynamic_metadata["envoy.lb"][DESTINATION] == value
    return str(value)


class Fleet:
    """Fake engines, the picker's view of them, and a gateway that asks it."""

    def __init__(self, engines: list[FakeEngine], pool: Pool, gateway: Gateway) -> None:
        self.engines, self.pool, self.gateway = engines, pool, gateway

    def at(self, address: str) -> FakeEngine:
        (found,) = [each for each in self.engines if each.address == address]
        return found


@asynccontextmanager
async def running(count: int, **source: Any) -> AsyncIterator[Fleet]:
    engines = [FakeEngine() for _ in range(count)]
    for each in engines:
        await each.start()
    pool = Pool(Source(tuple(each.address for each in engines), **source))
    await pool.look()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Picker(pool).handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Fleet(engines, pool, Gateway(channel))
    await server.stop(None)
    for each in engines:
        await each.stop()


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with running(4) as found:
        yield found


async def test_an_adapter_s_requests_go_where_it_is(fleet: Fleet) -> None:
    homes = {}
    for name in map(str, range(12)):
        asked = [await fleet.gateway.ask(name) for _ in range(3)]
        assert len(set(asked)) == 1, "one load is enough"
        homes[name] = asked[0]
    assert len(set(homes.values())) > 1, "adapters are spread"
    # Another picker decides the same, since it knows the same replicas.
    async with running(0) as other:
        other.pool._source = fleet.pool._source
        await other.pool.look()
        again = {name: await other.gateway.ask(name) for name in homes}
    agreed = [name for name in homes if homes[name] in other.pool._router.homes(name, 2)]
    assert agreed == list(homes), "its two homes"
    assert len(set(again.values())) > 1


async def test_a_replica_that_is_busy_gets_no_more(fleet: Fleet) -> None:
    home = await fleet.gateway.ask("chat")
    fleet.at(home).adapters = ["chat"]
    await fleet.pool.look()
    assert await fleet.gateway.ask("chat") == home
    fleet.at(home).requests = 50  # of other gateways
    await fleet.pool.look()
    elsewhere = {await fleet.gateway.ask("chat") for _ in range(4)}
    assert home not in elsewhere
    # Among replicas with as much to do, one that has the adapter is better than one without.
    for each in fleet.engines:
        each.requests, each.adapters = 0, []
    (holder,) = [e for e in fleet.engines if e.address in elsewhere][:1]
    holder.adapters = ["chat"]
    await fleet.pool.look()
    assert await fleet.gateway.ask("chat") == holder.address


async def test_requests_under_way_count_until_their_streams_end(fleet: Fleet) -> None:
    def load() -> float:
        return float(fleet.pool._router.fleet.load.sum())

    async with fleet.gateway.request(b'{"model": "base"}'):
        assert load() == 1
    await until(lambda: load() == 0)


async def test_a_replica_that_is_gone_or_drains_gets_none(fleet: Fleet) -> None:
    home = await fleet.gateway.ask("chat")
    await fleet.at(home).stop()
    await fleet.pool.look()
    second = await fleet.gateway.ask("chat")
    assert second != home
    fleet.at(second).ready = False
    await fleet.pool.look()
    third = await fleet.gateway.ask("chat")
    assert third not in (home, second)
    fleet.at(second).ready = True
    await fleet.pool.look()
    assert await fleet.gateway.ask("chat") == second, "its home again"
    for each in fleet.engines:
        each.ready = False
    await fleet.pool.look()
    assert await fleet.gateway.ask("chat") == "503"
    await fleet.at(home).start()  # so that it can be stopped


async def test_a_name_s_addresses_are_followed(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a headless Service, whose addresses come and go."""
    port = fleet.engines[0].address.rpartition(":")[2]
    there: list[str] | None = ["127.0.0.1", "127.0.0.2"]

    async def resolve(host: str, asked: str, **_: Any) -> list[Any]:
        if there is None:
            raise OSError("the name server is away")
        return [(2, 1, 6, "", (each, int(asked))) for each in there]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    pool = Pool(Source((f"engines.llm.svc:{port}",)))
    await pool.look()
    assert pool.choose("", "", 1.0).replica == f"127.0.0.1:{port}", "the other is not up"
    there = None
    await pool.look()
    assert pool.choose("", "", 1.0).replica == f"127.0.0.1:{port}"
    there = []
    await pool.look()
    with pytest.raises(Unavailable):
        pool.choose("", "", 1.0)


async def test_a_gateway_s_subset_is_kept_to(fleet: Fleet) -> None:
    home = await fleet.gateway.ask("chat")
    others = [each.address for each in fleet.engines if each.address != home]
    assert await fleet.gateway.ask("chat", subset=others) in others
    assert await fleet.gateway.ask("chat", subset=f"{others[0]}, {others[1]}") in others[:2]
    everyone = [each.address for each in fleet.engines]
    assert await fleet.gateway.ask("chat", subset=everyone) == home
    assert await fleet.gateway.ask("chat", subset=[]) == "503"
    assert await fleet.gateway.ask("chat", subset=["10.9.9.9:8000"]) == "503"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"[" * 100_000,
        b'{"model": 7, "max_tokens": "many", "user": ["a"]}',
        b'{"model": "\\ud800", "max_tokens": -1}',
        b"\x00\x00\x00\x00\x05grpc!",
    ],
)
async def test_any_body_gets_a_replica(fleet: Fleet, body: bytes) -> None:
    async with fleet.gateway.request(body, piece=4096) as replica:
        assert replica in [each.address for each in fleet.engines]


async def test_a_body_that_is_too_long_passes_unread(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer_server.picker.service._LONGEST", 100)
    async with fleet.gateway.request(b'{"model": "chat", "prompt": "%s"}' % (b"a" * 999)) as at:
        assert at in [each.address for each in fleet.engines]


async def test_what_comes_after_the_choice_passes_unchanged(fleet: Fleet) -> None:
    after = [
        pb.ProcessingRequest(request_trailers=pb.HttpTrailers()),
        pb.ProcessingRequest(response_headers=pb.HttpHeaders()),
        pb.ProcessingRequest(response_body=pb.HttpBody(body=b"data: 1\n\n")),
        pb.ProcessingRequest(response_body=pb.HttpBody(body=b"", end_of_stream=True)),
    ]
    body = pb.ProcessingRequest(request_body=pb.HttpBody(body=b'{"model": "chat"}'))
    async with fleet.gateway.stream(headers(), body, *after) as call:
        answers = [await call.read() for _ in range(6)]
    kinds = [each.WhichOneof("response") for each in answers]
    assert kinds == [
        "request_headers",
        "request_body",
        "request_trailers",
        "response_headers",
        "response_body",
        "response_body",
    ]
    assert not answers[1].request_body.response.body_mutation.streamed_response.end_of_stream
    passed = [a.response_body.response.body_mutation.streamed_response for a in answers[4:]]
    assert [(p.body, p.end_of_stream) for p in passed] == [(b"data: 1\n\n", False), (b"", True)]


async def test_a_request_without_a_body_is_answered_at_once(fleet: Fleet) -> None:
    alone = headers()
    alone.request_headers.end_of_stream = True
    async with fleet.gateway.stream(alone) as call:
        assert destination(await call.read())


async def test_a_gateway_that_sends_no_body_is_told_what_to_set(fleet: Fleet) -> None:
    async with fleet.gateway.stream(headers(modes=pb.BUFFERED)) as call:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "set request_body_mode of ext_proc to FULL_DUPLEX_STREAMED" in str(
        refused.value.details()
    )


async def test_a_key_is_read_again_for_each_page(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("first\n")
    async with running(1, key_file=file) as fleet:
        file.write_text("second\n")
        await fleet.pool.look()
        assert fleet.engines[0].keys == [
            "authorization: bearer first",
            "authorization: bearer second",
        ]
