"""Measure how long a server with a large base takes to start, and its memory.

::

    python -m tests.bench.big_base --shape 1.07b
    python -m tests.bench.big_base --shape 7b --folder /tmp/bigbase

Writes a random-weight Llama of the shape with the bundled base's tokenizer, shard by shard,
unless the folder has it. Then it starts a server three times with one cache, which is empty at
first: the first start compiles the kernels, and hashes, quantizes and packs the base; the
second start finds all of that; and the third is a restart after the engine was killed with
SIGKILL. Each is timed until health says SERVING, and one answer is generated after it. Prints
peak and steady resident memory of the engine process, the CPU seconds of all processes (which
other work on the machine hardly changes), and how often health left SERVING by itself.

The base is kept in the folder, the cache is not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from grpc_health.v1 import health_pb2
from safetensors.torch import save_file
from transformers import LlamaConfig
from veneer_server.models.source import import_bundled
from veneer_server.system.machine import peak_bytes

from tests.bench.start import cpu_of
from tests.server_harness import SERVICE, Server

VOCABULARY: Final = 49_152
"""Size of the bundled tokenizer's vocabulary."""
SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "1.07b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 11_008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
}
TOKENIZER: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
POOL: Final = 1 << 26
SPREAD: Final = 0.02
START_SECONDS: Final = 1800.0
LOOK_SECONDS: Final = 0.05
HERE: Final = Path(__file__).resolve().parents[2]


