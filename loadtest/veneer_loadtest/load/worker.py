"""A worker process of the load generator: ``python -m veneer_loadtest.load.worker``.

It sends its share of a load and reports the result of each request; see `wire`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain

from veneer_client import VeneerError

from veneer_loadtest.errors import HttpFailed
from veneer_loadtest.load.plan import Planned, plan
from veneer_loadtest.load.records import Outcome, Record, pack_gaps
from veneer_loadtest.load.spec import Closed
from veneer_loadtest.load.targets import Facts, Target, make_target
from veneer_loadtest.load.wire import (
    BeginLoad,
    FromWorker,
    LoadProgress,
    WorkerDone,
    WorkerFailed,
    WorkerReady,
    WorkerSetup,
    decode_to_worker,
    encode,
    read_frame,
)

_TELL_S: float = 0.1


class WorkerShare:
    """One worker's part of a load.

    Attributes:
        sent: requests begun so far.
    """

    def __init__(self, setup: WorkerSetup, target: Target) -> None:
        self._setup = setup
        self._target = target
        self._start = 0.0
        self._ended: list[Record] = []
        self._running: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._requests = self._mine()
        # Read the first request now rather than when it is due: that reads a whole trace.
        first = next(self._requests, None)
        if first is not None:
            self._requests = chain((first,), self._requests)
        self.sent = 0

    def take(self) -> list[Record]:
        """Return the requests that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    async def send_all(self, start: float) -> None:
        """Send every request of the share and wait until the last has ended.

        Args:
            start: start of the load, in ``time.monotonic()``.
        """
        self._start = start
        arrivals = self._setup.load.arrivals
        mine = self._requests
        if not isinstance(arrivals, Closed):
            await self._send_when_due(mine)
            while self._running:
                await asyncio.wait(self._running)
            return
        lanes = len(range(self._setup.worker, arrivals.streams, self._setup.of))
        async with asyncio.TaskGroup() as group:
            for _ in range(lanes):
                group.create_task(self._lane(mine))

    def stop(self) -> None:
        """Send no more requests, and cancel the running ones."""
        if self._stop.is_set():
            return
        self._stop.set()
        for task in self._running:
            task.cancel()

    def _mine(self) -> Iterator[Planned]:
        worker, of = self._setup.worker, self._setup.of
        return (request for request in plan(self._setup.load) if request.index % of == worker)

    def _now(self) -> float:
        return time.monotonic() - self._start

    async def _send_when_due(self, mine: Iterator[Planned]) -> None:
        for request in mine:
            await self._wait_until(request.at_s)
            if self._stop.is_set():
                return
            self.begin(request, request.at_s)

    async def _wait_until(self, at_s: float) -> None:
        """Wait until that time, or until a stop."""
        wait = at_s - self._now()
        if wait <= 0:
            await asyncio.sleep(0)  # let answers be read
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._stop.wait()

    async def _lane(self, mine: Iterator[Planned]) -> None:
        # The first request of every lane is due at the start, which may be in the future.
        await self._wait_until(0.0)
        limit = self._setup.load.duration_s
        while not self._stop.is_set() and not (limit and self._now() >= limit):
            request = next(mine, None)
            if request is None:
                return
            await asyncio.wait((self.begin(request, self._now()),))

    def begin(self, request: Planned, due_s: float) -> asyncio.Task[None]:
        """Send now a request that was due at ``due_s``; the task ends with the request."""
        self.sent += 1
        task = asyncio.create_task(self._run(request, due_s))
        self._running.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._running.discard(task)
            if task.cancelled():  # before the task began to run
                now = self._now()
                self._note(request, due_s, now, [], Facts(), "stopped", "")

        task.add_done_callback(ended)
        return task

    async def _run(self, request: Planned, due_s: float) -> None:
        sent_s = self._now()
        arrivals: list[float] = []
        facts = Facts()
        outcome: Outcome = "ok"
        reason = ""
        try:
            async with (
                asyncio.timeout(self._setup.timeout_s),
                self._target.send(request) as stream,
            ):
                facts = stream.facts
                if request.leave_after == 0:
                    outcome = "left"
                else:
                    async for new in stream:
                        arrivals += [self._now()] * new
                        if _leaves(request, len(arrivals)):
                            outcome = "left"
                            break
                    facts = stream.facts
        except TimeoutError:
            outcome, reason = "failed", "TIMEOUT"
        except VeneerError as error:
            outcome, reason = "failed", _reason(error)
        except asyncio.CancelledError:
            outcome = "stopped"
        except Exception as error:  # a bug of ours must not lose the request
            outcome, reason = "failed", type(error).__name__
        self._note(request, due_s, sent_s, arrivals, facts, outcome, reason)

    def _note(
        self,
        request: Planned,
        due_s: float,
        sent_s: float,
        arrivals: list[float],
        facts: Facts,
        outcome: Outcome,
        reason: str,
    ) -> None:
        self._ended.append(
            Record(
                index=request.index,
                adapter=request.adapter,
                due_s=due_s,
                sent_s=sent_s,
                first_s=arrivals[0] if arrivals else None,
                end_s=self._now(),
                prompt_tokens=facts.prompt_tokens or request.prompt_tokens,
                cached=facts.cached,
                tokens=len(arrivals) if facts.tokens is None else facts.tokens,
                outcome=outcome,
                reason=reason,
                tier=facts.tier,
                revision=facts.revision,
                queue_s=facts.queue_s,
                load_s=facts.load_s,
                gaps=pack_gaps(arrivals),
            )
        )


def _reason(error: VeneerError) -> str:
    return error.word if isinstance(error, HttpFailed) else error.reason


def _leaves(request: Planned, arrived: int) -> bool:
    return request.leave_after is not None and arrived >= request.leave_after


async def _serve() -> None:
    inward, outward = await _pipes()

    async def tell(message: FromWorker) -> None:
        outward.write(encode(message))
        await outward.drain()

    async def hear() -> object:
        body = await read_frame(inward)
        return decode_to_worker(body) if body is not None else None

    setup = await hear()
    assert isinstance(setup, WorkerSetup)
    try:
        async with make_target(setup.load, setup.target) as target:
            share = WorkerShare(setup, target)
            await target.connect()
            await tell(WorkerReady())
            begin = await hear()
            if not isinstance(begin, BeginLoad):
                return
            gc.freeze()  # so that garbage collection skips what imports allocated
            cpu = time.process_time()
            work = asyncio.create_task(share.send_all(begin.at))
            stop = asyncio.create_task(hear())  # `StopLoad`, or the end of the generator
            told = 0
            while not work.done():
                waiting = {work, stop} if not stop.done() else {work}
                await asyncio.wait(
                    waiting, timeout=_TELL_S, return_when=asyncio.FIRST_COMPLETED
                )
                if stop.done():
                    share.stop()
                ended = share.take()
                if ended or share.sent != told:
                    told = share.sent
                    await tell(LoadProgress(told, ended))
            stop.cancel()
            work.result()
            await tell(LoadProgress(share.sent, share.take()))
            await tell(WorkerDone(share.sent, time.process_time() - cpu))
    except VeneerError as error:
        await tell(WorkerFailed(error.message, error.metadata))


async def _pipes() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    inward = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(inward), sys.stdin)
    # Libraries may print to standard output: send that to standard error, keep the pipe.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, pipe)
    return inward, asyncio.StreamWriter(transport, protocol, None, loop)


def main() -> None:
    """Entry point of the worker process."""
    # Ctrl-C in a terminal reaches the whole process group; the generator says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve())


if __name__ == "__main__":
    main()
