"""Threads for text, two lanes by size: a long text never waits in front of a short one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

__all__ = ["LONG_TEXT", "Lanes"]

LONG_TEXT: Final = 64 << 10
"""Bytes from which on a text is long: tokenizing so many takes some 50 ms."""

SHORT_THREADS: Final = 2
LONG_THREADS: Final = 1
"""Long texts wait for each other. More threads would take the engine's cores."""

T = TypeVar("T")


class Lanes:
    """Runs work that releases the interpreter's lock, or holds it for moments."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(SHORT_THREADS, thread_name_prefix="text")
        self._long = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="long-text")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Run ``work`` on a text of ``size`` bytes. Cancelled while it waits, it does not
        run at all."""
        pool = self._long if size >= LONG_TEXT else self._short
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def close(self) -> None:
        """End the threads; what waits does not run."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)
