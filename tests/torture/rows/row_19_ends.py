"""Row 19: servers are stopped under load, and engines fail or hang.

These are real processes on a tiny Llama. SIGTERM comes at a random moment during streams, short
calls and uploads: health must say NOT_SERVING before any call is refused, each call must end
with OK or UNAVAILABLE, and the process must end with status 0 within its grace period plus 2 s.
When an engine is killed, crashes, raises in a step or hangs, health must say NOT_SERVING within
2 s (10 s for a hang), running calls must end with UNAVAILABLE, and the next engine must give
the same answer. The wait before a restart, which grows with each failure, is kept short here.

A server that does not tell health, a server that waits for streams forever, and a server that
trusts a silent engine must fail this bar.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import grpc

from tests.places import cache_dir
from tests.server_harness import Server, Stream, refusal, running_server
from tests.tiny_llama import SHAPES, VOCABULARY, make_lora, make_tiny_llama
from tests.torture.row import Control, Outcome, Scale
from tests.torture.tenants import edited_server

ROW = 19
TITLE = "ends"
BAR = (
    "SIGTERM: NOT_SERVING first, every call terminal, status 0 within grace + 2 s; engine: "
    "NOT_SERVING in 2 s, hung in 10 s, the same answer after"
)
GRACE_S, MORE_S = 1.0, 2.0
DEAD_S, HUNG_S, BACK_S = 2.0, 10.0, 60.0
CALLERS: Final = 6
KINDS: Final = ("SIGKILL", "SIGSEGV", "exception", "hang")

SHORT_BACKOFF: Final = (
    "from veneer_server.engine_client import supervisor\n"
    "supervisor.LAST_BACKOFF = supervisor.FIRST_BACKOFF"
)
RAISES_ON_USR2: Final = (
    "import signal\n"
    "def fail(number, frame):\n"
    "    raise RuntimeError('planted: an exception in a step')\n"
    "signal.signal(signal.SIGUSR2, fail)\n"
)
"""Runs in every process of the server, but only the engine gets the signal."""

SILENT_DRAIN: Final = (
    "from veneer_server.rpc.server_service import Health\n"
    "async def drain(self): pass\n"
    "Health.drain = drain"
)
ENDLESS_DRAIN: Final = (
    "from veneer_server.serving.generation import Calls\n"
    "import asyncio\n"
    "async def finish(self, grace_s): await asyncio.sleep(3600)\n"
    "Calls.finish = finish"
)
BELIEVING: Final = (
    f"{SHORT_BACKOFF}\nfrom veneer_server.engine_client.supervisor import Supervisor\n"
    "Supervisor.silence_limit = property(lambda self: 3600.0)"
)


@dataclass
class Found:
    """Results of some ends."""

    failures: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def took(self, what: str, seconds: float) -> None:
        self.seconds.setdefault(what, []).append(seconds)

    @property
    def slowest(self) -> str:
        return ", ".join(f"{what} {max(took):.2f} s" for what, took in self.seconds.items())


def run(scale: Scale) -> Outcome:
    """Test both kinds of ends."""
    stops, failures = scale.pick(2, 100), scale.pick(4, 50)
    base = make_tiny_llama(scale.folder("base"), seed=scale.seed)
    found = Found()
    asyncio.run(_stops(scale, base, stops, found))
    with edited_server(SHORT_BACKOFF, scale.folder("bin")), _raising(scale.folder("site")):
        asyncio.run(_engines(scale, base, failures, found))
    statuses = ", ".join(f"{count:,} {name}" for name, count in found.statuses.most_common())
    return Outcome(
        figure=(
            f"{stops} SIGTERM, {failures} engines ended or hung; calls: {statuses}; slowest: "
            f"{found.slowest}"
        ),
        bar=BAR,
        failures=tuple(found.failures),
    )


def controls(scale: Scale) -> Iterator[Control]:
    """Plant servers that get one thing wrong."""
    base = make_tiny_llama(scale.folder("base"), seed=scale.seed)
    for number, (planted, edit) in enumerate(
        (("health is not told", SILENT_DRAIN), ("a drain without an end", ENDLESS_DRAIN))
    ):
        found = Found()
        with edited_server(edit, scale.folder(f"bin {number}")):
            asyncio.run(_stops(scale, base, 1, found))
        yield Control(planted, found.failures[0] if found.failures else "")
    found = Found()
    with edited_server(BELIEVING, scale.folder("bin 2")):
        asyncio.run(_engines(scale, base, 1, found, kinds=("hang",)))
    yield Control("a silent engine is believed", found.failures[0] if found.failures else "")


@contextmanager
def _raising(folder: Path) -> Iterator[None]:
    """Make servers that are started in the block raise an exception in the engine on
    SIGUSR2."""
    (folder / "sitecustomize.py").write_text(RAISES_ON_USR2)
    with patch.dict(os.environ, {"PYTHONPATH": str(folder)}):
        yield


# ------------------------------------------------------------------------- SIGTERM


async def _stops(scale: Scale, base: Path, count: int, found: Found) -> None:
    folder = scale.folder(f"stops {len(list(scale.work.iterdir()))}")
    adapter = make_lora(folder / "adapter", seed=1, modules=tuple(SHAPES))
    generator = scale.random("stops")
    flags = ("--base", str(base), "--grace", f"{GRACE_S:g}", "--max-running", "4")
    for number in range(count):
        async with running_server(folder / "data", cache_dir(), *flags) as server:
            await _one_stop(server, adapter, generator, f"stop {number}", found)


async def _one_stop(
    server: Server, adapter: Path, generator: random.Random, which: str, found: Found
) -> None:
    down, refused = asyncio.Event(), asyncio.Event()

    async def follow_health() -> None:
        await server.wait_for_health(False, seconds=BACK_S)
        down.set()

    async def keep_calling(number: int) -> None:
        while not refused.is_set():
            most = generator.choice((1, 8, 400))
            ids = [generator.randrange(3, VOCABULARY) for _ in range(generator.randint(1, 40))]
            asked = {"token_ids": ids, "stopping": {"max_tokens": most, "ignore_eos": True}}
            if number % 2:
                await note(Stream(server.stream(**asked).call).rest())
            else:
                await note(server.generate(**asked))

    async def keep_pushing() -> None:
        number = 0
        while not refused.is_set():
            await note(server.push(adapter, f"pushed-{number}"))
            number += 1

    async def note(call: Any) -> None:
        try:
            await call
            status = "OK"
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                found.failures.append(
                    f"{which}: a call ended with {error.code().name}: {error.details()}"
                )
            gone = "details" not in str(error.trailing_metadata())
            status = "connection closed" if gone else refusal(error).reason
            if status == "DRAINING" and not refused.is_set():
                try:  # both arrive on one connection, but in different tasks
                    await asyncio.wait_for(down.wait(), 0.25)
                except TimeoutError:
                    found.failures.append(f"{which}: refused before health said NOT_SERVING")
            refused.set()
        found.statuses[status] += 1

    health = asyncio.create_task(follow_health())
    calls = [asyncio.create_task(keep_calling(number)) for number in range(CALLERS)]
    calls.append(asyncio.create_task(keep_pushing()))
    await asyncio.sleep(generator.uniform(0, 1))
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    try:
        status = await asyncio.wait_for(server.process.wait(), GRACE_S + MORE_S)
        found.took("stop", time.monotonic() - began)
        if status != 0:
            found.failures.append(f"{which}: it ended with status {status}")
    except TimeoutError:
        found.failures.append(f"{which}: it still runs {GRACE_S + MORE_S:g} s after SIGTERM")
        server.process.kill()
    _, left = await asyncio.wait(calls, timeout=5)
    if left:
        found.failures.append(f"{which}: {len(left)} calls have no status")
    for task in (*left, health):
        task.cancel()
    await asyncio.gather(*calls, health, return_exceptions=True)
    for task in calls:
        if not task.cancelled() and (error := task.exception()) is not None:
            found.failures.append(f"{which}: {error!r}")


# ------------------------------------------------------------------------- engines


async def _engines(
    scale: Scale, base: Path, count: int, found: Found, kinds: tuple[str, ...] = KINDS
) -> None:
    folder = scale.folder(f"engines {len(list(scale.work.iterdir()))}")
    generator = scale.random("engines")
    async with running_server(folder / "data", cache_dir(), "--base", str(base)) as server:
        asked = {"token_ids": [5, 6, 7], "stopping": {"max_tokens": 16, "ignore_eos": True}}
        right = list((await server.generate(**asked)).token_ids)
        for number in range(count):
            which = f"engine {number} ({kinds[number % len(kinds)]})"
            long = {"token_ids": [8, 9], "stopping": {"max_tokens": 450, "ignore_eos": True}}
            streams = [server.stream(**long) for _ in range(3)]
            for stream in streams:
                await stream.first()
            await asyncio.sleep(generator.uniform(0, 0.05))
            if not await _one_engine(server, kinds[number % len(kinds)], streams, which, found):
                return
            if list((await server.generate(**asked)).token_ids) != right:
                found.failures.append(f"{which}: another answer than before")
        if await server.stop() != 0:
            found.failures.append("the server did not end with status 0")


async def _one_engine(
    server: Server, kind: str, streams: list[Stream], which: str, found: Found
) -> bool:
    """Make an engine fail; return whether the server serves again."""
    engine = server.engine
    began, limit = time.monotonic(), HUNG_S if kind == "hang" else DEAD_S
    numbers = {"exception": signal.SIGUSR2, "hang": signal.SIGSTOP}
    engine.send_signal(numbers.get(kind) or signal.Signals[kind])
    try:
        await server.wait_for_health(False, seconds=limit)
    except TimeoutError:
        found.failures.append(f"{which}: health says SERVING after {limit:g} s")
        engine.kill()
        return False
    found.took(f"{kind} seen in", time.monotonic() - began)
    if kind == "hang":
        engine.resume()
    for stream in streams:
        try:
            await asyncio.wait_for(stream.rest(), BACK_S)
            found.statuses["OK"] += 1
        except grpc.aio.AioRpcError as error:
            found.statuses[refusal(error).reason] += 1
            if refusal(error).reason != "ENGINE_FAILED" or kind == "hang":
                found.failures.append(f"{which}: a call ended with {error.details()}")
    try:
        await server.wait_for_health(True, seconds=BACK_S)
    except TimeoutError:
        found.failures.append(f"{which}: it does not serve again after {BACK_S:g} s")
        return False
    found.took("serves again after", time.monotonic() - began)
    return True
