"""``veneer adapter watch`` on a real server that is killed and restarted."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.server_harness import running_server

pytestmark = pytest.mark.push

ADAPTERS = Path("examples/adapters")
PATIENCE_S = 60
VENEER = str(Path(sys.executable).with_name("veneer"))


@asynccontextmanager
async def watching(address: str, stdout: int = PIPE) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        VENEER,
        "--server",
        address,
        "adapter",
        "watch",
        stdout=stdout,
        stderr=PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        # What a shell starts in the background without job control ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.wait(), PATIENCE_S)


async def line_with(stream: asyncio.StreamReader | None, text: str) -> list[str]:
    """Lines up to the first one that holds ``text``."""
    assert stream is not None
    lines: list[str] = []
    async with asyncio.timeout(PATIENCE_S):
        while not lines or text not in lines[-1]:
            lines.append((await stream.readline()).decode())
            assert lines[-1], f"ended before {text!r}: {lines}"
    return lines


async def test_it_goes_on_with_a_server_that_was_killed(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    data = tmp_path / "data"
    async with running_server(data, cache_dir, "--listen", address) as server:
        await server.push(ADAPTERS / "chat", "chat")
        async with watching(address) as watch:
            assert "present" in (await line_with(watch.stdout, "chat@"))[-1]
            server.process.kill()
            await server.process.wait()
            (lost,) = await line_with(watch.stderr, "reconnecting")
            assert address in lost
            assert "Ctrl-C" in lost
            async with running_server(data, cache_dir, "--listen", address) as again:
                (back,) = await line_with(watch.stderr, "reconnected")
                assert address in back
                (snapshot,) = await line_with(watch.stdout, "chat@")
                assert snapshot.split()[1] == "present"
                await again.push(ADAPTERS / "sql", "sql")
                lines = await line_with(watch.stdout, "sql@")
                assert [line.split()[1] for line in lines] == ["published"]
                watch.send_signal(signal.SIGINT)
                rest, told = await asyncio.wait_for(watch.communicate(), PATIENCE_S)
                assert b"@" not in rest
                assert b"127.0.0.1" not in told, "one line for each thing that happened"


async def test_the_table_counts_down_when_requests_end(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    async with running_server(tmp_path / "data", cache_dir) as server:
        await server.push(ADAPTERS / "chat", "chat", activate=True)
        screen, terminal = pty.openpty()
        try:
            os.set_blocking(screen, False)
            async with watching(server.address, terminal):
                await in_use(screen, 0)
                stream = server.stream(
                    prompt="Once",
                    adapter="chat",
                    stopping={"max_tokens": 4000, "ignore_eos": True},
                )
                await stream.first()
                await in_use(screen, 1)
                stream.call.cancel()
                await in_use(screen, 0)
        finally:
            os.close(terminal)
            os.close(screen)


async def in_use(screen: int, requests: int) -> None:
    """Read the terminal until the table says so."""
    row = re.compile(rf"chat +[0-9a-f]{{12}} +device +\S+ MiB +{requests}\s")
    text, loop = "", asyncio.get_running_loop()
    async with asyncio.timeout(PATIENCE_S):
        while not row.search(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)):
            readable = asyncio.Event()
            loop.add_reader(screen, readable.set)
            await readable.wait()
            loop.remove_reader(screen)
            text += os.read(screen, 65536).decode(errors="replace")
