"""Measure how uploading or loading adapters affects streams that are decoding.

Phases without and with uploads alternate (quiet, churn, churn, quiet ...). In each phase all
streams decode from its beginning to its end (a stream that reaches the end of the context
is followed by another). Their requests come from a separate process, so that this process's
work on uploads is not measured as the server's. Once a second in a churn phase, either a new
revision of an adapter is uploaded and activated, or an adapter on DISK is activated. The
latter leaves out the cost of an upload on the client's machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Final

import numpy as np
from veneer_client import AsyncClient

from veneer_loadtest.errors import TargetFailed
from veneer_loadtest.load.generator import LoadOutcome, generate
from veneer_loadtest.load.spec import AdapterMix, Closed, Lengths, LoadSpec
from veneer_loadtest.load.targets import VeneerSpec
from veneer_loadtest.quantiles import median
from veneer_loadtest.report import spread
from veneer_loadtest.results import ChurnBy, ChurnFigures
from veneer_loadtest.setup import remove
from veneer_loadtest.workload import BaseSizes, make_adapter

NAMES: Final = ("churn-0", "churn-1")
"""Adapters published before the phases, then replaced in turn."""

SETTLE_S: Final = 2.0
"""Seconds from a phase's start until prompts are prefilled and all streams decode."""
_TAIL: Final = 3
"""Steps after an activation that count as part of it: its copies may slow them down."""
_TOKENS: Final = 1900
_LONGEST_S: Final = 30.0
"""Phases without two tokens are doubled until they are this long, or eight times the requested
length if that is longer."""
EVERY_S: Final = 1.0


Window = tuple[float, float]
"""Beginning and end, in seconds of ``time.monotonic()``."""

Bring = Callable[[int], Awaitable[Window | None]]
"""Function that brings the adapter with that number to DEVICE and returns how long it took, or
None if no adapter is left."""


@dataclass(frozen=True, slots=True)
class ChurnOptions:
    """Options of a churn measurement.

    Attributes:
        adapters: adapters that the streams use in turn; already published.
        phase_s: seconds of each phase, after it has settled.
        phases: number of phases of each kind.
        context: length of the server's context, in tokens.
        by: how a churn phase brings adapters to DEVICE.
    """

    base: BaseSizes
    adapters: tuple[str, ...]
    rank: int
    phase_s: float
    phases: int
    context: int
    seed: int
    by: ChurnBy = "upload"
    streams: int = 4


@dataclass(frozen=True, slots=True)
class ChurnPhase:
    """Measurements of one phase.

    Attributes:
        arrivals: when tokens arrived, by stream; seconds of ``time.monotonic()``.
        windows: each upload or activation, from its start until the adapter is active.
    """

    begin: float
    arrivals: Sequence[np.ndarray[tuple[int], np.dtype[np.float64]]]
    windows: Sequence[Window]


