"""The front's view of the engine: an async facade over the engine process.

`EngineClient` turns the engine's messages into one async iterator per sequence. It
deals in token ids only, and knows no model names or text. `Supervisor` keeps the
process running; `OutputStream` buffers output that a reader has not read yet.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import msgspec
from veneer_registry.errors import (
    EngineFailed,
    ModelLoading,
    QueueFull,
    VeneerError,
    error_for_reason,
)

from veneer_server.engine_client.places import Place, Places, Refusal, Seat
from veneer_server.engine_client.resident_set import Resident, ResidentSet
from veneer_server.engine_client.streams import OutputStream
from veneer_server.engine_client.supervisor import Supervisor
from veneer_server.wire.messages import (
    Activate,
    AdapterFailed,
    AdapterLoaded,
    AdapterSource,
    BudgetsState,
    Cancel,
    ConstraintDone,
    EngineConfig,
    EngineInfo,
    Evict,
    Evicted,
    EvictMode,
    FromEngine,
    MatcherEnded,
    MemoryTier,
    Occupancy,
    OperationDone,
    Pause,
    Prefilled,
    Reference,
    ResetPrefixCache,
    ResidencyChanged,
    SequenceFailed,
    SequenceOutput,
    SequenceRequest,
    StepDone,
    Submit,
    ToEngine,
    Unpin,
    UpdateBudgets,
    WireError,
)

EngineEvent = (
    StepDone
    | Occupancy
    | ResidencyChanged
    | AdapterLoaded
    | AdapterFailed
    | Evicted
    | ConstraintDone
    | MatcherEnded
)
"""The events that a listener (metrics) receives, on the front's event loop."""


class TokenCounter(Protocol):
    """Counts the tokens computed for a sequence, whether or not its caller is still there."""

    def prefilled(self, tokens: int, cached: int) -> None:
        """Record that the first ``tokens`` tokens of the prompt are done: ``cached`` of them
        were found in the prefix cache, the others computed."""

    def unread(self, tokens: int) -> None:
        """Record that ``tokens`` new output tokens arrived that nobody will read."""


