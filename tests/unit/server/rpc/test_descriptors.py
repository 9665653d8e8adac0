"""File descriptors: whatever connects, some are reserved for the server itself."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily
from veneer_server.config import Address
from veneer_server.system import descriptors
from veneer_server.system.descriptors import (
    RESERVE,
    SCRAPES,
    UNREAD,
    UNREAD_SCRAPES,
    raise_limit,
    share_descriptors,
)
from veneer_server.system.hosts import AllowedHosts
from veneer_server.telemetry.pages import MAX_PARTIAL, Pages
from veneer_server.telemetry.scrape import MAX_HEAD, ScrapeServer

from tests.unit.server.rpc.front_harness import prompt, running, until

GET = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
HOSTS = AllowedHosts(Address("127.0.0.1", 0), ())


@pytest.fixture
def soft_limit() -> Iterator[int]:
    """A low soft limit; as before at the end."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
    yield 300
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_is_raised_to_what_is_needed(soft_limit: int) -> None:
    assert raise_limit(200) == soft_limit, "it is never lowered"
    assert raise_limit(400) == 400
    shared = share_descriptors(wanted=64, ports=2)
    assert shared.connections == 64
    assert shared.limit >= 2 * 64 + RESERVE + SCRAPES


def test_where_the_limit_cannot_be_raised_callers_get_fewer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(descriptors, "raise_limit", lambda wanted: 1024)
    shared = share_descriptors(wanted=4000, ports=2)
    assert 2 * shared.connections + RESERVE + SCRAPES + UNREAD_SCRAPES <= 1024
    assert shared.connections > 200


