"""The front's view of the engine: an async facade over the engine process.

`EngineClient` starts the process, keeps the socket, restarts it when it dies,
and turns its messages into one async iterator a request. It knows no names and
no text: token ids in, token ids out.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import Literal

import msgspec
from veneer_registry.errors import (
    EngineFailed,
    ModelLoading,
    QueueFull,
    VeneerError,
    error_for_reason,
)

from veneer_server.engine.messages import (
    LENGTH,
    Activate,
    AdapterFailed,
    AdapterLoaded,
    AdapterSource,
    Cancel,
    EngineConfig,
    EngineInfo,
    Evict,
    Evicted,
    FromEngine,
    Occupancy,
    OperationDone,
    Ping,
    Pong,
    Residency,
    SamplingParams,
    SequenceFailed,
    SequenceOutput,
    StepDone,
    Stop,
    Submit,
    ToEngine,
    Unpin,
    WireError,
    decode_from_engine,
    encode,
)

__all__ = ["EngineClient", "EngineEvent"]

log = logging.getLogger(__name__)

EngineEvent = StepDone | Occupancy | Residency | AdapterLoaded | AdapterFailed | Evicted
"""What a listener (metrics) is told, in the front's event loop."""

PING_SECONDS = 1.0
SILENCE_SECONDS = 5.0
"""Without an answer to a ping for this long (or four times the longest recent
step, if that is more) the engine counts as not healthy."""
HANG_FACTOR = 12
"""After this many times the silence limit a silent engine is killed."""
STOP_SECONDS = 5.0
"""How long a process may take to end before it is killed."""
FIRST_BACKOFF, LAST_BACKOFF = 0.2, 30.0


