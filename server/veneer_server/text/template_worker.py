"""Controls one template process from the front process: starts it, sends jobs, tells why it
ended."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from enum import Enum
from typing import Final

import msgspec
from veneer_registry.child_python import child_python

from veneer_server.text import template_process
from veneer_server.text.template import MAX_ERROR, MAX_OUTPUT
from veneer_server.text.template_process import OUT_OF_TIME, RenderDone, RenderJob
from veneer_server.wire.frames import LENGTH, framed

MAX_ANSWER: Final = 4 * (MAX_OUTPUT + 2 * MAX_ERROR)
"""Most bytes of an answer; the front process refuses to read a longer one."""

WALL_FACTOR: Final = 15
"""Wall-clock limit of a job per second of its CPU time limit: the machine may be busy."""

WALL_LEAST_S: Final = 5.0
"""Lowest wall-clock limit; starting a process takes part of it."""

START_S: Final = 0.3
"""CPU time that a new process takes to start; charged to the job that ended the old one."""

_BY_OTHERS: Final = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit statuses if the kernel (out of memory) or an operator kills the process."""


class Cause(Enum):
    """Why a process ended during a job."""

    CPU_TIME = "CPU time or memory"
    NO_ANSWER = "no answer in time"
    OTHERS = "killed by something else"
    ITSELF = "it ended"


class RenderEnded(Exception):
    """The process has ended during a job: by a limit, by us, or for other reasons."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.value)
        self.cause = cause


class _BadAnswer(Exception):
    """The process sent an invalid answer: a template has taken it over."""


class RenderWorker:
    """A process, started when first needed and restarted after it ends. Belongs to one event
    loop; one job at a time."""

    def __init__(self, *, low_priority: bool = False) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self._doing: asyncio.Task[RenderDone] | None = None
        """The last job. If its caller leaves, it still runs to its end: starting a new process
        takes longer than most jobs, and the next sender would wait for that."""
        self._low_priority = low_priority

    async def do(
        self, job: RenderJob, charge: Callable[[float, RenderDone | None], None]
    ) -> RenderDone:
        """Do a job. Raises RenderEnded.

        Args:
            charge: called when the job has ended, even if the caller has left by then, with
                its CPU time and its result; None if the process ended or the job was
                cancelled.
        """
        while self._doing is not None and not self._doing.done():
            await asyncio.wait({self._doing})
        self._doing = asyncio.create_task(self._charged(job, charge))
        return await asyncio.shield(self._doing)

    async def _charged(
        self, job: RenderJob, charge: Callable[[float, RenderDone | None], None]
    ) -> RenderDone:
        done: RenderDone | None = None
        try:
            done = await self._do(job)
            return done
        finally:
            limits_s = job.compile_limit_s + job.limit_s
            seconds = limits_s if done is None else done.seconds
            ended = done is None or done.worn
            charge(seconds + (START_S if ended else 0.0), done)

    async def _do(self, job: RenderJob) -> RenderDone:
        process = await self._running()
        wall = max((job.compile_limit_s + job.limit_s) * WALL_FACTOR, WALL_LEAST_S)
        try:
            async with asyncio.timeout(wall):
                done = await exchange(process, job)
            if done.worn:
                await self.kill()
            return done
        except TimeoutError as error:
            await self.kill()
            raise RenderEnded(Cause.NO_ANSWER) from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise RenderEnded(await self._why()) from error
        except _BadAnswer as error:
            await self.kill()
            raise RenderEnded(Cause.ITSELF) from error
        except BaseException:
            # Stopped halfway: the answer would be taken for the next job's.
            await self.kill()
            raise

    async def close(self) -> None:
        """Cancel the current job, and end the process."""
        if self._doing is not None:
            self._doing.cancel()
            await asyncio.wait({self._doing})
        await self.kill()

    async def kill(self) -> None:
        """End the process; the next job starts another one."""
        process, self.process = self.process, None
        if process is not None:
            await _end(process)

    async def _running(self) -> asyncio.subprocess.Process:
        if self.process is None or self.process.returncode is not None:
            self.process = await asyncio.create_subprocess_exec(
                *child_python("-m", template_process.__name__),
                *(("low-priority",) if self._low_priority else ()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        return self.process

    async def _why(self) -> Cause:
        """Find out why the process, which has closed a pipe, ended."""
        process, self.process = self.process, None
        assert process is not None, "it was running"
        try:
            status = await asyncio.wait_for(process.wait(), 1.0)
        except TimeoutError:
            return Cause.ITSELF
        finally:
            await _end(process)
        if status in _BY_OTHERS:
            return Cause.OTHERS
        return Cause.CPU_TIME if status == -OUT_OF_TIME else Cause.ITSELF


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def exchange(process: asyncio.subprocess.Process, job: RenderJob) -> RenderDone:
    """Send a job to an idle process, and read its answer."""
    assert process.stdin is not None, "made with pipes"
    assert process.stdout is not None, "made with pipes"
    process.stdin.write(framed(msgspec.msgpack.encode(job)))
    await process.stdin.drain()
    (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    if size > MAX_ANSWER:
        raise _BadAnswer(f"the process would send {size} bytes")
    try:
        return msgspec.msgpack.decode(await process.stdout.readexactly(size), type=RenderDone)
    except msgspec.DecodeError as error:
        raise _BadAnswer(str(error)) from error
