"""Adapters' chat templates run in a process of their own, which may be killed.

A sandbox keeps a template from reaching anything, but not from looping for ever
or doubling a string until memory ends, and a thread that does so cannot be
stopped. So the operator's own template (the base's) is rendered in the front, and
templates that came by upload are rendered here, under limits of memory and time.

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
from collections.abc import Mapping, Sequence
from typing import BinaryIO, Final

import msgspec
from veneer_registry.errors import TemplateFailed

from veneer_server.logs import get_logger
from veneer_server.text.template import MAX_ERROR, MAX_OUTPUT, ChatTemplate

__all__ = ["RENDER_LIMIT_S", "TemplateProcess"]

RENDER_LIMIT_S: Final = 2.0
"""Processor seconds that one rendering may take: a busy machine must not make a
good template look bad."""

MEMORY_LIMIT: Final = 512 << 20
"""Address space of the process, in bytes; an idle one takes about 100 MB."""

MAX_ANSWER: Final = 4 * (MAX_OUTPUT + 2 * MAX_ERROR)
"""Bytes of an answer; the front reads no more, whatever the process sends."""

_WALL_FACTOR: Final = 15
_LENGTH: Final = struct.Struct(">I")
_COMPILED: Final = 64
_REMEMBERED: Final = 1000

_log = get_logger(__name__)


class _Job(msgspec.Struct, frozen=True, array_like=True):
    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, str]]


class _Done(msgspec.Struct, frozen=True, array_like=True):
    """Exactly one of the two is empty."""

    text: str
    error: str


class TemplateProcess:
    """The front's side. Belongs to one event loop; renders one template at a time.

    The process is started when it is first needed, and again after it had to be
    killed. A template that was killed is refused from then on.
    """

    def __init__(
        self, special_tokens: Mapping[str, str], *, limit_s: float = RENDER_LIMIT_S
    ) -> None:
        self._special = dict(special_tokens)
        self._limit_s = limit_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._refused: set[bytes] = set()

    async def close(self) -> None:
        """End the process."""
        async with self._turn:
            await self._kill()

    async def render(self, source: str, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for an assistant's answer to ``messages`` (role, content).

        Raises:
            TemplateFailed: the template refuses these messages, or went past a limit.
        """
        key = hashlib.sha256(source.encode()).digest()
        job = _Job(source, self._special, [dict(message) for message in messages])
        async with self._turn:
            if key in self._refused:
                raise self._too_much()
            process = await self._running()
            try:
                async with asyncio.timeout(self._limit_s * _WALL_FACTOR):
                    done = await _exchange(process, job)
            except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
                # It ended itself by a limit, unless we lost patience with the machine.
                if not isinstance(error, TimeoutError) and len(self._refused) < _REMEMBERED:
                    self._refused.add(key)
                await self._kill()
                _log.warning("template killed", sha256=key.hex(), cause=type(error).__name__)
                raise self._too_much() from error
            except BaseException:
                # Cancelled halfway: the answer would be taken for the next job's.
                await self._kill()
                raise
        if done.error:
            raise TemplateFailed(done.error)
        return done.text

    def _too_much(self) -> TemplateFailed:
        return TemplateFailed(
            f"the adapter's chat template takes more than {self._limit_s:g} s or "
            f"{MEMORY_LIMIT >> 20} MiB: mend it and push the adapter again, or send `prompt`"
        )

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", __name__, str(self._limit_s)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        return self._process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
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
        raise ConnectionError(f"the process would send {size} bytes")
    return msgspec.msgpack.decode(await process.stdout.readexactly(size), type=_Done)


# ---------------------------------------------------------------- the process itself


def main(jobs: BinaryIO, answers: BinaryIO, limit_s: float) -> None:
    """Render jobs until the front closes the pipe; SIGPROF ends a job that takes longer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front, which drains
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    compiled: dict[str, ChatTemplate] = {}
    while head := jobs.read(_LENGTH.size):
        (size,) = _LENGTH.unpack(head)
        job = msgspec.msgpack.decode(jobs.read(size), type=_Job)
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        done = _render(job, compiled)
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
    main(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