def test_tenants_get_what_the_connections_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a low limit costs a server without tenants nothing."""
    assert share_descriptors(wanted=64, ports=2, tenants=8).tenants == 8
    for limit in (300, 1024, 1500):
        monkeypatch.setattr(descriptors, "raise_limit", lambda wanted, limit=limit: limit)
        few = share_descriptors(wanted=300, ports=2, tenants=64)
        assert few.connections == share_descriptors(wanted=300, ports=2).connections
        assert few.tenants >= 1
        kept = 2 * few.connections + RESERVE + SCRAPES + (few.tenants - 1) * descriptors.TENANT
        assert few.tenants == 1 or kept <= limit


# ----------------------------------------------------------------------------- scrapes


@pytest.fixture
async def scrapes() -> AsyncIterator[tuple[ScrapeServer, Address]]:
    registry = CollectorRegistry()
    Counter("asked", "Questions.", registry=registry).inc(3)
    server = ScrapeServer(Pages(registry), HOSTS, connections=3, limit_s=30)
    address = await server.start(Address("127.0.0.1", 0))
    yield server, address
    await server.stop()


async def ask(address: Address, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(request)
        return await reader.read()
    finally:
        writer.close()


async def test_a_scrape_is_answered_as_before(
    scrapes: tuple[ScrapeServer, Address],
) -> None:
    _, address = scrapes
    async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as http:
        plain = await http.get("/metrics")
        assert plain.status_code == 200
        assert plain.headers["content-type"].startswith("text/plain; version=")
        assert "asked_total 3.0" in plain.text
        assert plain.headers["content-encoding"] == "gzip"
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        assert (await http.get("/metrics", headers=accept)).text.endswith("# EOF\n")
        assert "asked" not in (await http.get("/metrics?name[]=other")).text
        assert (await http.head("/metrics")).text == ""
        assert (await http.post("/metrics")).status_code == 405


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * MAX_HEAD + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * MAX_HEAD, b"431"),
    ],
)
async def test_what_is_no_scrape_is_refused(
    scrapes: tuple[ScrapeServer, Address], request_: bytes, status: bytes
) -> None:
    assert (await ask(scrapes[1], request_)).split(b" ")[1] == status
    assert b"asked_total" in await ask(scrapes[1], GET)


async def test_idle_connections_make_room_for_one_that_asks(
    scrapes: tuple[ScrapeServer, Address],
) -> None:
    server, address = scrapes
    idle = [await asyncio.open_connection(*address) for _ in range(20)]
    await until(lambda: server.connections == 3)
    assert b"asked_total" in await ask(address, GET)
    assert server.connections <= 3
    for _, writer in idle:
        writer.close()


async def test_one_that_asks_before_many_others_connect_is_answered() -> None:
    """Its request has arrived, and the event loop has not read it, when all others connect."""
    registry = CollectorRegistry()
    Counter("asked", "Questions.", registry=registry).inc(3)
    server = ScrapeServer(Pages(registry), HOSTS, limit_s=30)
    address = await server.start(Address("127.0.0.1", 0))
    with ExitStack() as stack:
        asks, *idle = (stack.enter_context(socket.socket()) for _ in range(SCRAPES + 1))
        asks.connect(address)
        asks.sendall(GET)
        for each in idle:
            each.setblocking(False)
            each.connect_ex(address)
        reader, writer = await asyncio.open_connection(sock=asks)
        assert b"asked_total" in await reader.read()
        writer.close()
        await until(lambda: server.connections <= SCRAPES)
    await server.stop()


async def test_scrapes_that_wait_together_share_a_page_made_after_they_came() -> None:
    registry = CollectorRegistry()
    made: list[int] = []

    class Slow:
        """FAKE: a page that takes as long as the test likes."""

        def collect(self) -> list[Any]:
            made.append(len(made))
            if len(made) == 1:
                free.wait(30)
            return [CounterMetricFamily("made", "Pages.", value=len(made))]

        def describe(self) -> list[Any]:
            return []

    free = threading.Event()
    registry.register(Slow())
    server = ScrapeServer(Pages(registry), HOSTS, connections=40, limit_s=30)
    address = await server.start(Address("127.0.0.1", 0))
    first = asyncio.create_task(ask(address, GET))
    await until(lambda: made == [0])
    later = [asyncio.create_task(ask(address, GET)) for _ in range(30)]
    await until(lambda: sum(each.asked for each in server.open) == 31)
    free.set()
    assert b"made_total 1.0" in await first
    for page in await asyncio.gather(*later):
        assert b"made_total 2.0" in page
    assert made == [0, 1]
    await server.stop()


class Held:
    """FAKE: pages that are not made before the test lets them."""

    def __init__(self) -> None:
        self.free, self.made = threading.Event(), 0

    def collect(self) -> list[Any]:
        self.made += 1
        self.free.wait(30)
        return [CounterMetricFamily("made", "Pages.", value=self.made)]

    def describe(self) -> list[Any]:
        return [CounterMetricFamily("made", "Pages.")]


@asynccontextmanager
async def held_scrapes() -> AsyncIterator[tuple[Held, ScrapeServer, Address]]:
    """A page is being made."""
    registry, held = CollectorRegistry(), Held()
    registry.register(held)
    server = ScrapeServer(Pages(registry), HOSTS, connections=40, limit_s=30)
    address = await server.start(Address("127.0.0.1", 0))
    first = asyncio.create_task(ask(address, GET))
    await until(lambda: held.made == 1)
    yield held, server, address
    held.free.set()
    await first
    await server.stop()


def get(target: str, accept: str = "*/*") -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n\r\n".encode()


async def test_scrapes_of_other_words_share_a_page() -> None:
    """8,000 connections with a query of their own queued as many pages, and Prometheus got
    none."""
    async with held_scrapes() as (held, server, address):
        pages = [asyncio.create_task(ask(address, get(f"/metrics?x={n}"))) for n in range(15)]
        versions = [f"application/openmetrics-text;version=1.0.{n}" for n in range(1, 16)]
        pages += [asyncio.create_task(ask(address, get("/", accept))) for accept in versions]
        await until(lambda: sum(each.asked for each in server.open) == 31)
        held.free.set()
        for page in await asyncio.gather(*pages):
            assert b"made_total 2.0" in page
        assert held.made == 2


async def test_pages_that_nobody_waits_for_are_not_made() -> None:
    async with held_scrapes() as (held, server, address):
        for n in range(5):
            _, writer = await asyncio.open_connection(*address)
            writer.write(get(f"/metrics?name[]=made_total&name[]={n}"))
            await until(lambda: sum(each.asked for each in server.open) == 2)
            writer.close()
            await until(lambda: server.connections == 1)
        held.free.set()
        assert b"made_total 2.0" in await ask(address, GET)


async def test_a_flood_of_partial_pages_leaves_room_for_the_whole_one() -> None:
    async with held_scrapes() as (held, server, address):
        targets = [f"/metrics?name[]=made_total&name[]={n}" for n in range(MAX_PARTIAL + 5)]
        pages = [asyncio.create_task(ask(address, get(target))) for target in targets]
        refused = []
        for page in asyncio.as_completed(pages):
            refused.append(await page)
            if len(refused) == 5:
                break
        assert all(page.startswith(b"HTTP/1.1 503 ") for page in refused)
        assert all(b"Retry-After" in page for page in refused)
        whole = asyncio.create_task(ask(address, GET))
        await until(lambda: sum(each.asked for each in server.open) == MAX_PARTIAL + 2)
        held.free.set()
        assert b"made_total" in await whole
        served = [page for page in await asyncio.gather(*pages) if b"made_total" in page]
        assert len(served) == MAX_PARTIAL


async def test_scrapers_that_wait_make_room_for_the_newest() -> None:
    """Prometheus was refused while others waited for a page at every connection."""
    registry = CollectorRegistry()
    free, began = threading.Event(), threading.Event()

    class Slow:
        """FAKE: a page that takes as long as the test likes."""

        def collect(self) -> list[Any]:
            began.set()
            free.wait(30)
            return [CounterMetricFamily("made", "Pages.", value=1)]

        def describe(self) -> list[Any]:
            return []

    registry.register(Slow())
    server = ScrapeServer(Pages(registry), HOSTS, connections=3, limit_s=30)
    address = await server.start(Address("127.0.0.1", 0))
    waiting = []
    for count in range(1, 4):
        waiting.append(asyncio.create_task(ask(address, GET)))
        await until(lambda count=count: sum(e.asked for e in server.open) == count)  # type: ignore[misc]
    await until(began.is_set)
    newest = asyncio.create_task(ask(address, GET))
    with suppress(ConnectionError):
        assert await waiting[0] == b""
    free.set()
    for page in await asyncio.gather(*waiting[1:], newest):
        assert b"made_total 1.0" in page
    await server.stop()


async def test_scrapers_that_do_not_read_make_room_for_one_that_does() -> None:
    registry = CollectorRegistry()
    series = Counter("asked", "Questions.", ["text"], registry=registry)
    for n in range(6000):  # 6 MB, more than a connection's buffers take
        series.labels(f"{n:01000d}").inc()
    server = ScrapeServer(Pages(registry), HOSTS, connections=3, limit_s=30)
    address = await server.start(Address("127.0.0.1", 0))
    with ExitStack() as stack:
        for _ in range(3):
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(tuple(address))
            slow.send(GET)
        await until(lambda: [each.answered for each in server.open] == [True] * 3)
        assert (await ask(address, GET)).count(b"asked_total{") == 6000
    await server.stop()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"Host: 127.0.0.1:9095", b"200"),
        (b"Host: LOCALHOST", b"200"),
        (b"Host: rebound.example", b"403"),
        (b"Host: rebound.example\r\nHost: localhost", b"400"),
        (b"Accept: */*", b"200"),
    ],
)
async def test_a_page_of_another_name_cannot_read_the_metrics(
    host: bytes, status: bytes, scrapes: tuple[ScrapeServer, Address]
) -> None:
    """A browser sends the page's name, which it may have let resolve to 127.0.0.1."""
    _, address = scrapes
    answer = await ask(address, b"GET /metrics HTTP/1.1\r\n" + host + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status)


