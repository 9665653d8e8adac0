"""Watch what other callers notice during an attack: streams, small calls, memory."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
import psutil

from tests.server_harness import Server, request

STREAMS = 4
TOKENS = 48
"""Tokens of each answer of a stream; the next answer begins at once."""
PAUSE_S = 0.25
"""Seconds between two small calls, and between two measurements of memory."""
ANSWER_S = 30.0
"""Seconds without an answer after which a caller counts as not answered."""
PROMPTS = (
    "Write one sentence about the sea.",
    "Name three animals.",
    "What is a database?",
    "Tell me a story about a fox.",
)


@dataclass(slots=True)
class Noticed:
    """What normal callers noticed.

    Attributes:
        gaps: TTFTs and ITLs, in seconds.
        worst: when the longest gap was, for display.
        answers: number of streams and small calls that ended well.
        unanswered: how the others ended, one line each.
        streaming: set once each stream has received a token, or was not answered.
    """

    gaps: list[float] = field(default_factory=list)
    answers: int = 0
    unanswered: list[str] = field(default_factory=list)
    worst: str = ""
    began: float = field(default_factory=time.perf_counter)
    streaming: asyncio.Event = field(default_factory=asyncio.Event)
    _waiting: set[int] = field(default_factory=lambda: set(range(STREAMS)))

    def heard(self, stream: int) -> None:
        """Note that a stream has received something."""
        self._waiting.discard(stream)
        if not self._waiting:
            self.streaming.set()

    def gap(self, last: float, tokens: int) -> None:
        """Record the gap from ``last`` until now, after this many tokens of an answer."""
        now = time.perf_counter()
        if now - last > self.longest:
            what = f"after {tokens} tokens" if tokens else "to the first token"
            self.worst = f"{what}, {now - self.began:.1f} s after the start"
        self.gaps.append(now - last)

    @property
    def longest(self) -> float:
        return max(self.gaps, default=0.0)


async def notice(
    server: Server, until: asyncio.Event, adapters: list[str], noticed: Noticed
) -> None:
    """Run four streams and a caller of small requests until ``until`` is set."""
    streams = [
        _stream(server, until, i, adapters[i % len(adapters)], noticed) for i in range(STREAMS)
    ]
    await asyncio.gather(*streams, _small(server, until, noticed))


async def _stream(
    server: Server, until: asyncio.Event, number: int, adapter: str, noticed: Noticed
) -> None:
    prompt = PROMPTS[number % len(PROMPTS)]
    while not until.is_set():
        asked = request(
            prompt=prompt,
            adapter=adapter,
            stopping={"max_tokens": TOKENS, "ignore_eos": True},
        )
        last = time.perf_counter()
        tokens = 0
        try:
            async with asyncio.timeout(ANSWER_S):
                async for message in server.inference.GenerateStream(asked):
                    if message.token_ids:
                        noticed.gap(last, tokens)
                        last = time.perf_counter()
                        tokens += len(message.token_ids)
                        noticed.heard(number)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            noticed.gap(last, tokens)
            noticed.heard(number)
            noticed.unanswered.append(f"a stream of {adapter or 'the base'}: {_told(error)}")
            continue
        if tokens == TOKENS:
            noticed.answers += 1
        else:
            noticed.unanswered.append(f"a stream ended after {tokens} of {TOKENS} tokens")


async def _small(server: Server, until: asyncio.Event, noticed: Noticed) -> None:
    """Make small calls, one after another: a short answer, a list page and a health check."""
    while not until.is_set():
        try:
            async with asyncio.timeout(ANSWER_S):
                await server.generate(prompt="Hi", stopping={"max_tokens": 2})
                assert await server.serving(), "health is not SERVING"
            noticed.answers += 1
        except (grpc.aio.AioRpcError, TimeoutError, AssertionError) as error:
            noticed.unanswered.append(f"a small call: {_told(error)}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(until.wait(), PAUSE_S)


def _told(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return repr(error)


class Memory:
    """Memory of a server's processes (PSS): private bytes plus a share of shared bytes."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._start = self._peak = self._of_each()

    def _of_each(self) -> Counter[str]:
        """Return the bytes by kind of process."""
        found: Counter[str] = Counter()
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                words = [
                    word for word in process.cmdline() if word.startswith("veneer_server.")
                ]
                found[words[0] if words else "front"] += process.memory_full_info().pss
        return found

    @property
    def growth(self) -> int:
        """Growth from the start to the highest measurement."""
        return self._peak.total() - self._start.total()

    def largest(self) -> str:
        """Describe which processes had grown at the highest measurement."""
        grown = {name: (self._peak[name] - self._start[name]) >> 20 for name in self._peak}
        return ", ".join(f"{name} {mb:+d}" for name, mb in grown.items() if abs(mb) >= 1)

    async def watch(self, until: asyncio.Event) -> None:
        while not until.is_set():
            now = await asyncio.to_thread(self._of_each)
            self._peak = max(self._peak, now, key=Counter.total)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(until.wait(), PAUSE_S)
