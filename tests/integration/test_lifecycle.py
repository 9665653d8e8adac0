"""What happens when processes end: cleanly, killed, or only in part."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_proto.v1 import adapters_pb2, server_pb2

from tests.server_harness import Server, Stream, refusal, running_server

pytestmark = pytest.mark.real_base

LONG = {"max_tokens": 200, "ignore_eos": True}


def begin(server: Server, **fields: Any) -> Stream:
    return server.stream(prompt="Go", stopping=LONG, **fields)


@pytest.mark.push
async def test_sigterm_refuses_new_calls_finishes_running_ones_and_exits_0(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    async with running_server(tmp_path / "data", cache_dir, "--grace", "150") as server:
        streams = [begin(server) for _ in range(4)]
        for stream in streams:
            await stream.first()
        server.process.send_signal(signal.SIGTERM)
        await server.wait_for_health(False, seconds=30)
        late = await server.refused(server.generate(prompt="late"))
        assert (late.code, late.reason) == ("UNAVAILABLE", "DRAINING")
        assert late.retry_after_s is not None
        for stream in streams:
            assert (await stream.rest())[-1].final.usage.completion_tokens == LONG["max_tokens"]
        assert await asyncio.wait_for(server.process.wait(), 60) == 0


@pytest.mark.push
async def test_after_the_grace_running_calls_are_ended_and_the_exit_code_is_0(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    async with running_server(tmp_path / "data", cache_dir, "--grace", "0.5") as server:
        stream = server.stream(prompt="Go", stopping={"max_tokens": 8000, "ignore_eos": True})
        await stream.first()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.rest()
        assert refusal(caught.value).reason == "DRAINING"
        assert await asyncio.wait_for(server.process.wait(), 30) == 0


async def test_kill_9_loses_no_acknowledged_adapter_and_a_restart_serves_them(
    base_folder: Path, cache_dir: Path, real_adapters: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    pushed = {}
    async with running_server(data, cache_dir) as server:
        for name in ("rank-4", "mlp"):
            pushed[name] = (await server.push(real_adapters[name], name)).adapter.revision
        first = await server.generate(prompt="Hello", adapter="mlp")
        server.process.kill()
        await server.process.wait()
    async with running_server(data, cache_dir) as server:
        listed = await server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
        assert {a.name: a.revision for a in listed.adapters} == pushed
        again = await server.generate(prompt="Hello", adapter="mlp")
        assert again.token_ids == first.token_ids
        assert await server.stop() == 0


@pytest.mark.push
async def test_a_killed_engine_ends_calls_with_unavailable_and_comes_back(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    async with running_server(tmp_path / "data", cache_dir) as server:
        before = await server.generate(prompt="Hello")
        stream = begin(server)
        await stream.first()
        engine = server.engine
        engine.kill()
        await server.wait_for_health(False, seconds=30)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.rest()
        ended = refusal(caught.value)
        assert (ended.code, ended.reason) == ("UNAVAILABLE", "ENGINE_FAILED")
        assert ended.retry_after_s is not None
        await server.wait_for_health(True, seconds=60)
        after = await server.generate(prompt="Hello")
        assert after.token_ids == before.token_ids
        info = await server.about.GetServerInfo(server_pb2.GetServerInfoRequest())
        assert info.engine_starts == 2
        assert await server.stop() == 0


@pytest.mark.push
async def test_a_hung_engine_is_not_called_healthy(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """A stopped process still has its socket: only the step loop's pulse tells."""
    async with running_server(tmp_path / "data", cache_dir) as server:
        engine = server.engine
        engine.suspend()
        await server.wait_for_health(False, seconds=30)
        engine.resume()
        await server.wait_for_health(True, seconds=30)
        await server.generate(prompt="Hello")


@pytest.mark.push
async def test_a_full_queue_refuses_with_the_time_to_retry(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    flags = ("--max-running", "2", "--max-queue", "2")
    async with running_server(tmp_path / "data", cache_dir, *flags) as server:
        endless = {"max_tokens": 8000, "ignore_eos": True}
        running = [server.stream(prompt="Go", stopping=endless) for _ in range(2)]
        for stream in running:
            await stream.first()
        waiting = [asyncio.create_task(server.generate(prompt="Go")) for _ in range(2)]
        while (await server.metric("veneer_num_requests_waiting"))[""] < 2:
            # The server's own steps pass between two scrapes.
            assert not any(task.done() for task in waiting)
        refused = await server.refused(server.generate(prompt="one too many"))
        assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert refused.retry_after_s is not None
        for stream in running:
            stream.call.cancel()
        for task in waiting:
            assert (await task).usage.completion_tokens > 0


@pytest.mark.push
async def test_a_second_server_on_the_same_data_folder_names_the_first(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    data, log = tmp_path / "data", tmp_path / "second.log"
    async with running_server(data, cache_dir) as server:
        # The harness's own words; what the server says is in its log.
        with pytest.raises(AssertionError, match="did not start"):
            async with running_server(data, cache_dir, log=log):
                pass
        assert str(server.process.pid) in log.read_text()


async def test_an_address_that_others_can_reach_needs_insecure(
    cache_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "refused.log"
    with pytest.raises(AssertionError, match="did not start"):
        async with running_server(
            tmp_path / "data", cache_dir, "--listen", "0.0.0.0:0", log=log
        ):
            pass
    assert "--insecure" in log.read_text()


@pytest.mark.push
async def test_the_ready_line_says_why_torch_serves(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("veneer-server")),
        *("--listen", "127.0.0.1:0", "--metrics-listen", "", "--device", "cpu"),
        *("--data-dir", str(tmp_path / "data"), "--cache-dir", str(cache_dir)),
        *("--backend", "auto", "--native-instructions", "auto"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "CXX": "/nonexistent"},
    )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    process.terminate()
    assert (
        "  backend=torch (several times slower than native: the compiler /nonexistent" in line
    )
    assert await process.wait() == 0