class EngineClient:
    """Owns the engine process. All methods belong to one asyncio event loop.

    Contract: every `generate` iterator ends: by its last `SequenceOutput` (with
    ``finish`` set), by a `VeneerError`, or by being closed (which cancels the
    sequence in the engine). `EngineFailed` is raised into every open iterator
    and operation when the process dies; the process is then started again.

    Attributes:
        info: what the running engine said of itself; after `start`.
        starts: times the engine process was started.
        healthy: the process is up and its step loop answered the last ping in time.
        process: the running process, if any.
    """

    info: EngineInfo

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_queue: int,
        on_event: Callable[[EngineEvent], None] = lambda event: None,
        on_health: Callable[[bool], None] = lambda healthy: None,
    ) -> None:
        self._config = config
        self._capacity = config.max_running + max_queue
        self._on_event = on_event
        self._on_health = on_health
        self.starts = 0
        self.healthy = False
        self.process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = itertools.count(1)
        self._streams: dict[int, asyncio.Queue[SequenceOutput | VeneerError]] = {}
        self._operations: dict[int, asyncio.Future[OperationDone]] = {}
        self._residency: dict[str, Residency] = {}
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self._heard = 0.0
        self._longest_step = 0.0

    # ------------------------------------------------------------------ lifecycle

    async def start(self) -> EngineInfo:
        """Start the process and wait until it has loaded the base model.

        Raises:
            EngineFailed: it ended before it was ready; its own words are on stderr.
        """
        reader = await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(reader), name="engine")
        return self.info

    async def stop(self) -> None:
        """End the process; open iterators get `EngineFailed`. Harmless to repeat."""
        self._stopping = True
        self._set_health(False)
        if self._writer is None and self.process is not None:
            self.process.kill()  # still loading: it would not hear Stop for seconds
        self._write(Stop())
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._fail_everything(EngineFailed("the server is stopping"))
        await self._bury()

    async def _launch(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "veneer_server.engine.process",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                env=_environment(),
            )
        self.starts += 1
        reader, writer = await asyncio.open_connection(sock=ours)
        config = msgspec.msgpack.encode(self._config)
        writer.write(LENGTH.pack(len(config)) + config)
        messages = await _next_frame(reader)
        if not messages or not isinstance(messages[0], EngineInfo):
            writer.close()
            await self._bury()
            raise EngineFailed(
                "the engine process ended while loading the base model; its log says why"
            )
        self.info = messages[0]
        self._writer = writer
        self._residency.clear()
        self._heard = asyncio.get_running_loop().time()
        self._longest_step = 0.0
        self._set_health(True)
        return reader

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        """Serve the process; when it dies, fail what it ran and start another."""
        backoff = FIRST_BACKOFF
        while True:
            pinger = asyncio.create_task(self._ping(), name="engine-ping")
            try:
                await self._receive(reader)
            finally:
                pinger.cancel()
            self._writer = None
            self._set_health(False)
            await self._bury()
            error = EngineFailed(
                "the engine process ended and is being started again; retry",
                retry_after_s=2.0,
            )
            self._fail_everything(error)
            while True:
                log.error("engine process ended; starting it again in %.1f s", backoff)
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, LAST_BACKOFF)
                try:
                    reader = await self._launch()
                except EngineFailed as failure:
                    log.error("%s", failure)
                    continue
                backoff = FIRST_BACKOFF
                break

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        """Dispatch frames until the socket closes."""
        while messages := await _next_frame(reader):
            for message in messages:
                self._dispatch(message)

    async def _ping(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._write(Ping(next(self._numbers)))
            await asyncio.sleep(PING_SECONDS)
            silence = loop.time() - self._heard
            limit = max(SILENCE_SECONDS, 4 * self._longest_step)
            self._set_health(silence < limit)
            if silence > HANG_FACTOR * limit and self.process is not None:
                log.error("engine silent for %.0f s: killing it", silence)
                self.process.kill()

    async def _bury(self) -> None:
        """Wait for the process to end; kill it after a few seconds."""
        process, self.process = self.process, None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if process is None:
            return
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()

    def _set_health(self, healthy: bool) -> None:
        if healthy != self.healthy:
            self.healthy = healthy
            self._on_health(healthy)

    # ------------------------------------------------------------------ messages

    def _write(self, message: ToEngine) -> None:
        if self._writer is not None:
            self._writer.write(encode([message]))

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case SequenceOutput():
                stream = self._streams.get(message.sequence)
                if stream is not None:
                    stream.put_nowait(message)
            case SequenceFailed():
                stream = self._streams.get(message.sequence)
                if stream is not None:
                    stream.put_nowait(_rebuild(message.error))
            case OperationDone():
                waiting = self._operations.pop(message.operation, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            case Pong():
                self._heard = asyncio.get_running_loop().time()
            case EngineInfo():
                self.info = message
            case _:
                self._track(message)
                self._on_event(message)

    def _track(self, event: EngineEvent) -> None:
        if isinstance(event, StepDone):
            self._longest_step = max(event.seconds, 0.9 * self._longest_step)
        elif isinstance(event, Residency):
            if event.tier == "disk" and not event.pinned:
                self._residency.pop(event.weights_digest, None)
            else:
                self._residency[event.weights_digest] = event

    def _fail_everything(self, error: VeneerError) -> None:
        for stream in self._streams.values():
            stream.put_nowait(error)
        for waiting in self._operations.values():
            if not waiting.done():
                waiting.set_exception(error)
        self._operations.clear()
        # Nothing is resident any more: tell the listener, so that gauges fall.
        for residency in self._residency.values():
            self._on_event(
                msgspec.structs.replace(
                    residency,
                    tier="disk",
                    pinned=False,
                    host_bytes=0,
                    device_bytes=0,
                    host_count=0,
                    device_count=0,
                )
            )
        self._residency.clear()

    # ------------------------------------------------------------------ requests

    @property
    def in_flight(self) -> int:
        """Sequences submitted and not ended."""
        return len(self._streams)

    async def generate(
        self,
        prompt: list[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        adapter: AdapterSource | None = None,
        ignore_eos: bool = False,
        logprobs: bool = False,
        prompt_logprobs: bool = False,
    ) -> AsyncIterator[SequenceOutput]:
        """Submit a sequence; a `SequenceOutput` for each step it took part in. Outputs
        that wait when the caller comes back (a slow reader) are joined into one.

        Raises, at the first iteration, `QueueFull` (as many in flight as may run
        and wait), `EngineFailed` (process down, being started again),
        `ModelLoading`. Use ``contextlib.aclosing`` so that leaving the loop early
        cancels the sequence.
        """
        self._check_ready()
        if len(self._streams) >= self._capacity:
            raise QueueFull(
                f"{len(self._streams)} requests are running or waiting; retry later, or "
                "start the server with a larger --max-queue",
                retry_after_s=1.0,
            )
        number = next(self._numbers)
        stream: asyncio.Queue[SequenceOutput | VeneerError] = asyncio.Queue()
        self._streams[number] = stream
        ended = False
        try:
            self._write(
                Submit(
                    sequence=number,
                    prompt=prompt,
                    max_tokens=max_tokens,
                    sampling=sampling,
                    adapter=adapter,
                    ignore_eos=ignore_eos,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                )
            )
            while not ended:
                output = await stream.get()
                while isinstance(output, SequenceOutput) and not stream.empty():
                    following = stream.get_nowait()
                    if isinstance(following, VeneerError):
                        stream.put_nowait(following)  # the last there is: it keeps its turn
                        break
                    output = _joined(output, following)
                if isinstance(output, VeneerError):
                    ended = True
                    raise output
                ended = output.finish is not None
                yield output
        finally:
            del self._streams[number]
            if not ended:
                self._write(Cancel(number))

    async def activate(
        self, adapter: AdapterSource, *, tier: Literal["host", "device"], pin: bool
    ) -> None:
        """Bring an adapter to a tier; raises what the load raised."""
        await self._operate(lambda number: Activate(number, adapter, tier, pin))

    async def evict(
        self,
        weights_digest: str,
        *,
        mode: Literal["drain", "fail_if_busy", "abort"],
        unpin: bool,
    ) -> tuple[bool, int]:
        """(evicted now, bytes freed); raises AdapterInUse, AdapterPinned."""
        done = await self._operate(lambda number: Evict(number, weights_digest, mode, unpin))
        return done.done, done.freed_bytes

    async def unpin(self, weights_digest: str) -> None:
        """Remove an adapter's pin; it stays in memory until room is needed."""
        await self._operate(lambda number: Unpin(number, weights_digest))

    async def _operate(self, build: Callable[[int], ToEngine]) -> OperationDone:
        self._check_ready()
        number = next(self._numbers)
        waiting: asyncio.Future[OperationDone] = asyncio.get_running_loop().create_future()
        self._operations[number] = waiting
        try:
            self._write(build(number))
            done = await waiting
        finally:
            self._operations.pop(number, None)
        if done.error is not None:
            raise _rebuild(done.error)
        return done

    def tier(self, weights_digest: str) -> Residency | None:
        """Last known residency of an adapter, or None where it is on disk only."""
        return self._residency.get(weights_digest)

    def _check_ready(self) -> None:
        if self._writer is not None:
            return
        if self.starts <= 1 and not self._stopping and self._supervisor is None:
            raise ModelLoading("the base model is still loading; retry", retry_after_s=2.0)
        raise EngineFailed(
            "the engine process is being started again; retry", retry_after_s=2.0
        )


def _environment() -> dict[str, str]:
    """The engine's environment: OpenMP threads sleep at barriers unless told otherwise.

    Spinning is a little faster on an idle machine, but beside one busy process on
    two cores it makes a step three times as long, and the front is such a process.
    """
    return {"OMP_WAIT_POLICY": "passive", **os.environ}


def _rebuild(error: WireError) -> VeneerError:
    return error_for_reason(error.reason)(
        error.message, metadata=error.metadata, retry_after_s=error.retry_after_s
    )


def _joined(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    """Two outputs in a row as one; what only a first output has stays."""
    logprobs = first.logprobs
    if logprobs is not None and second.logprobs is not None:
        logprobs = logprobs + second.logprobs
    return msgspec.structs.replace(
        first, tokens=first.tokens + second.tokens, logprobs=logprobs, finish=second.finish
    )


async def _next_frame(reader: asyncio.StreamReader) -> list[FromEngine]:
    """The messages of the next frame; none when the other side has closed."""
    try:
        (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return decode_from_engine(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return []
