"""Send loads to an opened target, one after the other, until done or stopped."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from veneer_loadtest import report
from veneer_loadtest.load.figures import level, totals
from veneer_loadtest.load.generator import LoadOutcome, generate
from veneer_loadtest.load.live import LiveView
from veneer_loadtest.load.opening import Opened
from veneer_loadtest.load.spec import Closed, LoadSpec, Open, Traced
from veneer_loadtest.load.trace import read_trace
from veneer_loadtest.results import Level, SloLimits
from veneer_loadtest.server_metrics import MetricsWatch

_RATE_OF_A_WORKER: float = 300.0
"""Requests per second that one worker can send; measured with short streams over gRPC, see
docs/loadtest.md."""


class StopSignal:
    """Signal that ends the run, with the reason."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.why = ""

    def stop(self, why: str) -> None:
        """End the run; the first reason is kept."""
        self.why = self.why or why
        self.event.set()


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Let Ctrl-C and SIGTERM end the run but keep its report; a second one ends the process."""
    loop = asyncio.get_running_loop()
    stop = StopSignal()
    previous = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for kind, handler in previous.items():
            loop.remove_signal_handler(kind)
            signal.signal(kind, handler)

    def on(kind: signal.Signals) -> None:
        stop.stop(f"ended by {kind.name}")
        restore()

    for kind in previous:
        loop.add_signal_handler(kind, on, kind)
    try:
        yield stop
    finally:
        restore()


def worker_count(asked: int, load: LoadSpec) -> int:
    """Return ``asked``; if 0, as many as the load's rate needs, at most one per core."""
    if asked:
        return asked
    match load.arrivals:
        case Open(rate=rate):
            pass
        case Traced(path=path, speed=speed):
            lines = read_trace(Path(path))
            rate = len(lines) / max(lines[-1].at_s / speed, 1.0)
        case _:
            rate = 0.0
    return max(1, min(report.usable_cores(), math.ceil(rate / _RATE_OF_A_WORKER)))


@dataclass(frozen=True, slots=True)
class Session:
    """A target, and settings for the loads on it."""

    opened: Opened
    workers: int
    timeout_s: float
    limits: SloLimits | None
    stop: StopSignal

    async def run(self, load: LoadSpec, title: str) -> tuple[Level, LoadOutcome]:
        """Send one load; return its results up to the end or a stop.

        Raises:
            TargetFailed: the target can no longer be reached.
        """
        workers = worker_count(self.workers, load)
        if isinstance(load.arrivals, Closed):
            workers = min(workers, load.arrivals.streams)
        async with AsyncExitStack() as stack:
            watch = None
            if self.opened.metrics is not None:
                watch = await stack.enter_async_context(MetricsWatch(self.opened.metrics))
            with LiveView(title, load.duration_s) as view:
                loaded = await generate(
                    load,
                    self.opened.spec,
                    workers=workers,
                    timeout_s=self.timeout_s,
                    stop=self.stop.event,
                    on_progress=view.update,
                )
        if loaded.failure:
            self.stop.stop(loaded.failure)
        residency = server = None
        if watch is not None:
            residency = watch.residency(loaded.start)
            whole = all(r.outcome == "ok" for r in loaded.records) and not loaded.lost
            server = watch.counts(totals(loaded.records), comparable=whole)
        figures = level(
            load,
            loaded,
            workers=workers,
            limits=self.limits,
            residency=residency,
            server=server,
        )
        return figures, loaded


def with_adapters(load: LoadSpec, adapters: tuple[str, ...], vocab: int) -> LoadSpec:
    """Return the same load on these adapters; without a ``vocab`` prompts are words."""
    return msgspec.structs.replace(load, adapters=adapters, vocab=vocab, text=not vocab)
