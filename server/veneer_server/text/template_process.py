"""Adapters' chat templates run in processes of their own, which may be killed.

A sandbox keeps a template from reaching anything, but not from looping for ever
or doubling a string until memory ends, and a thread that does so cannot be
stopped. So the operator's own template (the base's) is rendered in the front, and
templates that came by upload are rendered here, under limits of memory and time.

There are two processes. In the quick one a rendering may take `QUICK_LIMIT_S`; a template
that takes longer goes on in the slow one, at low priority and up to `RENDER_LIMIT_S`, and
so do its next ones for a while. In both, templates take turns. So a slow template delays
itself and other slow ones, and others by a quarter of a second at most, once.

Frames on stdin and stdout: a 4-byte big-endian length, then MessagePack.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import resource
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import BinaryIO, Final

import msgspec
from veneer_registry.child_python import child_python
from veneer_registry.errors import QueueFull, TemplateFailed

from veneer_server.fair_queue import FairQueue
from veneer_server.logs import get_logger
from veneer_server.priority import lower_priority
from veneer_server.recent import Recent
from veneer_server.text.template import MAX_ERROR, MAX_OUTPUT, ChatTemplate

__all__ = ["RENDER_LIMIT_S", "TemplateProcesses"]

RENDER_LIMIT_S: Final = 2.0
"""Processor seconds that one rendering may take: a busy machine must not make a
good template look bad."""

QUICK_LIMIT_S: Final = 0.25
"""The same for a template that has not been slow."""

SLOW_FOR_S: Final = 60.0
"""How long a template counts as slow, or is refused where it was killed by the clock."""

MAX_WAITING: Final = 64
"""Renderings of one template that may wait."""

MEMORY_LIMIT: Final = 512 << 20
"""Address space of a process, in bytes; an idle one takes about 100 MB."""

MAX_ANSWER: Final = 4 * (MAX_OUTPUT + 2 * MAX_ERROR)
"""Bytes of an answer; the front reads no more, whatever the process sends."""

_TRIES: Final = 2
"""Of a rendering whose process was killed by something else."""

_WALL_FACTOR: Final = 15
_WALL_LEAST_S: Final = 5.0
"""A process that is started takes a part of it."""
_LENGTH: Final = struct.Struct(">I")
_COMPILED: Final = 64
_REMEMBERED: Final = 1000

_log = get_logger(__name__)


class _Job(msgspec.Struct, frozen=True, array_like=True):
    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, str]]


class _Done(msgspec.Struct, frozen=True, array_like=True):
    """Text or error is empty.

    Attributes:
        seconds: of the processor.
    """

    text: str
    error: str
    seconds: float = 0.0


class _Killed(Exception):
    """The process has been ended, by a limit or by us."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class _BadAnswer(Exception):
    """What the process sends is no answer: a template has taken it over."""


