"""Threads for text, in two lanes by size, so that long texts do not delay short ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

__all__ = ["LONG_TEXT", "Lanes"]

LONG_TEXT: Final = 64 << 10
"""Texts of at least this many bytes are long; tokenizing them takes 50 ms or more."""

SHORT_THREADS: Final = 2
LONG_THREADS: Final = 1
"""One long text at a time: more threads would take cores from the engine."""

T = TypeVar("T")


class Lanes:
    """Runs work that releases the GIL, or holds it only briefly."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(SHORT_THREADS, thread_name_prefix="text")
        self._long = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="long-text")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Run ``work`` on a text of ``size`` bytes. If cancelled while queued, it does not
        run at all."""
        pool = self._long if size >= LONG_TEXT else self._short
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def close(self) -> None:
        """End the threads; queued work does not run."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)
