"""Row 18: thousands of connections, pings, resets and messages that are too large, while
healthy clients are served.

A real server on a tiny Llama gets, one after the other: idle connections to every port; a flood
of HTTP/2 pings; calls that are reset as they begin; messages over the limit, over gRPC and
HTTP. Throughout, two clients request tokens: one keeps its connection, the other opens a
connection for each call. None of their calls may fail, or take longer than its deadline.

A server that closes no idle connection, and one that stops for a message that is too large,
must fail this bar.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import numpy as np
import psutil
from veneer_proto.v1 import inference_pb2, inference_pb2_grpc
from veneer_server.system.descriptors import raise_limit

from tests.attacks.http2 import Connection
from tests.places import cache_dir
from tests.server_harness import Server, running_server
from tests.tiny_llama import make_tiny_llama
from tests.torture.row import Control, Outcome, Scale
from tests.torture.tenants import edited_server

ROW = 18
TITLE = "connections"
DEADLINE_S: Final = 10.0
BAR = f"a healthy client is served throughout: no call fails or takes {DEADLINE_S:g} s"
GENERATE: Final = "/veneer.v1.InferenceService/Generate"
TOO_LARGE: Final = 5 << 20
PINGS_AT_ONCE: Final = 1000
RESETS_AT_ONCE: Final = 100
SENDERS: Final = 8
"""Number of concurrent senders of large messages."""

KEEPS_IDLE: Final = (
    "from veneer_server.rpc.transport.connections import Connections\n"
    "Connections._make_room = lambda *given: None"
)
STOPS: Final = (
    "import time\n"
    "from veneer_server.openai.http import asgi\n"
    "class Slow(asgi.HttpError):\n"
    "    def __init__(self, status, *given):\n"
    "        if status == 413:\n"
    f"            time.sleep({DEADLINE_S + 2})\n"
    "        super().__init__(status, *given)\n"
    "asgi.HttpError = Slow"
)


@dataclass(frozen=True)
class Counts:
    """How many of each to send."""

    idle: int
    pings: int
    resets: int
    messages: int


@dataclass
class Found:
    """Results of the two clients."""

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(scale: Scale) -> Outcome:
    """Run all parts on one server."""
    counts = scale.pick(Counts(400, 5_000, 1_000, 10), Counts(2_000, 100_000, 10_000, 400))
    found = asyncio.run(_measure(scale.folder("served"), counts, scale.seed))
    return Outcome(
        figure=(
            f"{counts.idle:,} idle connections to each port, {counts.pings:,} pings, "
            f"{counts.resets:,} resets, {counts.messages:,} messages of 5 MiB to each door: "
            f"{len(found.seconds):,} healthy calls, median "
            f"{np.median(found.seconds) * 1e3:.0f} ms, longest {max(found.seconds):.2f} s"
        ),
        bar=BAR,
        failures=tuple(found.failures),
        notes=tuple(found.notes),
    )


def controls(scale: Scale) -> Iterator[Control]:
    """Plant a server that closes no idle connection, and one that stops for a large message."""
    for number, (planted, edit, counts) in enumerate(
        (
            ("no idle connection is closed", KEEPS_IDLE, Counts(400, 0, 0, 0)),
            ("all wait while a large message is refused", STOPS, Counts(0, 0, 0, 1)),
        )
    ):
        folder = scale.folder(f"planted {number}")
        with edited_server(edit, folder / "bin"):
            found = asyncio.run(_measure(folder, counts, scale.seed))
        yield Control(planted, found.failures[0] if found.failures else "")


async def _measure(folder: Path, counts: Counts, seed: int) -> Found:
    found = Found()
    base = make_tiny_llama(folder / "base", seed=seed)
    most = max(64, counts.idle // 2)
    raise_limit(4 * counts.idle + 512)
    flags = ("--base", str(base), "--max-connections", str(most))
    async with running_server(folder / "data", cache_dir(), *flags) as server:
        front = psutil.Process(server.process.pid)
        for what, part in (
            ("idle connections", lambda: _idle(server, counts.idle)),
            ("pings", lambda: _pings(server, counts.pings)),
            ("resets", lambda: _resets(server, counts.resets)),
            ("large gRPC messages", lambda: _large_grpc(server, counts.messages)),
            ("large HTTP bodies", lambda: _large_http(server, counts.messages)),
        ):
            before = len(found.seconds)
            await _beside(server, what, part, found)
            took = found.seconds[before:]
            found.notes.append(
                f"{what}: {len(took)} healthy calls, longest "
                f"{max(took, default=0) * 1e3:.0f} ms; the front has "
                f"{front.memory_info().rss >> 20} MiB, {front.num_fds()} files"
            )
        if await server.stop() != 0:
            found.failures.append("the server did not end with status 0")
    return found


async def _beside(
    server: Server, what: str, part: Callable[[], Awaitable[None]], found: Found
) -> None:
    """Run one part, with both clients beside it."""
    done, clock = asyncio.Event(), asyncio.get_running_loop().time

    async def ask(
        connections: Callable[[], contextlib.AbstractAsyncContextManager[Any]],
    ) -> None:
        while True:
            began = clock()
            try:
                async with connections() as inference:
                    await _generate(inference)
                found.seconds.append(clock() - began)
            except grpc.aio.AioRpcError as error:
                found.failures.append(f"{what}: {error.code().name}: {error.details()}")
                return
            if done.is_set():
                return
            await asyncio.sleep(0.01)

    @contextlib.asynccontextmanager
    async def kept() -> AsyncIterator[Any]:
        yield server.inference

    clients = [asyncio.create_task(ask(kept)), asyncio.create_task(ask(lambda: _new(server)))]
    try:
        await part()
    except (AssertionError, OSError, httpx.HTTPError, grpc.aio.AioRpcError) as error:
        found.failures.append(f"{what}: {type(error).__name__}: {error}")
    finally:
        done.set()
        for ended in await asyncio.gather(*clients, return_exceptions=True):
            if isinstance(ended, BaseException):
                found.failures.append(f"{what}: {ended!r}")


@contextlib.asynccontextmanager
async def _new(server: Server) -> AsyncIterator[Any]:
    """Yield a stub with its own connection."""
    own = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(server.address, options=own) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


async def _generate(inference: Any) -> None:
    await inference.Generate(_request(), timeout=DEADLINE_S, wait_for_ready=True)


def _request() -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]),
        stopping=inference_pb2.StoppingOptions(max_tokens=4, ignore_eos=True),
    )


async def _idle(server: Server, count: int) -> None:
    """Open connections that never call, to every port, and check that HTTP still answers."""
    if not count:
        return
    async with contextlib.AsyncExitStack() as stack:
        for address in (server.metrics, server.openai):
            host, port = address.rsplit(":", 1)
            for _ in range(count):
                with contextlib.suppress(OSError):  # the server may refuse them
                    _, writer = await asyncio.open_connection(host, int(port))
                    stack.callback(writer.transport.abort)
        for _ in range(count):
            with contextlib.suppress(OSError):
                stack.callback((await Connection.open(server.address)).close)
        async with httpx.AsyncClient(trust_env=False, timeout=DEADLINE_S) as http:
            for url in (f"http://{server.metrics}/metrics", f"http://{server.openai}/health"):
                (await http.get(url)).raise_for_status()
        for _ in range(3):
            async with _new(server) as inference:
                await _generate(inference)


async def _pings(server: Server, count: int) -> None:
    """Send pings. gRPC may close a connection that pings too often; then open another one."""
    sent = 0
    while sent < count:
        async with await Connection.open(server.address) as connection:
            while sent < count and not connection.lost.is_set():
                connection.ping(PINGS_AT_ONCE)
                sent += PINGS_AT_ONCE
                await asyncio.sleep(0.005)


async def _resets(server: Server, count: int) -> None:
    sent = 0
    while sent < count:
        async with await Connection.open(server.address) as connection:
            while sent < count and not connection.lost.is_set():
                for _ in range(RESETS_AT_ONCE):
                    connection.reset(connection.call(GENERATE))
                sent += RESETS_AT_ONCE
                await asyncio.sleep(0.005)


async def _large_grpc(server: Server, count: int) -> None:
    text = "x" * TOO_LARGE
    own = (("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))

    async def send(share: int) -> None:
        async with grpc.aio.insecure_channel(server.address, options=own) as channel:
            inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            for _ in range(share):
                try:
                    await inference.Generate(inference_pb2.GenerateRequest(prompt=text))
                except grpc.aio.AioRpcError as error:
                    wanted = (
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        grpc.StatusCode.INVALID_ARGUMENT,
                    )
                    if error.code() not in wanted:
                        raise

    await _shared(send, count)


async def _large_http(server: Server, count: int) -> None:
    url = f"http://{server.openai}/v1/completions"
    body = b'{"prompt": "' + b"x" * TOO_LARGE + b'"}'
    headers = {"content-type": "application/json"}

    async def send(share: int) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=4 * DEADLINE_S) as http:
            for _ in range(share):
                answer = await http.post(url, content=body, headers=headers)
                if answer.status_code != 413:
                    raise AssertionError(f"a body of 5 MiB got status {answer.status_code}")

    await _shared(send, count)


async def _shared(send: Callable[[int], Awaitable[None]], count: int) -> None:
    """Send ``count`` messages, shared by ``SENDERS`` concurrent senders."""
    shares = [count // SENDERS + (each < count % SENDERS) for each in range(SENDERS)]
    await asyncio.gather(*(send(share) for share in shares if share))
