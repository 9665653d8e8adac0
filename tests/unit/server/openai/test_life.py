"""Start, drain and stop of the gateway; readers that stop reading; a missing extra."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import re
import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from veneer_registry.errors import InternalError
from veneer_server.app import App
from veneer_server.config import ConfigInvalid, load_config
from veneer_server.doors import CannotListen
from veneer_server.openai import GatewayMissing, require_gateway
from veneer_server.openai.http.asgi import ABORT, ReaderStopped, Reply
from veneer_server.wire.messages import SequenceOutput

from tests.ports import free_port
from tests.refused import refused
from tests.unit.server.rpc.front_harness import running, until

LISTEN = "127.0.0.1:0"
TEXT = {"model": "smollm2-135m", "prompt": "Hello there", "max_tokens": 4}


def client(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=30)


async def test_while_it_loads_it_says_so(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    async with (
        running(
            base_folder, front_cache, tmp_path, loading=True, openai_listen=address
        ) as front,
        client(address) as http,
    ):
        assert (await http.get("/health")).status_code == 503
        assert (await http.get("/version")).status_code == 200
        for answer in (
            await http.post("/v1/completions", json=TEXT),
            await http.get("/v1/models"),
        ):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "model_loading"
            assert answer.headers["retry-after"] == "1"
        front.engine.load_gate.set()
        await front.ready.wait()
        assert (await http.get("/health")).status_code == 200
        assert (await http.post("/v1/completions", json=TEXT)).status_code == 200


async def test_a_drain_refuses_new_requests_and_lets_running_ones_finish(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(base_folder, front_cache, tmp_path, openai_listen=LISTEN) as front:
        address = front.addresses["openai"]
        front.engine.pace = asyncio.Semaphore(1)
        async with client(address) as http, client(address) as other:
            # Its connection is kept for the requests below.
            assert (await http.get("/health")).status_code == 200
            stream = asyncio.create_task(
                other.post("/v1/completions", json={**TEXT, "stream": True})
            )
            await until(lambda: front.engine.in_flight == 1)
            front.app.stop()
            await until(lambda: front.app.phase.value == "draining")
            late = await http.get("/health")
            assert (late.status_code, late.json()) == (503, {"status": "draining"})
            refused = await http.post("/v1/completions", json=TEXT)
            assert refused.json()["error"]["code"] == "draining"
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*address.rsplit(":", 1))
            for _ in range(4):
                front.engine.pace.release()
            assert (await stream).text.endswith("data: [DONE]\n\n")


async def test_the_grace_ends_a_stream_with_an_error_event(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(
        base_folder, front_cache, tmp_path, openai_listen=LISTEN, grace="0"
    ) as front:
        front.engine.pace = asyncio.Semaphore(1)
        async with client(front.addresses["openai"]) as http:
            lines: list[str] = []
            request = http.stream("POST", "/v1/completions", json={**TEXT, "stream": True})
            async with request as answer:
                async for line in answer.aiter_lines():
                    if not lines:
                        front.app.stop()
                    lines.append(line)
            last = [line for line in lines if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"


@pytest.mark.push
async def test_a_reader_that_stops_is_bounded_and_loses_its_place(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(
        base_folder, front_cache, tmp_path, openai_listen=LISTEN, reader_limit="0.2"
    ) as front:
        front.engine.script = [SequenceOutput(1, [1000] * 10_000) for _ in range(1000)]
        host, port = front.addresses["openai"].rsplit(":", 1)
        taken = 0
        process = psutil.Process()
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            reader.connect((host, int(port)))
            body = json.dumps({**TEXT, "stream": True}).encode()
            reader.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
                b"content-type: application/json\r\n"
                + f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            await until(lambda: front.engine.in_flight == 1)
            await until(lambda: front.engine.cancelled == 1)
            assert front.engine.in_flight == 0
            # Dropped, not left to end when the reader likes.
            mine = reader.getsockname()
            await until(lambda: mine not in {c.raddr for c in process.net_connections("tcp")})
            reader.setblocking(False)
            loop = asyncio.get_running_loop()
            with contextlib.suppress(ConnectionResetError):
                while piece := await loop.sock_recv(reader, 1 << 20):
                    taken += len(piece)
        # What the two kernels held; all of it would be 40 MB.
        assert 0 < taken < 2 << 20


async def test_a_send_that_blocks_drops_the_connection_and_no_more_is_sent() -> None:
    dropped: list[bool] = []
    sent: list[str] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    scope = {"state": {ABORT: lambda: dropped.append(True)}}
    reply = Reply(scope, send, 0.01)
    with refused(ReaderStopped) as stopped:
        await reply.events([{}], {})
    assert dropped == [True]
    await reply.fail(stopped.value)
    assert sent == ["http.response.start", "http.response.body"]
    with pytest.raises(ReaderStopped):
        await reply.fail(InternalError("x"))


async def test_an_error_after_half_a_document_drops_the_connection() -> None:
    dropped: list[bool] = []
    sent: list[str] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        if sent:
            raise asyncio.CancelledError
        sent.append(message["type"])

    reply = Reply({"state": {ABORT: lambda: dropped.append(True)}}, send, 1.0)
    with pytest.raises(asyncio.CancelledError):
        await reply.json(200, {}, {})
    await reply.fail(InternalError("x"))
    assert sent == ["http.response.start"]
    assert dropped == [True]


async def test_a_body_that_never_comes_whole(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(
        base_folder, front_cache, tmp_path, openai_listen=LISTEN, reader_limit="0.1"
    ) as front:
        host, port = front.addresses["openai"].rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        )
        answer = (await reader.read()).decode()
        assert answer.startswith("HTTP/1.1 408")
        assert "request_timeout" in answer
        writer.close()


@pytest.mark.push
async def test_connections_that_never_ask_for_anything_are_dropped(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(
        base_folder, front_cache, tmp_path, openai_listen=LISTEN, reader_limit="0.2"
    ) as front:
        host, port = front.addresses["openai"].rsplit(":", 1)
        whole = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"
        for first in (b"", whole[:10], whole + whole[:10]):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(first)
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 200") == (whole in first)
            writer.close()
        async with client(front.addresses["openai"]) as http:
            # One that asks stays.
            front.engine.pace = asyncio.Semaphore(0)
            slow = asyncio.create_task(http.post("/v1/completions", json=TEXT))
            await until(lambda: front.engine.in_flight == 1)
            for first in (b"", b""):
                reader, writer = await asyncio.open_connection(host, int(port))
                assert await reader.read() == first
                writer.close()
            for _ in range(4):
                front.engine.pace.release()
            assert (await slow).status_code == 200


@pytest.mark.push
@pytest.mark.parametrize(
    ("line", "status"),
    [("POST /nope", 404), ("GET /version", 200)],
)
async def test_a_body_that_nobody_reads_does_not_keep_its_connection(
    base_folder: Path, front_cache: Path, tmp_path: Path, line: str, status: int
) -> None:
    """It is answered at once, and what comes of its body winds no clock up again."""
    async with running(
        base_folder, front_cache, tmp_path, openai_listen=LISTEN, reader_limit="0.2"
    ) as front:
        host, port = front.addresses["openai"].rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"{line} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status}".encode())

        async def drip() -> None:
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        dripping.cancel()
        writer.close()


async def test_a_client_that_sends_ahead_is_answered_in_turn_or_seen_to_leave(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    body = json.dumps(TEXT).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\n"
        + f"content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    async with running(base_folder, front_cache, tmp_path, openai_listen=LISTEN) as front:
        host, port = front.addresses["openai"].rsplit(":", 1)
        for leaves in (False, True):
            front.engine.reset()
            front.engine.pace = asyncio.Semaphore(0)
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request)
            await until(lambda: front.engine.in_flight == 1)
            writer.write(request[:20])
            if leaves:
                writer.close()
                await until(lambda: front.engine.cancelled == 1)
                continue
            writer.write(request[20:])
            for _ in range(8):
                front.engine.pace.release()
            for _ in range(2):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200")
                [length] = re.findall(rb"content-length: (\d+)", head)
                assert json.loads(await reader.readexactly(int(length)))["choices"]
            writer.close()


async def test_bodies_are_bounded_together(
    base_folder: Path, front_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many connections send large ones, memory has an end, and short ones room."""
    monkeypatch.setattr("veneer_server.openai.gateway.MAX_LONG_BODIES", 1 << 20)
    long = {**TEXT, "prompt": "word " * 1000, "user": "x" * 300_000}
    async with (
        running(base_folder, front_cache, tmp_path, openai_listen=LISTEN) as front,
        client(front.addresses["openai"]) as http,
    ):
        host, port = front.addresses["openai"].rsplit(":", 1)
        writers = []
        for _ in range(4):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
                b"content-type: application/json\r\ncontent-length: 400000\r\n\r\n"
            )
            writer.write(b" " * (300 << 10))
            writers.append(writer)
        while (late := await http.post("/v1/completions", json=long)).status_code == 400:
            pass  # what they sent is still on its way, and this one too long for the context
        assert late.status_code == 429
        assert late.json()["error"]["code"] == "queue_full"
        assert (late.headers["retry-after"], late.headers["x-should-retry"]) == ("1", "true")
        assert (await http.post("/v1/completions", json=TEXT)).status_code == 200
        assert front.engine.in_flight == 0
        writers.pop().close()
        while (await http.post("/v1/completions", json=long)).status_code == 429:
            pass  # until the server has seen it leave
        for writer in writers:
            writer.close()


