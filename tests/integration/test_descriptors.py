"""Whatever connects, the server reserves file descriptors for itself, so that its engine can
be restarted."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from veneer_server.system.descriptors import raise_limit

from tests.server_harness import running_server

pytestmark = [pytest.mark.push, pytest.mark.real_base]

IDLE = 1100


def connect(stack: ExitStack, address: str, count: int) -> None:
    """Connections that ask for nothing."""
    host, port = address.rsplit(":", 1)
    for _ in range(count):
        connection = stack.enter_context(socket.socket())
        connection.setblocking(False)
        connection.connect_ex((host, int(port)))


async def test_an_engine_is_started_again_though_idle_connections_fill_all_ports(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    if raise_limit(4 * IDLE) < 4 * IDLE:
        pytest.skip(f"the limit of open files is below {4 * IDLE}")
    async with running_server(tmp_path / "data", cache_dir, open_files=1024) as server:
        assert (await server.generate(prompt="Hello")).token_ids
        with ExitStack() as stack:
            for address in (server.metrics, server.openai, server.address):
                connect(stack, address, IDLE)
            # The other two ports make room for those that ask.
            async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
                for url in (f"{server.metrics}/metrics", f"{server.openai}/health"):
                    assert (await http.get(f"http://{url}")).status_code == 200
            assert psutil.Process(server.process.pid).num_fds() <= 1024 - 100
            before = server.engine.pid
            os.kill(before, signal.SIGKILL)
            await server.wait_for_health(False, 30)
            await server.wait_for_health(True, 60)
            assert server.engine.pid != before
            assert (await server.generate(prompt="Hello")).token_ids
            assert await server.metric("veneer_engine_healthy") == {"": 1.0}
        assert await asyncio.wait_for(server.stop(), 60) == 0
