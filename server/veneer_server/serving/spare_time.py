"""Runs one caller's heavy work (long answers, large requests) without delaying other callers.

Writing an answer of 60 MB takes seconds. On the event loop it would block every other caller,
and a busy thread takes the GIL and a core from every stream. So the work is cut into pieces of
about a millisecond. One thread runs them, and sleeps between them for longer than it worked.
Senders take turns, one piece each.

A piece must not be one long call into C: the thread would keep the GIL.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Final, TypeVar

from veneer_registry.errors import QueueFull

from veneer_server.logs import get_logger
from veneer_server.queues.fair_queue import SenderQueue
from veneer_server.queues.fairness import Sender

MAX_WAITING: Final = 32 << 20
"""Most bytes of large requests that are waiting or being worked on; one tenant may have half.
They arrive faster than they are processed, and nothing else bounds them yet."""

_REST: Final = 3
"""How long a thread sleeps, as a multiple of the CPU time it used: on few cores, a thread that
is always busy slows every step down."""
_WORK_S: Final = 0.002
"""Seconds of CPU time after which the thread sleeps."""
_LONGEST_REST_S: Final = 0.25
"""Longest single sleep, since the caller waits for it even on a slow machine."""
_END: Final = object()

T = TypeVar("T")


class WorkBreaks:
    """Makes a thread sleep between pieces of work, so that others get the GIL and the core."""

    def __init__(self) -> None:
        self._rested = self._worked = 0.0
        """`_rested`: when the thread may continue, by `time.monotonic`; `_worked`: its CPU time
        when it began to work."""

    def begin(self) -> None:
        """Wait until the thread may work; time that it was idle counts as sleep."""
        time.sleep(max(0.0, self._rested - time.monotonic()))
        self._worked = time.thread_time()

    def rest(self) -> None:
        """Sleep if the thread has worked for long enough."""
        if time.thread_time() - self._worked >= _WORK_S:
            self.end()
            self.begin()

    def end(self) -> None:
        """End a piece of work, and set when the next one may begin."""
        rest = _REST * (time.thread_time() - self._worked)
        self._rested = time.monotonic() + min(_LONGEST_REST_S, rest)


class SpareTime:
    """One worker thread for which senders take turns. Belongs to one event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "spare-time")
        self._breaks = WorkBreaks()
        self._queue: SenderQueue[asyncio.Future[None]] = SenderQueue()
        self._working = False
        self._waiting: Counter[str] = Counter()
        """Bytes by tenant."""

    def close(self) -> None:
        """End the thread; queued work does not run."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def request(self, work: Callable[[], T], size: int, sender: Sender) -> T:
        """As `run`, for a request of `size` bytes. Raises QueueFull if too many wait."""
        tenant = sender.tenant
        own, held = self._waiting[tenant], self._waiting.total()
        if own + size > MAX_WAITING // 2 or held + size > MAX_WAITING:
            raise QueueFull(
                f"{held} bytes of large requests are waiting to be checked, {own} of them "
                f"yours; the limit is {MAX_WAITING}, half of it for one tenant: retry later, "
                "or send fewer at once",
                retry_after_s=1.0,
            )
        self._waiting[tenant] += size
        try:
            return await self.run(work, sender)
        finally:
            self._waiting[tenant] -= size
            if not self._waiting[tenant]:
                del self._waiting[tenant]

    async def run(self, work: Callable[[], T], sender: Sender) -> T:
        """Run a piece of work in the thread and return its result. It logs with the caller's
        context. If cancelled before its turn, it does not run."""
        await self._turn(sender)
        try:
            context, loop = contextvars.copy_context(), asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, context.run, self._paced, work)
        finally:
            self._next()

    async def each(self, items: Iterator[T], sender: Sender) -> AsyncGenerator[T, None]:
        """Yield the items; each is made as one piece of work, after the previous one was
        used."""
        while (item := await self.run(lambda: _next_or_end(items), sender)) is not _END:
            yield item

    def _paced(self, work: Callable[[], T]) -> T:
        self._breaks.begin()
        try:
            return work()
        finally:
            self._breaks.end()

    async def _turn(self, whose: Sender) -> None:
        if not self._working:
            self._working = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.push(whose, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._next()  # it was this call's turn, but the caller has left
            else:
                self._queue.remove(whose, turn)
            raise

    def _next(self) -> None:
        while (found := self._queue.pop()) is not None:
            if not found[1].done():
                found[1].set_result(None)
                return
            self._queue.drop(asyncio.Future.done)  # its caller left; drop others that did too
        self._working = False


def _next_or_end(items: Iterator[T]) -> Any:
    return next(items, _END)


# -------------------- threads
# For work that must finish even if its caller is cancelled: blocking work in threads, cleanup.

_log = get_logger(__name__)


async def to_the_end(work: Callable[[], T], executor: Executor | None = None) -> T:
    """Run ``work`` in a thread; if cancelled, wait for it to end, then raise CancelledError.

    A thread cannot be stopped, so nothing that it uses (an upload's staging folder) may be
    removed while it still runs.

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