class EngineClient:
    """Sends requests and operations to the engine. All methods belong to one event loop.

    Contract: every `generate` iterator ends with its last `SequenceOutput` (with
    ``finish`` set), with a `VeneerError`, or by being closed (which cancels the
    sequence in the engine). `EngineFailed` is raised into every open iterator
    and operation when the process dies; the process is then restarted.

    Attributes:
        info: the running engine's description of itself; set by `start`.
        places: the requests' places among the running and waiting sequences.
        paused: whether the engine must run no step, see `pause`.
        quantization, tensor_parallel: as configured.
    """

    info: EngineInfo

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_queue: int,
        max_wait_s: float = 0.0,
        on_refused: Callable[[str, Refusal], None] = lambda tenant, why: None,
        on_event: Callable[[EngineEvent], None] = lambda event: None,
        on_health: Callable[[bool], None] = lambda healthy: None,
        hold: Callable[[AdapterSource], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Args:
        max_queue, max_wait_s, on_refused: see `Places`.
        on_event: called with each change in the engine.
        on_health: called when `healthy` changes.
        hold: keeps an adapter's files while a restarted engine reads them again;
            raises `VeneerError` if the adapter is gone.
        """
        self.places = Places(
            config.max_running, max_queue, max_wait_s=max_wait_s, on_refused=on_refused
        )
        self._on_event = on_event
        self._supervisor = Supervisor(
            config,
            on_message=self.receive,
            on_up=self._up,
            on_down=self.fail_everything,
            on_health=on_health,
        )
        self.paused = False
        self.quantization, self.tensor_parallel = config.quantization, config.tensor_parallel
        self._numbers = itertools.count(1)
        self._streams: dict[int, OutputStream] = {}
        self._seats: dict[int, Seat] = {}
        """Seats by sequence, until the engine has ended the sequence."""
        self._counts: dict[int, tuple[TokenCounter, int]] = {}
        """(counter, tokens of the prompt) by sequence, for first samples. Kept until the
        sequence's last message, even if the caller has left."""
        self._operations: dict[int, asyncio.Future[OperationDone]] = {}
        self._residents = ResidentSet(
            host_budget=config.host_adapter_bytes,
            device_budget=config.device_adapter_bytes,
            activate=self._activate,
            hold=hold,
        )

    # ------------------------------------------------------------------ lifecycle

    @property
    def starts(self) -> int:
        """How often the engine process was started."""
        return self._supervisor.starts

    @property
    def healthy(self) -> bool:
        """Whether the process is up and its step loop answered the last ping in time."""
        return self._supervisor.healthy

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        connection = self._supervisor.connection
        return None if connection is None else connection.pid

    @property
    def in_flight(self) -> int:
        """Number of unfinished sequences."""
        return len(self._streams)

    async def start(self) -> EngineInfo:
        """Start the process and wait until it has loaded the base model.

        Raises:
            EngineFailed: the process ended before it was ready; its log on stderr says why.
        """
        await self._supervisor.start()
        return self.info

    async def stop(self) -> None:
        """End the process; open iterators get `EngineFailed`. Idempotent."""
        await self._supervisor.stop()

    def _up(self, info: EngineInfo) -> None:
        self.info = info
        if self.paused:  # before the process is asked for anything else
            self._supervisor.write(Pause(next(self._numbers), paused=True))
        self._residents.restore(info.adapter_itemsize)

    # ------------------------------------------------------------------ messages

    def receive(self, message: FromEngine) -> None:
        """Deliver a message from the engine to its recipient."""
        match message:
            case SequenceOutput():
                if message.step and (counted := self._counts.get(message.sequence)) is not None:
                    counts, tokens = counted
                    counts.prefilled(tokens, message.cached_tokens)
                if (seat := self._seats.get(message.sequence)) is not None:
                    self.places.started(seat)
                if (stream := self._streams.get(message.sequence)) is not None:
                    stream.put(message)
                if message.finish is not None:
                    self._ended(message.sequence)
            case Prefilled():
                if (counted := self._counts.get(message.sequence)) is not None:
                    counted[0].prefilled(message.tokens, message.cached_tokens)
            case SequenceFailed():
                if (stream := self._streams.get(message.sequence)) is not None:
                    stream.fail(_rebuild(message.error))
                self._ended(message.sequence)
            case OperationDone():
                if message.budgets is not None:
                    self._take_budgets(message.budgets)  # even if no caller waits any more
                waiting = self._operations.pop(message.operation, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            case ResidencyChanged():
                self._residents.update(message)
                self._on_event(message)
            case Occupancy():
                self._residents.occupancy(message)
                self._on_event(message)
            case StepDone():
                self.places.estimate.step(message)
                self._on_event(message)
            case (
                AdapterLoaded()
                | AdapterFailed()
                | Evicted()
                | ConstraintDone()
                | MatcherEnded()
            ):
                self._on_event(message)

    def _ended(self, number: int) -> None:
        """Free the place of a sequence that the engine has ended, even if nobody reads its
        outputs."""
        self._counts.pop(number, None)
        if (seat := self._seats.pop(number, None)) is not None:
            self.places.ended(seat)

    def fail_everything(self, error: VeneerError) -> None:
        """Fail all requests and operations after the process has ended, and report its adapters
        as gone."""
        self.places.estimate.restart()
        self.places.fail(error)
        self._counts.clear()
        for stream in self._streams.values():
            stream.fail(error)
        for waiting in self._operations.values():
            if not waiting.done():
                waiting.set_exception(error)
        self._operations.clear()
        # Nothing is resident any more: tell the listener, so that gauges fall.
        for change in self._residents.lose():
            self._on_event(change)

    # ------------------------------------------------------------------ requests

    async def generate(
        self,
        request: SequenceRequest,
        place: Place | None = None,
        *,
        sibling: bool = False,
        counts: TokenCounter | None = None,
    ) -> AsyncGenerator[SequenceOutput, None]:
        """Submit a sequence, and yield a `SequenceOutput` for each step in which it took part.
        Outputs that a slow reader has not read yet are joined. The first output's
        ``queue_seconds`` count from the first iteration.

        The caller holds a place for its request, see `Places`; a further sample first waits
        for its own place. Raises `EngineFailed` (process down, being restarted) or
        `ModelLoading` at the first iteration, and `QueueFull` if the request is refused before
        its first output. Use ``contextlib.aclosing`` so that leaving the loop early cancels
        the sequence.

        Args:
            place: the request's place; None to submit without one.
            sibling: see `Places.turn`. The prompt of a sibling is not counted again.
            counts: counts the computed and unread tokens.
        """
        seat = None if place is None else self.places.take(place)
        asked, ended = time.monotonic(), False
        while not ended:
            self._check_ready()
            while place is not None and (seat is None or seat.returned):
                seat = await self.places.turn(place, sibling=sibling, after=seat)
                request = msgspec.structs.replace(request, arrived=place.since)
            try:
                if place is not None:
                    place.check()
                self._check_ready()  # again, since it may have waited
                if request.adapter is not None:
                    self._residents.used(request.adapter)
                number, stream = next(self._numbers), OutputStream()
                self._streams[number] = stream
                if seat is not None:
                    seat.stream = stream
                    self.places.resolved(seat.place, request, self.info.parameters)
                    self._seats[number] = seat
                count = 0
                if counts is not None and not sibling:
                    self._counts[number] = counts, len(request.prompt)
                try:
                    self._supervisor.write(Submit(number, request))
                    while not ended:
                        output = await stream.get()
                        if output.queue_seconds and request.arrived is not None:
                            # The engine counts from the request's arrival.
                            waited = output.queue_seconds - (asked - request.arrived)
                            output = msgspec.structs.replace(
                                output, queue_seconds=max(0.0, waited)
                            )
                        count += len(output.tokens)
                        ended = output.finish is not None
                        if output.finish in ("stop", "length"):
                            self.places.estimate.ended(count)
                        yield output
                finally:
                    if counts is not None and stream.unread:
                        counts.unread(stream.unread)
                    del self._streams[number]
                    self._seats.pop(number, None)
                    if not ended:
                        # A no-op if the engine has ended the sequence itself.
                        self._supervisor.write(Cancel(number))
            except QueueFull:
                if seat is None or not seat.returned:
                    raise
            finally:
                if seat is not None:
                    self.places.leave(seat)

    async def activate(self, adapter: AdapterSource, *, tier: MemoryTier, pin: bool) -> bool:
        """Load an adapter into a tier. Raises the load's error if it fails.

        Returns:
            Whether the adapter is pinned as requested: another call may have removed the pin
            while this one waited for the load.
        """
        self._residents.used(adapter)
        await self._activate(adapter, tier, pin)
        now = self._residents.tier(adapter.weights_digest)
        if not pin or now is None or not now.pinned:
            return False
        self._residents.pinned(adapter, tier)
        return True

    async def _activate(self, adapter: AdapterSource, tier: MemoryTier, pin: bool) -> None:
        await self._operate(lambda number: Activate(number, adapter, tier, pin))

    async def evict(
        self,
        weights_digest: str,
        *,
        mode: EvictMode,
        unpin: bool,
    ) -> tuple[bool, int]:
        """Evict an adapter; return (whether it is evicted now, bytes freed), see
        `messages.Evict`. An eviction that has begun is carried out whether or not the caller
        waits.

        Raises:
            AdapterInUse, AdapterPinned
        """
        with self._residents.giving_up(weights_digest, unpin=unpin):
            done = await self._operate(
                lambda number: Evict(number, weights_digest, mode, unpin)
            )
        return done.done, done.freed_bytes

    async def unpin(self, weights_digest: str) -> None:
        """Remove an adapter's pin; it stays in memory until room is needed."""
        self._residents.unpinned(weights_digest)
        await self._operate(lambda number: Unpin(number, weights_digest))

    async def reference(self, tokens: list[int], adapter: AdapterSource | None) -> list[float]:
        """Compute the log-probability of each token after the first. The engine does so
        independently of serving: in float32, one reference at a time and at low priority, from
        the base's and the adapter's files. The caller must keep the files until this returns.

        Raises:
            AdapterCorrupt: the files no longer match their digest.
        """
        done = await self._operate(lambda number: Reference(number, tokens, adapter))
        assert done.logprobs is not None
        return done.logprobs

    async def update_budgets(
        self, *, host_bytes: int | None, device_bytes: int | None
    ) -> BudgetsState:
        """Change the bytes that adapters may take in memory; None leaves a budget as it is.
        The new budgets also apply after a restart of the engine.

        If a budget is lowered, unused adapters beyond it are evicted at once, and the rest when
        the requests that use them have ended. A waiting request whose adapter can no longer fit
        ends with `AdapterBudgetExceeded`.

        Raises:
            AdapterBudgetExceeded: pinned adapters alone take more, or the backend reserved less
                device memory when it started. Nothing has changed.
        """
        self._residents.check_budgets(host=host_bytes, device=device_bytes)
        done = await self._operate(
            lambda number: UpdateBudgets(number, host_bytes, device_bytes)
        )
        assert done.budgets is not None
        return done.budgets

    async def pause(self, paused: bool) -> None:
        """Pause the engine, or resume it if ``paused`` is False; see `Pause`. No step runs
        between the return of a pause and the next resume, even if the engine restarts. Raises
        if there is no engine to pause."""
        if paused:
            self._check_ready()
        self.paused = paused
        if self._supervisor.connection is not None:  # otherwise it starts without a pause
            await self._operate(lambda number: Pause(number, paused))

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache; see `ResetPrefixCache`."""
        await self._operate(ResetPrefixCache)

    def _take_budgets(self, budgets: BudgetsState) -> None:
        host, device = budgets.host_budget, budgets.device_budget
        self._residents.set_budgets(host=host, device=device)
        self._supervisor.reconfigure(host_adapter_bytes=host, device_adapter_bytes=device)

    async def _operate(self, build: Callable[[int], ToEngine]) -> OperationDone:
        self._check_ready()
        number = next(self._numbers)
        waiting: asyncio.Future[OperationDone] = asyncio.get_running_loop().create_future()
        self._operations[number] = waiting
        try:
            self._supervisor.write(build(number))
            done = await waiting
        finally:
            self._operations.pop(number, None)
        if done.error is not None:
            raise _rebuild(done.error)
        return done

    def tier(self, weights_digest: str) -> ResidencyChanged | None:
        """Last known residency of an adapter, or None if it is only on disk."""
        return self._residents.tier(weights_digest)

    def resident(self) -> list[str]:
        """Weights digests of the adapters in memory, most recently used first."""
        return self._residents.in_memory()

    @property
    def residents_version(self) -> int:
        """Increases whenever the adapters, tiers or pins of `resident_set` change."""
        return self._residents.version

    def resident_set(self) -> tuple[Resident, ...]:
        """Adapters in memory or being restored, most recently used first."""
        return self._residents.snapshot()

    def expect_residents(self, residents: Iterable[Resident]) -> None:
        """Restore the `resident_set` of the server's last run, as after a restart of the
        engine. Call before `start`."""
        self._residents.expect(residents)

    def _check_ready(self) -> None:
        if self._supervisor.connection is not None:
            return
        if not self._supervisor.started:
            raise ModelLoading("the base model is still loading: retry", retry_after_s=2.0)
        raise EngineFailed("the engine process is restarting: retry", retry_after_s=2.0)


def _rebuild(error: WireError) -> VeneerError:
    return error_for_reason(error.reason)(
        error.message, metadata=error.metadata, retry_after_s=error.retry_after_s
    )
