"""A starting server is never silent: it answers at once that it is loading, and what.

A compiler that waits (FAKE: a script) keeps a real server in the middle of its start.
"""

from __future__ import annotations

import asyncio
import json
import os
import pty
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from veneer_server.models.source import BUNDLED

from tests.backends_ran import server_environment
from tests.ports import free_port
from tests.server_harness import Server

pytestmark = [pytest.mark.push, pytest.mark.real_base]

PROGRAMS = Path(sys.executable).parent
WAIT_S = 120


async def until(holds: Callable[[], Any], what: str) -> None:
    """For states of other processes, which have no event here."""
    ends = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < ends, what
        await asyncio.sleep(0.02)


@dataclass
class Starting:
    """A server process that may still load."""

    process: asyncio.subprocess.Process
    log: Path
    server: Server

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [event for event in found if event["event"] == name]

    def parts(self) -> dict[str, str]:
        """How each part of the start ended."""
        told = self.events("progress")
        return {e["part"]: e["state"] for e in told if e["state"] != "running"}

    async def cli(self, *args: str) -> tuple[int, str, str]:
        """``veneer`` for this server: status, output, errors."""
        process = await asyncio.create_subprocess_exec(
            PROGRAMS / "veneer",
            *args,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**server_environment(), "VENEER_SERVER": self.server.address},
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def starting(
    tmp_path: Path, cache: Path, *flags: str, **environment: str
) -> AsyncIterator[Starting]:
    """A server from the moment at which its process is there."""
    at = {name: f"127.0.0.1:{free_port()}" for name in ("grpc", "metrics", "openai")}
    log = tmp_path / "log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            PROGRAMS / "veneer-server",
            *("--listen", at["grpc"], "--metrics-listen", at["metrics"]),
            *("--openai-listen", at["openai"], "--device", "cpu", "--log-format", "json"),
            *("--data-dir", str(tmp_path / "data"), "--cache-dir", str(cache), *flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=errors,
            env={**server_environment(), **environment},
        )
    server = Server(process, at["grpc"], at["metrics"], at["openai"])
    found = Starting(process, log, server)
    try:
        await until(
            lambda: found.events("listening") or process.returncode is not None, "it listens"
        )
        yield found
        await server.channel.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@dataclass
class Compiler:
    """One that waits when it has begun, and fails when it is let go."""

    command: Path
    begun: Path
    gate: Path

    def pid(self) -> int | None:
        try:
            return int(self.begun.read_text())
        except (OSError, ValueError):
            return None

    def let_go(self) -> None:
        self.gate.write_text("now\n")


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    made = Compiler(tmp_path / "c++", tmp_path / "begun", tmp_path / "gate")
    os.mkfifo(made.gate)
    real = shutil.which("c++") or "c++"
    made.command.write_text(
        "#!/bin/sh\n"
        f'case " $* " in *" -### "*) exec {real} "$@";; esac\n'
        f"echo $$ > {made.begun}.new; mv {made.begun}.new {made.begun}\n"
        f"read line < {made.gate}\n"
        "echo let go; exit 1\n"
    )
    made.command.chmod(0o755)
    return made


@pytest.fixture
def fresh_cache(base_folder: Path, tmp_path: Path) -> Path:
    """The base, and nothing that a start makes of it."""
    cache = tmp_path / "cache"
    (cache / "bases").mkdir(parents=True, mode=0o700)
    shutil.copytree(base_folder, cache / "bases" / BUNDLED)
    return cache


async def test_while_it_loads_everybody_is_told_what_it_does(
    fresh_cache: Path, compiler: Compiler, tmp_path: Path
) -> None:
    flags = ("--backend", "auto", "--native-instructions", "auto")
    async with starting(tmp_path, fresh_cache, *flags, CXX=str(compiler.command)) as start:
        server = start.server
        await until(compiler.pid, "it compiles")
        refused = await server.refused(server.generate(prompt="Hello"))
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "MODEL_LOADING")
        assert refused.metadata["doing"].startswith("compiling the kernels: ")
        assert refused.retry_after_s is not None
        listed = await server.refused(server.adapters.ListAdapters(_list()))
        assert listed.reason == "MODEL_LOADING"
        assert await server.serving("")
        assert not await server.serving()
        assert await server.metric("veneer_ready") == {"": 0.0}
        async with httpx.AsyncClient(
            base_url=f"http://{server.openai}", trust_env=False
        ) as http:
            answer = await http.post("/v1/completions", json={"prompt": "Hi"})
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert "compiling the kernels" in answer.json()["error"]["message"]
            health = (await http.get("/health")).json()
            assert health["status"] == "loading"
            assert health["doing"].startswith("compiling the kernels: ")
        status, out, err = await start.cli("generate", "Hello")
        assert (status, out, len(err.splitlines())) == (1, "", 1)
        assert "compiling the kernels" in err
        assert "veneer health --wait" in err
        status, out, err = await start.cli("health")
        assert (status, out) == (1, "not_serving\n")
        assert err.startswith("loading: compiling the kernels: ")

        waiting = asyncio.create_task(start.cli("health", "--wait", "2m"))
        compiler.let_go()
        status, out, err = await waiting
        assert (status, out) == (0, "serving\n"), err
        await server.generate(prompt="Hello")
        assert await server.metric("veneer_ready") == {"": 1.0}
        (labels,) = await server.metric("veneer_backend_info")
        assert 'backend="torch",instructions="",reason="' in labels
        assert "let go" in labels
        # A fast machine says nothing of a part that took less than 100 ms.
        expected = {
            "starting the engine": "done",
            "compiling the kernels": "failed",
            "quantizing the base": "done",
            "packing the weights": "done",
        }
        assert expected.items() <= start.parts().items()
        quantized = [e for e in start.events("progress") if e["part"] == "quantizing the base"]
        assert quantized[-1]["done"] == quantized[-1]["total"] > 200
        assert not start.events("call refused"), "those who wait ask again and again"
        assert await server.stop() == 0


