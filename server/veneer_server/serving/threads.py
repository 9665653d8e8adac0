"""Work that a cancelled caller must not abandon: blocking work in threads, and cleanup."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

from veneer_server.logs import get_logger

__all__ = ["Background", "outlast", "to_the_end"]

_log = get_logger(__name__)

T = TypeVar("T")


async def to_the_end(work: Callable[[], T], executor: Executor | None = None) -> T:
    """Run ``work`` in a thread; if cancelled, wait for it to end, then raise CancelledError.

    A thread cannot be stopped, so what it uses (an upload's staging folder) must
    not be removed while it still runs.

    Args:
        executor: runs the work; None for the event loop's default.
    """
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()

    async def run() -> T:
        return await loop.run_in_executor(executor, lambda: context.run(work))

    return await outlast(run())


async def outlast(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work``; if cancelled, wait for it to end, then raise CancelledError."""
    running = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError as error:
            cancelled = error
        except Exception:  # raised to the caller by result() below
            break
    if cancelled is not None:
        if not running.cancelled():
            running.exception()  # mark it as retrieved; the cancellation takes precedence
        raise cancelled
    return running.result()


class Background:
    """Fire-and-forget work in threads; one run of each kind at a time."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[None]] = {}

    def start(self, kind: str, work: Callable[[], object]) -> None:
        """Run ``work`` unless a run of this kind is in progress; log what it raises."""
        if kind not in self._running:
            task = asyncio.get_running_loop().create_task(self._run(kind, work))
            self._running[kind] = task

    async def finish(self) -> None:
        """Wait for all runs in progress."""
        await asyncio.gather(*self._running.values())

    async def _run(self, kind: str, work: Callable[[], object]) -> None:
        try:
            await to_the_end(work)
        except Exception as error:
            _log.error("background work failed", error, kind=kind)
        finally:
            del self._running[kind]