async def test_short_bodies_are_bounded_together(
    base_folder: Path, front_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer_server.openai.gateway.MAX_BODIES", 10)
    async with (
        running(base_folder, front_cache, tmp_path, openai_listen=LISTEN) as front,
        client(front.addresses["openai"]) as http,
    ):
        assert (await http.post("/v1/completions", json=TEXT)).status_code == 429


async def test_an_address_that_is_taken(base_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with refused(CannotListen, flag="--openai-listen", address=address):
            async with running(base_folder, tmp_path, tmp_path / "d", openai_listen=address):
                pass


async def test_without_the_extra_the_flag_fails_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "veneer_server.openai.find_spec",
        lambda name: None if name == "fastapi" else real(name),
    )
    with refused(GatewayMissing, missing="fastapi"):
        require_gateway()
    config = load_config(
        {
            "base": "/there/is/none",
            "data_dir": str(tmp_path / "data"),
            "openai_listen": "127.0.0.1:0",
        },
        {},
    )
    with pytest.raises(GatewayMissing):
        await App(config, print).run()
    assert not (tmp_path / "data").exists(), "before any work"


def test_an_open_address_needs_insecure_as_for_grpc() -> None:
    given = {"openai_listen": "0.0.0.0:8000"}
    with refused(ConfigInvalid, key="openai_listen", needs="insecure"):
        load_config(given, {})
    assert load_config({**given, "insecure": True}, {}).openai_listen == ("0.0.0.0", 8000)
    assert load_config({}, {}).openai_listen is None