async def test_a_connection_is_closed_in_time() -> None:
    server = ScrapeServer(CollectorRegistry(), HOSTS, limit_s=0.05)
    address = await server.start(Address("127.0.0.1", 0))
    for first in (b"", b"GET /"):
        assert await ask(address, first) == b""
    await server.stop()


# ---------------------------------------------------------------------- whole process


def connect(stack: ExitStack, address: str, count: int) -> None:
    host, port = address.rsplit(":", 1)
    for _ in range(count):
        connection = stack.enter_context(socket.socket())
        connection.setblocking(False)
        connection.connect_ex((host, int(port)))


async def test_idle_connections_to_all_ports_leave_descriptors_to_the_server(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    flags = {"openai_listen": "127.0.0.1:0", "max_connections": "40"}
    async with running(base_folder, front_cache, tmp_path, **flags) as front:
        process = psutil.Process()
        before = process.num_fds()
        with ExitStack() as stack:
            for port in ("grpc", "openai", "metrics"):
                connect(stack, front.addresses[port], 100)
                # Answered though all places are taken.
                if port != "grpc":
                    async with httpx.AsyncClient(trust_env=False) as http:
                        path = "version" if port == "openai" else "metrics"
                        answer = await http.get(f"http://{front.addresses[port]}/{path}")
                        assert answer.status_code == 200
            assert (await front.inference.Generate(prompt())).token_ids, "it was there before"
            taken = process.num_fds() - before - 300  # ours are the process's, too
            # Half of `UNREAD` more: HTTP connections that were refused and may still send.
            assert taken <= 2 * 40 + UNREAD + UNREAD // 2 + SCRAPES + 8
        await until(lambda: process.num_fds() < before + 40)


async def test_an_http_connection_too_many_is_told_so(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    flags = {"openai_listen": "127.0.0.1:0", "max_connections": "8"}
    async with running(base_folder, front_cache, tmp_path, **flags) as front:
        front.engine.pace = asyncio.Semaphore(0)
        base = f"http://{front.addresses['openai']}"
        body = {"model": "smollm2-135m", "prompt": "Hello there", "max_tokens": 4}
        limits = httpx.Limits(max_connections=8)
        async with httpx.AsyncClient(base_url=base, trust_env=False, limits=limits) as http:
            tasks = [
                asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(8)
            ]
            await until(lambda: front.engine.in_flight == 8)
            async with httpx.AsyncClient(base_url=base, trust_env=False) as late:
                refused = await late.get("/version")
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert "--max-connections" in refused.json()["error"]["message"]
            for _ in range(32):
                front.engine.pace.release()
            assert {(await task).status_code for task in tasks} == {200}
