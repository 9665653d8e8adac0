"""SIGHUP ends no stream, whichever process gets it, even from a terminal that closes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import signal
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from tests.server_harness import READY_SECONDS, Server, running_server

pytestmark = [pytest.mark.push, pytest.mark.real_base]

LONG = {"max_tokens": 60, "ignore_eos": True}


async def test_a_hangup_of_any_process_ends_no_stream(
    base_folder: Path, cache_dir: Path, real_adapters: dict[str, Path], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    async with running_server(tmp_path / "data", cache_dir, log=log) as server:
        await server.push(real_adapters["rank-4"], "rank-4")
        await server.generate(prompt="Hi", adapter="rank-4")  # starts a loader
        front = psutil.Process(server.process.pid)
        processes = [front, *front.children(recursive=True)]
        assert len(processes) >= 3, "front, engine and loader"
        stream = server.stream(prompt="Go", stopping=LONG, adapter="rank-4")
        await stream.first()
        for process in processes:
            process.send_signal(signal.SIGHUP)
        rest = await stream.rest()
        assert rest[-1].final.usage.completion_tokens == LONG["max_tokens"]
        assert {p.pid for p in processes} <= {
            front.pid,
            *(child.pid for child in front.children(recursive=True)),
        }
        assert await server.stop() == 0
    assert log.read_text().count("SIGHUP ignored") == 1
    assert "Traceback" not in log.read_text()


@contextlib.asynccontextmanager
async def in_a_terminal(data: Path, cache_dir: Path) -> AsyncIterator[tuple[Server, int]]:
    """A server that a person started in the foreground, and the terminal's end of it."""
    ours, theirs = pty.openpty()
    ports = data.with_suffix(".json")

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("veneer-server")),
        *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--device", "cpu"),
        *("--data-dir", str(data), "--cache-dir", str(cache_dir), "--port-file", str(ports)),
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        # As it is for a user: output waits in a buffer.
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    try:
        shown = b""
        async with asyncio.timeout(READY_SECONDS):
            while b"veneer ready" not in shown:
                shown += await asyncio.to_thread(os.read, ours, 4096)
        told = json.loads(ports.read_text())
        server = Server(process, told["grpc"], told["metrics"])
        yield server, ours
        await server.channel.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_terminal_that_closes_ends_no_stream(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    async with in_a_terminal(tmp_path / "data", cache_dir) as (server, terminal):
        stream = server.stream(prompt="Go", stopping=LONG)
        await stream.first()
        os.close(terminal)
        rest = await stream.rest()
        assert rest[-1].final.usage.completion_tokens == LONG["max_tokens"]
        assert (await server.generate(prompt="Hi")).token_ids
        assert await server.stop() == 0


async def test_a_server_without_standard_descriptors_serves(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Closed ones were taken by sockets, over which libuv aborted."""
    ports = tmp_path / "ports.json"
    process = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        'exec "$0" "$@" <&- >&- 2>&-',
        str(Path(sys.executable).with_name("veneer-server")),
        *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--device", "cpu"),
        *("--data-dir", str(tmp_path / "data"), "--cache-dir", str(cache_dir)),
        *("--port-file", str(ports)),
    )
    try:
        async with asyncio.timeout(READY_SECONDS):
            while not ports.exists():
                assert process.returncode is None, "it ended"
                await asyncio.sleep(0.02)
        told = json.loads(ports.read_text())
        server = Server(process, told["grpc"], told["metrics"])
        assert (await server.generate(prompt="Hi")).token_ids
        assert await server.stop() == 0
        await server.channel.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
