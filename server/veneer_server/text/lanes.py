"""Threads for text, in two lanes by size, so that long texts do not delay short ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from veneer_server.queues.fair_queue import SenderQueue
from veneer_server.queues.fairness import Sender

__all__ = ["LONG_TEXT", "Lanes"]

LONG_TEXT: Final = 64 << 10
"""Texts of at least this many bytes are long; tokenizing them takes 50 ms or more."""

SHORT_THREADS: Final = 2
LONG_THREADS: Final = 1
"""One long text at a time: more threads would take cores from the engine."""

T = TypeVar("T")


class Lanes:
    """Runs work that releases the GIL, or holds it only briefly. In each lane senders take
    turns, so that one with many texts delays another's by one of them. Belongs to one event
    loop."""

    def __init__(self) -> None:
        self._short = _Lane(SHORT_THREADS, "text")
        self._long = _Lane(LONG_THREADS, "long-text")

    async def run(self, size: int, work: Callable[[], T], sender: Sender) -> T:
        """Run ``work`` on a text of ``size`` bytes. If cancelled while queued, it does not
        run at all."""
        lane = self._long if size >= LONG_TEXT else self._short
        return await lane.run(work, sender)

    def close(self) -> None:
        """End the threads; queued work does not run."""
        for lane in (self._short, self._long):
            lane.close()


class _Lane:
    def __init__(self, threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = threads
        self._queue: SenderQueue[asyncio.Future[None]] = SenderQueue()

    async def run(self, work: Callable[[], T], sender: Sender) -> T:
        loop = asyncio.get_running_loop()
        if not self._free:
            turn: asyncio.Future[None] = loop.create_future()
            self._queue.push(sender, turn)
            try:
                await turn
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._freed()
                else:
                    self._queue.remove(sender, turn)
                raise
        else:
            self._free -= 1
        running = loop.run_in_executor(self._threads, work)
        running.add_done_callback(lambda _: self._freed())
        # The thread works on if the caller leaves, and is free only when it has ended.
        return await asyncio.shield(running)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        while (found := self._queue.pop()) is not None:
            found[1].cancel()

    def _freed(self) -> None:
        """Pass a thread on to the next in the queue; it then counts as taken."""
        self._free += 1
        while self._free and (found := self._queue.pop()) is not None:
            if found[1].done():  # its caller has left, and perhaps others with it
                self._queue.drop(asyncio.Future.done)
                continue
            self._free -= 1
            found[1].set_result(None)
