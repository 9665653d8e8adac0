"""Measure time to SERVING, TTFT, and CPU time per token, alternating between versions.

::

    python -m tests.bench.start .venv/bin/veneer-server ../before/.venv/bin/veneer-server

Each round starts every given ``veneer-server`` once, with its checkout's cache and a data
folder with one adapter. It measures the wall-clock and CPU seconds until the ready line; then
the TTFT of a 40-token prompt, for the base and for the adapter; then the CPU seconds of all its
processes, and of the front alone, per 1,000 tokens of eight callers with text prompts: first
over gRPC, then as streamed chat completions over HTTP. Prints median, minimum and maximum of
the rounds, after one round that fills the caches.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
from openai import AsyncOpenAI

from tests.server_harness import Server, request

ADAPTER = Path(__file__).parents[2] / "examples" / "adapters" / "chat"
PROMPT = [504 + 7 * i for i in range(40)]
FIRST_TOKENS = 100
"""TTFT samples per start."""
CALLERS, ANSWERS, NEW_TOKENS = 8, 6, 64
TEXT = "Write some sentences about the sea, the wind and what sailors say of both. " * 4


async def one_start(program: str, folder: Path, push: bool) -> dict[str, float]:
    """Start ``program`` once; return the seconds of each figure."""
    ports = folder / "ports.json"
    ports.unlink(missing_ok=True)
    cache = Path(program).parents[2] / ".cache" / "veneer"
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        program,
        *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
        *("--openai-listen", "127.0.0.1:0"),
        *("--data-dir", str(folder / "data"), "--cache-dir", str(cache)),
        *("--port-file", str(ports), "--device", "cpu", "--no-prefix-cache"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
        serving = time.perf_counter() - began
        assert b"ready" in line, f"{program} did not start"
        cpu = cpu_of(process.pid)
        given = json.loads(ports.read_text())
        server = Server(process, given["grpc"], given["metrics"])
        if push:
            await server.push(ADAPTER, "chat")
        figures = {"serving": serving, "serving, CPU": cpu}
        for adapter in ("", "chat"):
            taken = [await _first_token(server, adapter) for _ in range(FIRST_TOKENS)]
            figures[f"first token of {adapter or 'the base'}"] = statistics.median(taken[1:])
        for door in (Grpc(server), Http(given["openai"])):
            before, own = cpu_of(process.pid), own_cpu_of(process.pid)
            began = time.perf_counter()
            counts = await asyncio.gather(*(_caller(door, n) for n in range(CALLERS)))
            thousands = sum(counts) / 1000
            name = f"1,000 tokens, {type(door).__name__}"
            figures[f"{name}, CPU"] = (cpu_of(process.pid) - before) / thousands
            figures[f"{name}, front's CPU"] = (own_cpu_of(process.pid) - own) / thousands
            figures[name] = (time.perf_counter() - began) / thousands
            await door.close()
        await server.stop()
        return figures
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process and its descendants."""
    tree = [psutil.Process(pid), *psutil.Process(pid).children(True)]
    return float(sum(sum(each.cpu_times()[:2]) for each in tree))


def own_cpu_of(pid: int) -> float:
    """Return the CPU seconds of one process."""
    return float(sum(psutil.Process(pid).cpu_times()[:2]))


class Grpc:
    """Streams over gRPC."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def tokens(self, text: str, adapter: str) -> int:
        """Run a stream; return the number of its tokens."""
        stopping = {"max_tokens": NEW_TOKENS, "ignore_eos": True}
        asked = request(prompt=text, adapter=adapter, stopping=stopping)
        return sum(
            [len(m.token_ids) async for m in self._server.inference.GenerateStream(asked)]
        )

    async def close(self) -> None:
        await self._server.channel.close()


class Http:
    """Streamed chat completions over HTTP."""

    def __init__(self, address: str) -> None:
        self._client = AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none")

    async def tokens(self, text: str, adapter: str) -> int:
        """Run a stream; return the number of its tokens."""
        stream = await self._client.chat.completions.create(
            model=adapter or "smollm2-135m",
            messages=[{"role": "user", "content": text}],
            max_tokens=NEW_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        usage = [chunk.usage async for chunk in stream if chunk.usage]
        return usage[-1].completion_tokens

    async def close(self) -> None:
        await self._client.close()


async def _caller(door: Grpc | Http, number: int) -> int:
    """Run streams one after another, on the base or the adapter; return the number of
    tokens."""
    tokens = 0
    for turn in range(ANSWERS):
        text = f"Caller {number} asks for the {turn}th time. " + TEXT
        tokens += await door.tokens(text, "chat" if (number + turn) % 2 else "")
    return tokens


async def _first_token(server: Server, adapter: str) -> float:
    asked = request(token_ids=PROMPT, adapter=adapter, stopping={"max_tokens": 1})
    began = time.perf_counter()
    async for message in server.inference.GenerateStream(asked):
        if message.token_ids:
            return time.perf_counter() - began
    raise AssertionError("no token")


async def measure(programs: list[str], rounds: int) -> None:
    """Run rounds, with the order of programs reversed in every second one; print the
    figures."""
    seen: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as work:
        folders = {program: Path(work) / str(i) for i, program in enumerate(programs)}
        for folder in folders.values():
            folder.mkdir()
        for number in range(rounds + 1):
            order = programs if number % 2 else programs[::-1]
            for program in order:
                figures = await one_start(program, folders[program], push=not number)
                for name, value in figures.items():
                    if number:
                        seen[name, program].append(value)
    for name in dict.fromkeys(name for name, _ in seen):
        for program in programs:
            values = sorted(seen[name, program])
            print(
                f"{name:36} {statistics.median(values) * 1e3:8.1f} ms "
                f"({values[0] * 1e3:.1f} to {values[-1] * 1e3:.1f})  {program}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs="+", metavar="veneer-server")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    programs = [str(Path(program).absolute()) for program in asked.programs]
    asyncio.run(measure(programs, asked.rounds))
