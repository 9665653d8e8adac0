"""Two registries on one PostgreSQL and one S3, four engines, and every link between them.

All are processes as users start them, on a tiny random base, whose real engine answers within
milliseconds. Between any two there is a `Proxy`. S3 is the suite's stand-in.

    registries a, b   each with a proxy to PostgreSQL, and one to S3
    engines 1 to 4    each with a proxy to its registry, at first a, b, a, b; 1 and 2 read
                      weights from the object store first
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from tests.ports import free_port
from tests.scale.proxy import Proxy
from tests.server_harness import Server, running_server
from tests.shared_services import BUCKET, PostgresServer, S3Server
from tests.tiny_llama import make_tiny_llama

REGISTRIES: Final = ("a", "b")
ENGINES: Final = ("1", "2", "3", "4")
_WITH_STORE: Final = ("1", "2")
_SKEWED: Final = ("b", "2", "4")
"""Servers of which a fault may set the clock, if libfaketime is there."""

_SMALL: Final = (
    *("--kv-cache-bytes", "16MiB", "--host-cache-bytes", "64MiB"),
    *("--device-adapter-bytes", "32MiB", "--threads", "1"),
)
_STARTS: Final = 5
_START_S: Final = 90.0
_LIBRARIES: Final = (
    Path(__file__).resolve().parents[2] / ".cache/tools/faketime",
    Path("/"),
)


def faketime() -> Path | None:
    """libfaketime, of the system or unpacked in ``.cache/tools/faketime``; None if there is
    none."""
    for root in _LIBRARIES:
        for found in sorted(root.glob("usr/lib/*/faketime/libfaketimeMT.so.1")):
            return found
    return None


@dataclass
class Node:
    """One server, which may be killed, paused and started again with the same data folder.

    Attributes:
        server: None while it does not run.
        failed_starts: how often it ended before it was ready.
        clock: the file that says by how much its clock is wrong; None if it cannot be.
    """

    name: str
    folder: Path
    cache: Path
    flags: tuple[str, ...]
    environment: Mapping[str, str]
    program: Path | None = None
    clock: Path | None = None
    server: Server | None = None
    failed_starts: int = 0
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start(self) -> None:
        """Start it and wait until it is ready. If it ends, start it again, as a supervisor
        does: the object store may fail."""
        for left in reversed(range(_STARTS)):
            try:
                # libfaketime has a lock that is not released in a forked process: now and then
                # a server waits for ever for a process that it starts.
                async with asyncio.timeout(_START_S):
                    self.server = await self._stack.enter_async_context(
                        running_server(
                            self.folder,
                            self.cache,
                            *self.flags,
                            environment=self.environment,
                            program=self.program,
                        )
                    )
            except (AssertionError, TimeoutError):
                if not left:
                    raise
                self.failed_starts += 1
                await asyncio.sleep(1)
            else:
                return

    async def kill(self) -> None:
        """End its processes as ``kill -9`` does."""
        server, self.server = self.server, None
        if server is None:
            return
        children = self._children(server)
        server.process.kill()
        await server.process.wait()
        await asyncio.to_thread(psutil.wait_procs, children, 30)
        await self._stack.aclose()

    def pause(self) -> None:
        """Stop all its processes with SIGSTOP, the front first."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """End a pause."""
        self._signal(signal.SIGCONT)

    def set_clock(self, seconds: int) -> None:
        """Make its clock wrong by so many seconds from now on."""
        assert self.clock is not None
        new = self.clock.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.rename(self.clock)

    def _signal(self, number: int) -> None:
        if self.server is None:
            return
        os.kill(self.server.process.pid, number)
        for child in self._children(self.server):
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    @staticmethod
    def _children(server: Server) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(server.process.pid).children(recursive=True)
        return []


class Cluster:
    """The servers, services and links; see the module's docstring. Made by `cluster`.

    Attributes:
        nodes: by name, registries and engines.
        to_registry: each engine's link to its registry.
        to_postgres, to_s3: each registry's links.
        follows: which registry an engine follows.
    """

    def __init__(self, work: Path, cache: Path, stack: AsyncExitStack) -> None:
        self.work, self._cache, self._stack = work, cache, stack
        self.base = make_tiny_llama(work / "base")
        self.nodes: dict[str, Node] = {}
        self.to_registry: dict[str, Proxy] = {}
        self.to_postgres: dict[str, Proxy] = {}
        self.to_s3: dict[str, Proxy] = {}
        self.follows = dict(zip(ENGINES, REGISTRIES * 2, strict=True))
        self.library = faketime()
        self.postgres: PostgresServer
        self.s3: S3Server

    async def start(self, program: Path | None = None) -> None:
        """Start everything; ``program`` runs instead of ``veneer-server``."""
        stack, port = self._stack, free_port()
        self.postgres = await asyncio.to_thread(PostgresServer, port)
        stack.callback(lambda: self.postgres.stop())
        self.s3 = await asyncio.to_thread(S3Server)
        stack.callback(lambda: self.s3.stop())
        store = ("--store", f"s3://{BUCKET}/shared")
        for name in REGISTRIES:
            links = [
                await stack.enter_async_context(Proxy(target))
                for target in (
                    f"127.0.0.1:{port}",
                    self.s3.endpoint.removeprefix("http://"),
                )
            ]
            self.to_postgres[name], self.to_s3[name] = links
            catalog = (
                *("--catalog", f"postgresql://veneer@{links[0].address}/postgres"),
                *("--catalog-password-file", str(self.postgres.password_file)),
            )
            # A small cache: content is fetched from S3 again.
            flags = ("--role", "registry", *store, *catalog, "--store-cache-bytes", "1MiB")
            self._add(name, flags, links[1], program)
        await asyncio.gather(*(self.nodes[name].start() for name in REGISTRIES))
        for name in ENGINES:
            link = await stack.enter_async_context(Proxy(""))
            self.to_registry[name] = link
            self.move(name, self.follows[name])
            flags = ("--role", "engine", "--registry", link.address, *_SMALL)
            flags += ("--adapter-cache-bytes", "1MiB")
            if name in _WITH_STORE:
                flags += store
            self._add(name, flags, None, program)
        for name in ENGINES:  # not all at once: each would compile what the first one compiles
            await self.nodes[name].start()

    def _add(
        self, name: str, flags: tuple[str, ...], s3: Proxy | None, program: Path | None
    ) -> None:
        environment = self.s3.environment()
        if s3 is not None:
            environment["AWS_ENDPOINT_URL_S3"] = f"http://{s3.address}"
        clock = None
        if self.library is not None and name in _SKEWED:
            clock = self.work / f"clock-{name}"
            clock.write_text("+0\n")
            environment |= {
                "LD_PRELOAD": str(self.library),
                "FAKETIME_TIMESTAMP_FILE": str(clock),
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "NO_FAKE_STAT": "1",
                "FAKETIME_CACHE_DURATION": "1",
            }
        role = "registry" if name in REGISTRIES else "engine"
        node = Node(
            name,
            self.work / f"{role}-{name}",
            self._cache,
            ("--base", str(self.base), *flags),
            environment,
            program,
            clock,
        )
        self.nodes[name] = node
        self._stack.push_async_callback(node.kill)

    def move(self, engine: str, registry: str) -> None:
        """Have an engine's link lead to this registry, from the next connection on."""
        self.follows[engine] = registry
        server = self.nodes[registry].server
        if server is not None:
            self.to_registry[engine].target = server.address

    async def restart(self, registry: str) -> None:
        """Start a registry that was killed, and lead its engines' links to it."""
        await self.nodes[registry].start()
        for engine in self.followers(registry):
            self.move(engine, registry)

    def followers(self, registry: str) -> frozenset[str]:
        """The engines that follow a registry."""
        return frozenset(e for e, follows in self.follows.items() if follows == registry)

    def pause_in_change(self, registry: str, within_s: float) -> bool:
        """Pause a registry while it has the catalog's lock; return whether it was. Blocks."""
        node, end = self.nodes[registry], time.monotonic() + within_s
        with self.postgres.connect() as connection:
            while time.monotonic() < end:
                if self._holder(connection) == registry:
                    node.pause()
                    time.sleep(0.05)  # what it has sent is carried out now
                    if self._holder(connection) == registry:
                        return True
                    node.resume()
        return False

    def _holder(self, connection: Any) -> str:
        """The registry whose session has the catalog's lock; "" if none has."""
        rows = connection.execute(
            "SELECT client_port FROM pg_locks JOIN pg_stat_activity USING (pid) "
            "WHERE locktype = 'advisory' AND granted"
        ).fetchall()
        ports = {port for (port,) in rows}
        for name, link in self.to_postgres.items():
            if ports & link.ports:
                return name
        return ""


@asynccontextmanager
async def cluster(work: Path, cache: Path) -> AsyncIterator[Cluster]:
    """A cluster that has not been started; all of it ends with the block."""
    async with AsyncExitStack() as stack:
        yield Cluster(work, cache, stack)
