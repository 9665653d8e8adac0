"""The load generator: worker processes that share a load, and the results they report.

Workers are processes, not threads: an event loop that sends a thousand requests per second
needs a core to itself, and answers that are read late would make the server look slow.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from veneer_registry.child_python import child_python

from veneer_loadtest.errors import GeneratorFailed, TargetFailed
from veneer_loadtest.load.records import Record
from veneer_loadtest.load.spec import Closed, LoadSpec
from veneer_loadtest.load.targets import TargetSpec
from veneer_loadtest.load.wire import (
    BeginLoad,
    FromWorker,
    LoadProgress,
    StopLoad,
    ToWorker,
    WorkerDone,
    WorkerFailed,
    WorkerReady,
    WorkerSetup,
    decode_from_worker,
    encode,
    read_frame,
)

_HEAD_START_S: Final = 0.1
"""Time between the last worker becoming ready and the start of the load."""


@dataclass(slots=True)
class LoadOutcome:
    """The results of a load; they grow while it runs.

    Attributes:
        start: when the load began, in ``time.monotonic()``; 0 before that.
        records: in the order in which requests ended.
        sent: requests begun, by worker.
        wall_s: from the start to the last request's end, or to now while the load runs.
        cpu_s: CPU time of the generator: workers and this process.
        stopped: the load was ended early.
        failure: why a worker process ended by itself. Results that it had reported by then,
            and those of the other workers, are kept.
    """

    start: float = 0.0
    records: list[Record] = field(default_factory=list)
    sent: dict[int, int] = field(default_factory=dict)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    stopped: bool = False
    failure: str = ""

    @property
    def lost(self) -> int:
        """Requests that were sent but have no record; 0 once a load has ended."""
        return sum(self.sent.values()) - len(self.records)


async def generate(
    load: LoadSpec,
    target: TargetSpec,
    *,
    workers: int,
    timeout_s: float,
    stop: asyncio.Event,
    on_progress: Callable[[LoadOutcome], None] = lambda loaded: None,
) -> LoadOutcome:
    """Send a load and return its results.

    Args:
        timeout_s: timeout of each request; a request that takes longer has failed.
        stop: set it to end early: running requests are cancelled, results so far are kept.
        on_progress: called as results come in, about ten times per second and worker.

    Raises:
        TargetFailed: the target cannot be reached, or the load cannot be sent to it.
        GeneratorFailed: a worker process did not start.
    """
    if isinstance(load.arrivals, Closed):
        workers = min(workers, load.arrivals.streams)
    loaded = LoadOutcome()
    async with AsyncExitStack() as stack:
        running = [
            await stack.enter_async_context(LoadWorker(number)) for number in range(workers)
        ]
        for worker in running:
            await worker.tell(WorkerSetup(load, target, worker.number, workers, timeout_s))
        for worker in running:
            await worker.hear(WorkerReady)
        cpu = time.process_time()
        loaded.start = time.monotonic() + _HEAD_START_S
        for worker in running:
            await worker.tell(BeginLoad(loaded.start))
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(_stop_all(stop, running, loaded))
            gathering = [
                group.create_task(_gather(worker, loaded, on_progress, stop))
                for worker in running
            ]
            await asyncio.wait(gathering)
            stopping.cancel()
        loaded.cpu_s = time.process_time() - cpu + sum(task.result() for task in gathering)
    ends = [record.end_s for record in loaded.records]
    loaded.wall_s = max(ends, default=0.0)
    return loaded


async def _stop_all(
    stop: asyncio.Event, workers: list[LoadWorker], loaded: LoadOutcome
) -> None:
    await stop.wait()
    loaded.stopped = True
    for worker in workers:
        await worker.tell(StopLoad())


async def _gather(
    worker: LoadWorker,
    loaded: LoadOutcome,
    on_progress: Callable[[LoadOutcome], None],
    stop: asyncio.Event,
) -> float:
    """Collect one worker's reports until it is done; returns its CPU seconds."""
    while True:
        try:
            message = await worker.hear(LoadProgress, WorkerDone)
        except GeneratorFailed as error:
            loaded.failure = str(error)
            stop.set()
            return 0.0
        loaded.sent[worker.number] = message.sent
        if isinstance(message, WorkerDone):
            return float(message.cpu_s)
        loaded.records += message.records
        loaded.wall_s = time.monotonic() - loaded.start
        on_progress(loaded)


class LoadWorker:
    """One worker process, from its start to its end."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> LoadWorker:
        self._process = await asyncio.create_subprocess_exec(
            *child_python("-m", "veneer_loadtest.load.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            pipe: Any = self._process.stdin
            pipe.close()  # a worker stops when its generator is gone
            try:
                await asyncio.wait_for(self._process.wait(), 5.0)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def tell(self, message: ToWorker) -> None:
        pipe: Any = self._process.stdin
        try:
            pipe.write(encode(message))
            await pipe.drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the worker has ended; the next `hear` says so

    async def hear(self, *kinds: type[Any]) -> Any:
        pipe: Any = self._process.stdout
        body = await read_frame(pipe)
        if body is None:
            status = await self._process.wait()
            raise GeneratorFailed(
                f"worker {self.number} of the load generator ended with status {status}: its "
                "error, if it had one, is above; a negative status is a signal's number "
                "(-9: out of memory?)"
            )
        message: FromWorker = decode_from_worker(body)
        if isinstance(message, WorkerFailed):
            raise TargetFailed(message.message, metadata=message.metadata)
        if not isinstance(message, kinds):
            raise GeneratorFailed(f"worker {self.number} sent {message!r} unexpectedly")
        return message