def _list() -> Any:
    from veneer_proto.v1 import adapters_pb2

    return adapters_pb2.ListAdaptersRequest()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_an_end_in_the_middle_of_compiling_leaves_nothing(
    fresh_cache: Path, compiler: Compiler, tmp_path: Path, number: int
) -> None:
    async with starting(tmp_path, fresh_cache, CXX=str(compiler.command)) as start:
        await until(compiler.pid, "it compiles")
        processes = psutil.Process(start.process.pid).children(recursive=True)
        assert compiler.pid() in {process.pid for process in processes}
        start.process.send_signal(number)
        status = await asyncio.wait_for(start.process.wait(), WAIT_S)
        assert status == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        await until(lambda: not any(map(_runs, processes)), "its processes end")
        assert not list((fresh_cache / "native").iterdir())
        assert "Traceback" not in start.log.read_text()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def test_sigterm_in_the_middle_of_the_download_leaves_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with closing(socket.create_server(("127.0.0.1", 0))) as index:  # takes calls, says nothing
        address = f"http://127.0.0.1:{index.getsockname()[1]}/"
        async with starting(tmp_path, cache, PIP_INDEX_URL=address) as start:
            front = psutil.Process(start.process.pid)
            await until(front.children, "it downloads")
            (pip,) = front.children()
            refused = await start.server.refused(start.server.generate(prompt="Hello"))
            assert refused.metadata["doing"].startswith("downloading the base: 0 of 98 MB")
            assert await start.server.stop() == 0
            assert not _runs(pip)
            assert not list((cache / "bases").iterdir())
            assert start.parts() == {"downloading the base": "failed"}


async def test_a_taken_port_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    for flag in ("--listen", "--metrics-listen", "--openai-listen"):
        with closing(socket.create_server(("127.0.0.1", 0))) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            # An empty cache: it would have to download the base.
            cache = tmp_path / "cache"
            async with starting(tmp_path, cache, flag, address) as start:
                assert await asyncio.wait_for(start.process.wait(), WAIT_S) == 1
                text = start.log.read_text()
                assert f"cannot listen on {address}" in text
                assert flag in text
                assert not start.events("progress")


async def test_a_pasted_block_works(cache_dir: Path, base_folder: Path, tmp_path: Path) -> None:
    """In a shell with job control, as a person has it: what comes after the server is for the
    shell, and the server's log draws nothing over it."""
    port = free_port()
    server = (
        f"veneer-server --listen 127.0.0.1:{port} --metrics-listen '' --device cpu "
        f"--data-dir {tmp_path}/data --cache-dir {cache_dir}"
    )
    block = (
        f"{server} & veneer health --wait 2m\n"
        'veneer generate --max-tokens 4 "Hello"; echo status=$?\n'
        "kill %1; wait %1; echo ended=$?\n"
        "exit\n"
    )
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        "bash",
        "--norc",
        "--noprofile",
        "--noediting",
        "-i",
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        env={
            **server_environment(),
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "VENEER_SERVER": f"127.0.0.1:{port}",
            "PS1": "",
        },
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    os.write(ours, block.encode())
    shown = await asyncio.to_thread(_all_of, ours)
    assert await process.wait() == 0
    assert "serving\r\n" in shown, shown
    assert "status=0" in shown
    assert "ended=0" in shown
    assert "so far\r" not in shown.replace("so far\r\n", "")
    assert "\x1b[K" not in shown


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _all_of(terminal: int) -> str:
    text = b""
    try:
        while piece := os.read(terminal, 4096):
            text += piece
    except OSError:  # nobody has the other end any more
        pass
    os.close(terminal)
    return text.decode(errors="replace")