async def churn(
    client: AsyncClient,
    options: ChurnOptions,
    folder: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> ChurnFigures | None:
    """Run all phases and return their figures; delete the adapters published for them.

    Args:
        stopped: called before each phase; True ends the phases. The result is None
            unless there was a phase of each kind.

    Raises:
        TargetFailed: a stream failed, or no stream produced two tokens even in longer phases.
    """
    numbers = count()

    def make(number: int) -> Path:
        seed = options.seed * 100_000 + number
        return make_adapter(
            folder / f"churn-{number}", options.base, rank=options.rank, seed=seed
        )

    async def made(phase_s: float, *, more: int = 0) -> list[Path]:
        """Make the adapters that a phase needs, and ``more``."""
        uploaded = int(phase_s / EVERY_S) + 1 if options.by == "upload" else 0
        wanted = list(islice(numbers, uploaded + more))
        return await asyncio.to_thread(lambda: [make(number) for number in wanted])

    uploads: Iterator[Path] = iter(await made(0.0, more=len(NAMES)))
    for _ in range(options.phases):
        uploads = chain(uploads, await made(options.phase_s))
    order = [kind for n in range(options.phases) for kind in _pair(n)]
    quiet: list[ChurnPhase] = []
    churned: list[ChurnPhase] = []

    async def bring(number: int) -> Window | None:
        return await _bring(client, NAMES[number % len(NAMES)], uploads, options.by)

    async with published(client, NAMES, uploads):
        for number, kind in enumerate(order):
            if stopped():
                break
            found = await _phase(client, options, number, bring if kind == "churn" else None)
            (churned if kind == "churn" else quiet).append(found)
        # On a slow machine, no stream may have produced two tokens in a phase.
        longer = options
        while quiet and churned and not (measured(quiet) and measured(churned, inside=True)):
            if stopped():
                return None
            if longer.phase_s >= max(_LONGEST_S, 8 * options.phase_s):
                raise TargetFailed(
                    f"no stream produced two tokens within {longer.phase_s:g} s, with or "
                    "without adapters arriving: use a longer --churn, or a less busy machine"
                )
            longer = replace(longer, phase_s=2 * longer.phase_s)
            if measured(quiet):
                uploads = chain(uploads, await made(longer.phase_s))
                churned.append(await _phase(client, longer, len(order), bring))
            else:
                quiet.append(await _phase(client, longer, len(order), None))
    return figures(options.streams, quiet, churned, options.by) if quiet and churned else None


def _pair(number: int) -> tuple[str, str]:
    return ("quiet", "churn") if number % 2 == 0 else ("churn", "quiet")


@asynccontextmanager
async def published(
    client: AsyncClient, names: Sequence[str], folders: Iterator[Path]
) -> AsyncIterator[None]:
    """Publish a first revision under each name; delete them at the end.

    Raises:
        AdapterExists: a name is taken; that adapter stays as it is.
    """
    async with AsyncExitStack() as new:
        for name in names:
            if (await client.push(next(folders), name)).published:
                new.push_async_callback(remove, client, name)
        yield


async def _phase(
    client: AsyncClient, options: ChurnOptions, number: int, bring: Bring | None
) -> ChurnPhase:
    load = LoadSpec(
        adapters=options.adapters,
        arrivals=Closed(options.streams),
        popularity=AdapterMix("roundrobin"),
        prompt_tokens=Lengths(16, 64),
        # So long that few prompts are prefilled within a phase.
        tokens=Lengths(*[min(_TOKENS, options.context - 64)] * 2),
        duration_s=0.0,
        warmup_s=0.0,
        requests=0,
        cancel_share=0.0,
        seed=options.seed * 1000 + number,
        vocab=options.base.vocab,
    )
    stop = asyncio.Event()
    began = asyncio.Event()

    def on_progress(loaded: LoadOutcome) -> None:
        if sum(loaded.sent.values()) >= options.streams:
            began.set()

    waiting = asyncio.create_task(began.wait())
    running = asyncio.create_task(
        generate(
            load,
            VeneerSpec(client.address),
            workers=1,
            timeout_s=3600.0,
            stop=stop,
            on_progress=on_progress,
        )
    )
    try:
        await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(SETTLE_S)
        begin = time.monotonic()
        windows = await _windows(bring, begin + options.phase_s)
    finally:
        waiting.cancel()
        stop.set()
        loaded = await running
    for record in loaded.records:
        if record.outcome == "failed":
            raise TargetFailed(f"a stream running during the churn failed: {record.reason}")
    arrivals = [
        loaded.start + np.fromiter(record.arrivals_s(), dtype=np.float64)
        for record in loaded.records
    ]
    return ChurnPhase(begin, arrivals, windows)


async def _windows(bring: Bring | None, end: float) -> list[Window]:
    """Bring an adapter to DEVICE once a second until ``end``; wait for ``end`` without
    ``bring``, or when no adapter is left."""
    windows: list[Window] = []
    begin = time.monotonic()
    while bring is not None and (window := await bring(len(windows))) is not None:
        windows.append(window)
        await asyncio.sleep(max(0.0, begin + len(windows) * EVERY_S - time.monotonic()))
        if time.monotonic() >= end:
            return windows
    await asyncio.sleep(max(0.0, end - time.monotonic()))
    return windows


async def _bring(
    client: AsyncClient, name: str, uploads: Iterator[Path], by: ChurnBy
) -> Window | None:
    if by == "load":
        await client.evict(name)
        begin = time.monotonic()
        await client.activate(name)
    else:
        if (folder := next(uploads, None)) is None:
            return None
        begin = time.monotonic()
        await client.push(folder, name, allow_replace=True, activate=True)
    return begin, time.monotonic()


def figures(
    streams: int,
    quiet: Sequence[ChurnPhase],
    churned: Sequence[ChurnPhase],
    by: ChurnBy = "upload",
) -> ChurnFigures:
    """Compute the figures of the phases, in milliseconds."""
    calm = np.concatenate([_gaps(phase)[0] for phase in quiet])
    parts = [_gaps(phase) for phase in churned]
    inside = np.concatenate([gaps[within] for gaps, within in parts])
    outside = np.concatenate([gaps[~within] for gaps, within in parts])
    longest = float(inside.max())
    windows = [window for phase in churned for window in phase.windows]
    return ChurnFigures(
        by=by,
        streams=streams,
        publishes=len(windows),
        publish_ms=spread([end - begin for begin, end in windows]),
        quiet_ms=spread(calm),
        inside_ms=spread(inside),
        outside_ms=spread(outside) if len(outside) else None,
        quiet_gaps=len(calm),
        inside_gaps=len(inside),
        longest_ms=longest * 1e3,
        # Where most tokens arrive together, the median gap is 0.
        steps=longest / (median(calm) or float(calm.mean())),
    )


Gaps = tuple[
    np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.bool_]]
]


def measured(phases: Sequence[ChurnPhase], *, inside: bool = False) -> bool:
    """Return whether any gap between tokens is longer than 0, or with ``inside`` whether
    there is any gap within a window."""
    return any(
        bool(within.any() if inside else gaps.any())
        for phase in phases
        for gaps, within in (_gaps(phase),)
    )


def _gaps(phase: ChurnPhase) -> Gaps:
    """Return the gaps between tokens of all streams since the phase began, in seconds, and
    for each gap whether it overlaps a window or is one of the few after it."""
    gaps, within = [], []
    for arrivals in phase.arrivals:
        times = arrivals[arrivals >= phase.begin]
        before, after = times[:-1], times[1:]
        touches = np.zeros(len(after), dtype=np.bool_)
        for begin, end in phase.windows:
            if not len(before) or before[0] > end:
                continue  # this stream began after the window
            first = int(np.searchsorted(after, begin))
            last = int(np.searchsorted(before, end, side="right")) + _TAIL
            touches[first:last] = True
        gaps.append(after - before)
        within.append(touches)
    if not gaps:  # a machine so slow that no request ended in the phase
        return np.zeros(0), np.zeros(0, dtype=np.bool_)
    return np.concatenate(gaps), np.concatenate(within)
