"""Whoever opens more connections than there may be keeps nobody else out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.unit.server.access.tenants_kit import shared
from tests.unit.server.openai.kit import TEXT
from tests.unit.server.rpc.front_harness import Front, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOST = 16
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SENT: dict[str, bytes] = {
    "nothing": b"",
    "half a head": POST,
    "half a body": POST + b"Content-Length: 100\r\n\r\n{",
    "half a chunked body": POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    "half a body after a whole request": GET + POST + b"Content-Length: 100\r\n\r\n{",
    "half a body with a wrong key": POST
    + b"Authorization: Bearer vn_a_b\r\nContent-Length: 100\r\n\r\n{",
    "half a body where none is wanted": GET[:-2] + b"Content-Length: 100\r\n\r\n{",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fronts(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, tuple[Front, str]]]:
    """A front without keys and one with, each with a caller's key."""
    most = {"max_connections": str(MOST), "openai_listen": "127.0.0.1:0"}
    async with contextlib.AsyncExitStack() as stack:
        folder = tmp_path_factory.mktemp("connections")
        open_ = await stack.enter_async_context(
            running(base_folder, front_cache, folder / "a", **most)
        )
        asks = await stack.enter_async_context(
            shared(base_folder, front_cache, folder / "b", **most)
        )
        key = asks.caller("team-a", "inference").key
        yield {"without keys": (open_, ""), "with keys": (asks.front, key)}


async def flood(
    stack: contextlib.AsyncExitStack, front: Front, data: bytes, count: int = 3 * MOST
) -> None:
    """Open many connections from several addresses; each sends ``data`` and no more."""
    host, port = front.addresses["openai"].rsplit(":", 1)
    for n in range(count):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(
                host, int(port), local_addr=(f"127.0.0.{1 + n % 5}", 0)
            )
            stack.callback(writer.close)
            writer.write(data)


@pytest.mark.push
@pytest.mark.parametrize("asks", ["without keys", "with keys"])
@pytest.mark.parametrize("sent", SENT)
async def test_half_requests_take_no_place_of_others(
    fronts: dict[str, tuple[Front, str]], asks: str, sent: str
) -> None:
    """A caller keeps its connection, and new ones get in."""
    front, key = fronts[asks]
    headers = {"authorization": f"Bearer {key}"} if key else {}
    head = b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())
    body = json.dumps(TEXT).encode()
    whole = POST + head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    host, port = front.addresses["openai"].rsplit(":", 1)
    async with contextlib.AsyncExitStack() as stack:
        reader, writer = await asyncio.open_connection(host, int(port))
        stack.callback(writer.close)

        async def asked() -> None:
            """On the connection that was there first."""
            writer.write(whole)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200"), answer
            [length] = [
                int(line.split(b":")[1])
                for line in answer.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            ]
            await reader.readexactly(length)

        await asked()
        for _ in range(3):
            await flood(stack, front, SENT[sent])
            await asked()
            for _ in range(5):
                async with httpx.AsyncClient(trust_env=False, timeout=60) as new:
                    url = f"http://{front.addresses['openai']}/v1/completions"
                    answer = await new.post(url, json=TEXT, headers=headers)
                    assert answer.status_code == 200, answer.text


@pytest.mark.push
async def test_another_tenant_takes_no_place_either(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """It has a valid key, and holds more connections than there may be."""
    flags = {"max_connections": str(MOST)}
    async with shared(base_folder, front_cache, tmp_path, **flags) as asks:
        victim, other = (asks.caller(name, "inference").key for name in ("team-a", "team-b"))
        url = f"http://{asks.front.addresses['openai']}/v1/completions"
        mine = {"authorization": f"Bearer {victim}"}
        half = POST + f"Authorization: Bearer {other}\r\n".encode()
        half += b"Content-Length: 100\r\n\r\n{"
        opened: list[str] = []

        async def trace(event: str, info: object) -> None:
            if event == "connection.connect_tcp.started":
                opened.append(event)

        async with (
            httpx.AsyncClient(trust_env=False, timeout=60) as http,
            contextlib.AsyncExitStack() as stack,
        ):
            for _ in range(4):
                answer = await http.post(
                    url, json=TEXT, headers=mine, extensions={"trace": trace}
                )
                assert answer.status_code == 200
                await flood(stack, asks.front, half)
        assert len(opened) == 1, "its connection was dropped"


async def test_a_pool_of_another_tenant_takes_no_place_either(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """It has asked on all connections at once, and keeps them."""
    flags = {"max_connections": str(MOST)}
    async with shared(base_folder, front_cache, tmp_path, **flags) as asks:
        mine, other = (
            {"authorization": f"Bearer {asks.caller(name, 'inference').key}"}
            for name in ("team-a", "team-b")
        )
        engine = asks.front.engine
        url = f"http://{asks.front.addresses['openai']}/v1/completions"
        async with httpx.AsyncClient(trust_env=False, timeout=60) as pool:
            for _ in range(2):
                engine.pace = asyncio.Semaphore(0)
                calls = [
                    asyncio.create_task(pool.post(url, json=TEXT, headers=other))
                    for _ in range(MOST)
                ]
                while engine.in_flight < MOST:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
                for _ in range(64 * MOST):
                    engine.pace.release()
                for answer in await asyncio.gather(*calls):
                    assert answer.status_code == 200, answer.text
                for _ in range(5):
                    async with httpx.AsyncClient(trust_env=False, timeout=60) as new:
                        answer = await new.post(url, json=TEXT, headers=mine)
                        assert answer.status_code == 200, answer.text


@pytest.mark.push
async def test_where_all_are_answered_a_new_one_is_told_so(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    flags = {"max_connections": "8", "openai_listen": "127.0.0.1:0"}
    async with running(base_folder, front_cache, tmp_path, **flags) as front:
        front.engine.pace = asyncio.Semaphore(0)
        url = f"http://{front.addresses['openai']}/v1/completions"
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            calls = [asyncio.create_task(http.post(url, json=TEXT)) for _ in range(8)]
            while front.engine.in_flight < 8:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            host, port = front.addresses["openai"].rsplit(":", 1)
            reader, writer = await asyncio.open_connection(host, int(port))
            assert (await reader.read()).startswith(b"HTTP/1.1 429")
            writer.close()
            for _ in range(8):
                long = {**TEXT, "user": "u" * (1 << 20)}
                async with httpx.AsyncClient(trust_env=False, timeout=60) as new:
                    refused = await new.post(url, json=long)
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"
            for _ in range(64):
                front.engine.pace.release()
            for answer in await asyncio.gather(*calls):
                assert answer.status_code == 200