def write_base(folder: Path, shape: str, cache: Path) -> None:
    """Write the base in bfloat16, one shard for each layer."""
    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    made = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    # Each tensor takes another part of one pool: drawing 7 billion numbers takes minutes.
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(1)) * SPREAD).bfloat16()
    begin = 0

    def draw(rows: int, columns: int) -> torch.Tensor:
        nonlocal begin
        begin = (begin + 7919) % POOL
        again = pool.roll(-begin).repeat(-(-rows * columns // POOL))
        return again[: rows * columns].view(rows, columns).clone()

    hidden, inner = config.hidden_size, config.intermediate_size
    heads = hidden // config.num_attention_heads
    kv = config.num_key_value_heads * heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    one = torch.ones(hidden, dtype=torch.bfloat16)
    shards = config.num_hidden_layers + 1
    index: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(tensors, made / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    rest = {"model.embed_tokens.weight": draw(VOCABULARY, hidden), "model.norm.weight": one}
    if not config.tie_word_embeddings:
        rest["lm_head.weight"] = draw(VOCABULARY, hidden)
    save(0, rest)
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}"
        tensors = {f"{stem}.{name}.weight": draw(*size) for name, size in linears.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{norm}.weight"] = one.clone()
        save(layer + 1, tensors)
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config.save_pretrained(made)
    bundled = import_bundled(cache).path
    for name in TOKENIZER:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(bundled / name, made / name)
    made.rename(folder)


@dataclass
class Watched:
    """Observations of a server.

    Attributes:
        health: (seconds since the start, whether it was SERVING), one for each change.
        peak: process id -> largest resident memory of that engine process, bytes.
        anonymous: the same without pages of files.
    """

    began: float
    health: list[tuple[float, bool]] = field(default_factory=list)
    peak: dict[int, int] = field(default_factory=dict)
    anonymous: dict[int, int] = field(default_factory=dict)

    def serving_since(self, after: float = 0.0) -> float | None:
        """Return when health became SERVING, if it is now and that was after ``after``."""
        if not self.health or not self.health[-1][1] or self.health[-1][0] < after:
            return None
        return self.health[-1][0]


class Running:
    """A started server."""

    def __init__(self, server: Server, watched: Watched) -> None:
        self.server = server
        self.watched = watched

    def engine(self) -> psutil.Process | None:
        """The engine process, if there is one."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.server.process.pid).children(True):
                if "veneer_server.engine.process" in child.cmdline():
                    return child
        return None

    async def serving(self, after: float = 0.0) -> float:
        """Wait until SERVING; return the seconds from ``after`` until then."""
        while (since := self.watched.serving_since(after)) is None:
            assert self.server.process.returncode is None, "the server has ended"
            await asyncio.sleep(LOOK_SECONDS)
        return since - after

    async def answer(self) -> float:
        """Generate 16 tokens for a prompt of 64; return the seconds."""
        began = time.monotonic()
        await self.server.generate(
            token_ids=[500 + i for i in range(64)],
            stopping={"max_tokens": 16, "ignore_eos": True},
        )
        return time.monotonic() - began

    async def look(self) -> None:
        """Sample the engine's memory until cancelled."""
        while True:
            process = self.engine()
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_info()
                    seen = self.watched
                    pid = process.pid
                    seen.anonymous[pid] = max(
                        seen.anonymous.get(pid, 0), memory.rss - memory.shared
                    )
                    seen.peak[pid] = peak_bytes(pid) or seen.peak.get(pid, 0)
            await asyncio.sleep(LOOK_SECONDS)

    async def follow(self) -> None:
        """Follow health until cancelled."""
        watch = self.server.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        async for message in watch:
            now = time.monotonic() - self.watched.began
            serving = message.status == health_pb2.HealthCheckResponse.SERVING
            self.watched.health.append((now, serving))


@asynccontextmanager
async def started(base: Path, work: Path, name: str) -> AsyncIterator[Running]:
    """Start a server; its log goes to a file beside the cache."""
    ports = work / f"{name}.json"
    began = time.monotonic()
    with (work / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            str(HERE / ".venv" / "bin" / "veneer-server"),
            *("--base", str(base), "--backend", "native", "--device", "cpu"),
            *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
            *("--data-dir", str(work / "data"), "--cache-dir", str(work / "cache")),
            *("--port-file", str(ports)),
            stdout=log,
            stderr=log,
        )
    try:
        while not ports.exists():
            assert process.returncode is None, (work / f"{name}.log").read_text()
            await asyncio.sleep(LOOK_SECONDS)
        given = json.loads(ports.read_text())
        running = Running(Server(process, given["grpc"], given["metrics"]), Watched(began))
        tasks = [asyncio.create_task(each) for each in (running.look(), running.follow())]
        try:
            yield running
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await running.server.channel.close()
            await running.server.stop()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def report(name: str, seconds: float, cpu: float, running: Running, answer: float) -> None:
    """Print a line about the engine that runs now."""
    engine = running.engine()
    assert engine is not None
    memory = engine.memory_info()
    peak = running.watched.peak.get(engine.pid, 0)
    gb = 1e9
    print(
        f"{name:12} {seconds:7.1f} s (CPU {cpu:.1f} s)  peak {peak / gb:5.2f} GB = "
        f"{peak / memory.rss:.2f} x steady {memory.rss / gb:.2f} GB "
        f"(without pages of files: {running.watched.anonymous.get(engine.pid, 0) / gb:.2f} and "
        f"{(memory.rss - memory.shared) / gb:.2f})  answer {answer:.2f} s  "
        f"load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def parts(log: Path) -> None:
    """Print how long the parts of a start took."""
    for line in log.read_text("utf-8").splitlines():
        if ": done in" in line or "WARN" in line or "ERROR" in line:
            print("   ", line.split("Z ")[-1])


async def measure(base: Path, work: Path) -> None:
    """Start three times and print the figures."""
    flaps = 0
    for name in ("first start", "second start"):
        async with started(base, work, name) as running:
            async with asyncio.timeout(START_SECONDS):
                seconds = await running.serving()
                cpu = cpu_of(running.server.process.pid)
                report(name, seconds, cpu, running, await running.answer())
                parts(work / f"{name}.log")
                states = [serving for _, serving in running.watched.health]
                flaps += sum(then and not now for then, now in itertools.pairwise(states))
                if name == "second start":
                    engine = running.engine()
                    assert engine is not None
                    killed = time.monotonic() - running.watched.began
                    engine.kill()
                    seconds = await running.serving(killed)
                    engine = running.engine()
                    assert engine is not None
                    cpu = cpu_of(engine.pid)
                    report("restart", seconds, cpu, running, await running.answer())
    print(f"health left SERVING by itself {flaps} times")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tests.bench.big_base", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1.07b")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bigbase")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("VENEER_CACHE_DIR", HERE / ".cache" / "veneer")),
        help="gets the bundled base, for its tokenizer",
    )
    asked = parser.parse_args()
    base = asked.folder / f"llama-{asked.shape}"
    if not base.exists():
        began = time.monotonic()
        write_base(base, asked.shape, asked.cache)
        print(f"wrote {base} in {time.monotonic() - began:.0f} s", flush=True)
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="work-") as work:
        asyncio.run(measure(base, Path(work)))


if __name__ == "__main__":
    main()