class TemplateProcesses:
    """The front's side. Belongs to one event loop.

    A process is started when it is first needed, and again after it had to be killed. A
    template that went past a limit is refused from then on; one that did not answer in
    time, for a while.
    """

    def __init__(
        self,
        special_tokens: Mapping[str, str],
        *,
        limit_s: float = RENDER_LIMIT_S,
        quick_limit_s: float = QUICK_LIMIT_S,
    ) -> None:
        self._special = dict(special_tokens)
        self._limit_s = limit_s
        self.quick = Worker(min(quick_limit_s, limit_s))
        self.slow = Worker(limit_s, low_priority=True)
        self._slow_until: Recent[bytes, float] = Recent(_REMEMBERED)
        self._refused: Recent[bytes, tuple[float, str]] = Recent(_REMEMBERED)
        """Until when, and why."""

    async def close(self) -> None:
        """End the processes."""
        await self.quick.close()
        await self.slow.close()

    async def render(self, source: str, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for an assistant's answer to ``messages`` (role, content).

        Raises:
            TemplateFailed: the template refuses these messages, or went past a limit.
            QueueFull: too many of this template wait.
        """
        key = hashlib.sha256(source.encode()).digest()
        job = _Job(source, self._special, [dict(message) for message in messages])
        tries = _TRIES
        try:
            done = await self._quickly(key, job)
        except _Killed:
            done, tries = None, tries - 1
        if done is None:
            done = await self._slowly(key, job, tries)
        if done.error:
            raise TemplateFailed(done.error)
        return done.text

    async def _quickly(self, key: bytes, job: _Job) -> _Done | None:
        """None where it is too slow for that. Raises _Killed from outside."""
        if self._is_slow(key):
            return None
        async with self.quick.turn(key):
            if self._is_slow(key):  # found out meanwhile
                return None
            self._check(key)
            try:
                return await self.quick.render(job)
            except _Killed as error:
                if error.cause == _TIME and self.quick.limit_s < self._limit_s:
                    self._slow_until[key] = _now() + SLOW_FOR_S
                    return None
                if error.cause == _FROM_OUTSIDE:
                    raise
                if error.cause == _CLOCK:
                    return None  # it may be the process or the machine
                raise self._refuse(key, error) from error

    async def _slowly(self, key: bytes, job: _Job, tries: int) -> _Done:
        async with self.slow.turn(key):
            self._check(key)
            done = await self._try(key, job, tries)
            if done.seconds > self.quick.limit_s:
                self._slow_until[key] = _now() + SLOW_FOR_S
            return done

    async def _try(self, key: bytes, job: _Job, tries: int) -> _Done:
        """Once, and again if something else killed the process."""
        while True:
            tries -= 1
            try:
                return await self.slow.render(job)
            except _Killed as error:
                if error.cause != _FROM_OUTSIDE or not tries:
                    raise self._refuse(key, error) from error

    def _is_slow(self, key: bytes) -> bool:
        return _now() < self._slow_until.get(key, 0.0)

    def _check(self, key: bytes) -> None:
        until, cause = self._refused.get(key, (0.0, ""))
        if _now() < until:
            raise self._failure(cause)

    def _refuse(self, key: bytes, error: _Killed) -> TemplateFailed:
        lasting = error.cause not in _PERHAPS_NOT_ITS_FAULT
        self._refused[key] = (
            float("inf") if lasting else _now() + SLOW_FOR_S,
            error.cause,
        )
        _log.warning("template killed", sha256=key.hex(), cause=error.cause)
        return self._failure(error.cause)

    def _failure(self, cause: str) -> TemplateFailed:
        if cause == _FROM_OUTSIDE:
            return TemplateFailed(
                "the process that renders the adapter's chat template was killed, as by a "
                f"machine without memory: retry after {SLOW_FOR_S:g} s, or send `prompt`"
            )
        return TemplateFailed(
            f"the adapter's chat template takes more than {self._limit_s:g} s or "
            f"{MEMORY_LIMIT >> 20} MiB: fix it and push the adapter again, or use "
            "`prompt`, which has none"
        )


def _now() -> float:
    return asyncio.get_running_loop().time()


_TIME: Final = "processor time"
_CLOCK: Final = "no answer in time"
_FROM_OUTSIDE: Final = "killed by something else"
_ENDED: Final = "it ended"
_PERHAPS_NOT_ITS_FAULT: Final = (_CLOCK, _FROM_OUTSIDE)
"""It may be the machine: such a template is tried again."""

_BY_OTHERS: Final = (-signal.SIGKILL, -signal.SIGTERM)


class Worker:
    """One process and the queue for it. Within `turn`, call `render`.

    Attributes:
        limit_s: processor seconds of a rendering.
    """

    def __init__(self, limit_s: float, *, low_priority: bool = False) -> None:
        self.limit_s = limit_s
        self.process: asyncio.subprocess.Process | None = None
        self._low_priority = low_priority
        self._busy = False
        self._queue: FairQueue[bytes, asyncio.Future[None]] = FairQueue()

    @contextlib.asynccontextmanager
    async def turn(self, key: bytes) -> AsyncIterator[None]:
        """Have the process to oneself; templates take turns. Raises QueueFull."""
        if self._busy:
            if self._queue.waiting(key) >= MAX_WAITING:
                raise QueueFull(
                    f"{MAX_WAITING} chats wait for the adapter's slow chat template: retry "
                    "later, or send `prompt`",
                    retry_after_s=self.limit_s,
                )
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.push(key, waiter)
            try:
                await waiter
            except BaseException:
                if waiter.done() and not waiter.cancelled():
                    self._next()
                else:
                    self._queue.remove(key, waiter)
                raise
        self._busy = True
        try:
            yield
        finally:
            self._next()

    def _next(self) -> None:
        """Give the turn to the next one; it stays busy until that is there."""
        while (waiter := self._queue.pop()) is not None:
            if not waiter.done():
                waiter.set_result(None)
                return
        self._busy = False

    async def close(self) -> None:
        """End the process."""
        async with self.turn(b""):
            await self._kill()

    async def render(self, job: _Job) -> _Done:
        """Raises _Killed."""
        process = await self._running()
        try:
            async with asyncio.timeout(max(self.limit_s * _WALL_FACTOR, _WALL_LEAST_S)):
                return await _exchange(process, job)
        except TimeoutError as error:
            await self._kill()
            raise _Killed(_CLOCK) from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            code = await self._ended()
            if code in _BY_OTHERS:
                raise _Killed(_FROM_OUTSIDE) from error
            raise _Killed(_TIME if code == -signal.SIGPROF else _ENDED) from error
        except _BadAnswer as error:
            await self._kill()
            raise _Killed(_ENDED) from error
        except BaseException:
            # Cancelled halfway: the answer would be taken for the next job's.
            await self._kill()
            raise

    async def _running(self) -> asyncio.subprocess.Process:
        if self.process is None or self.process.returncode is not None:
            self.process = await asyncio.create_subprocess_exec(
                *child_python("-m", __name__, str(self.limit_s)),
                *(("low-priority",) if self._low_priority else ()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        return self.process

    async def _ended(self) -> int | None:
        """The exit status of a process that closed a pipe; None if we had to kill it."""
        process, self.process = self.process, None
        assert process is not None, "it was running"
        try:
            return await asyncio.wait_for(process.wait(), 1.0)
        except TimeoutError:
            return None
        finally:
            await _end(process)

    async def _kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _exchange(process: asyncio.subprocess.Process, job: _Job) -> _Done:
    assert process.stdin is not None, "made with pipes"
    assert process.stdout is not None, "made with pipes"
    body = msgspec.msgpack.encode(job)
    process.stdin.write(_LENGTH.pack(len(body)) + body)
    await process.stdin.drain()
    (size,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
    if size > MAX_ANSWER:
        raise _BadAnswer(f"the process would send {size} bytes")
    try:
        return msgspec.msgpack.decode(await process.stdout.readexactly(size), type=_Done)
    except msgspec.DecodeError as error:
        raise _BadAnswer(str(error)) from error


# ---------------------------------------------------------------- the process itself


def main(jobs: BinaryIO, answers: BinaryIO, limit_s: float) -> None:
    """Render jobs until the front closes the pipe; SIGPROF ends a job that takes longer."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front, which drains
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    compiled: dict[str, ChatTemplate] = {}
    while head := jobs.read(_LENGTH.size):
        (size,) = _LENGTH.unpack(head)
        job = msgspec.msgpack.decode(jobs.read(size), type=_Job)
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        began = time.process_time()
        done = msgspec.structs.replace(
            _render(job, compiled), seconds=time.process_time() - began
        )
        signal.setitimer(signal.ITIMER_PROF, 0)
        body = msgspec.msgpack.encode(done)
        answers.write(_LENGTH.pack(len(body)) + body)
        answers.flush()


def _render(job: _Job, compiled: dict[str, ChatTemplate]) -> _Done:
    try:
        template = compiled.get(job.source)
        if template is None:
            template = ChatTemplate(job.source, job.special_tokens)
            if len(compiled) >= _COMPILED:
                del compiled[next(iter(compiled))]
            compiled[job.source] = template
        return _Done(template.render(job.messages), "")
    except TemplateFailed as error:
        return _Done("", error.message)


if __name__ == "__main__":
    if sys.argv[2:] == ["low-priority"]:
        lower_priority()
    main(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
