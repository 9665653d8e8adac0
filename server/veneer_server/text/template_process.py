"""The process that renders chat templates, with limits on CPU time and memory.

It is started by `veneer_server.text.template_worker`, and exchanges frames (`wire.frames`) over
stdin and stdout.

A rendering that takes too long is interrupted by an exception at the next Python
instruction: the process continues and keeps its compiled templates. An operation that takes
long inside C code cannot be interrupted this way; a second timer then ends the process.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Final, cast

import msgspec
from veneer_registry.errors import TemplateFailed

from veneer_server.queues.recent import Recent
from veneer_server.system.priority import lower_priority
from veneer_server.text.template import Cause, ChatTemplate
from veneer_server.text.turns import TemplateOptions
from veneer_server.wire.frames import LENGTH, framed

MEMORY_LIMIT: Final = 512 << 20
"""Address space of a process, in bytes; an idle one takes about 100 MB."""

OUT_OF_TIME: Final = signal.SIGVTALRM
"""Signal that ends a process that could not be interrupted."""

_GRACE_S: Final = 0.1
"""CPU time beyond a limit before the process is ended."""

_COMPILED: Final = 64


class TooSlow(StrEnum):
    """The phase that exceeded its limit of CPU time, or the process's limit of memory."""

    NOTHING = ""
    COMPILING = "compiling"
    RENDERING = "rendering"


class ChatToRender(msgspec.Struct, frozen=True, array_like=True):
    """A chat to render, with its template.

    Attributes:
        kwargs: `TemplateOptions.kwargs` as JSON text.
    """

    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]]
    kwargs: str = "{}"
    add_generation_prompt: bool = True
    continue_final: bool = False
    tools: list[dict[str, Any]] = []

    @property
    def options(self) -> TemplateOptions:
        return TemplateOptions(
            json.loads(self.kwargs), self.add_generation_prompt, self.continue_final
        )


class RenderJob(msgspec.Struct, frozen=True, array_like=True):
    """A job: compile a template, unless it is compiled already, and render a chat with it.

    Attributes:
        compile_limit_s: limit on the CPU time of compiling.
        limit_s: limit on the CPU time of rendering.
    """

    chat: ChatToRender
    compile_limit_s: float
    limit_s: float


class RenderDone(msgspec.Struct, frozen=True, array_like=True):
    """The result of a job: the text, an error, or the phase that was too slow.

    Attributes:
        cause: cause of the error. Restricted to known values, since a template may have
            taken over the process.
        seconds: CPU time used.
        worn: the process holds so much memory that it should be replaced.
    """

    text: str = ""
    error: str = ""
    too_slow: TooSlow = TooSlow.NOTHING
    seconds: float = 0.0
    cause: Cause = "rendering"
    worn: bool = False


class _Interrupted(BaseException):
    """A job's time is up. Not an `Exception`, since Jinja and templates' filters catch
    those."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Interrupt the block after ``seconds`` of CPU time; end the process soon after that."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds + _GRACE_S)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _do(job: RenderJob, compiled: Recent[str, ChatTemplate]) -> RenderDone:
    doing = TooSlow.COMPILING
    try:
        chat = job.chat
        template = compiled.get(chat.source)
        if template is None:
            with _limited(job.compile_limit_s):
                template = ChatTemplate(chat.source, chat.special_tokens)
        compiled[chat.source] = template  # even if it was there: the last used ones are kept
        doing = TooSlow.RENDERING
        with _limited(job.limit_s):
            return RenderDone(template.render(chat.messages, chat.tools, options=chat.options))
    except TemplateFailed as error:
        return RenderDone(error=error.message, cause=cast(Cause, error.metadata["cause"]))
    except (_Interrupted, MemoryError):
        return RenderDone(too_slow=doing)
    finally:
        # Stopped here, where an interruption can no longer skip it.
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _worn() -> bool:
    """Whether half of the address space is used, for example by long constants of kept
    templates: other chats would run out of memory. False if the system does not report it."""
    try:
        pages, _, _ = Path("/proc/self/statm").read_text().partition(" ")
    except OSError:
        return False
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    return int(pages) * resource.getpagesize() > most // 2


def main(jobs: BinaryIO, answers: BinaryIO) -> None:
    """Do jobs until the front closes the pipe."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front process
    signal.signal(signal.SIGPROF, _interrupt)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    compiled: Recent[str, ChatTemplate] = Recent(_COMPILED)
    while head := jobs.read(LENGTH.size):
        (size,) = LENGTH.unpack(head)
        job = msgspec.msgpack.decode(jobs.read(size), type=RenderJob)
        began = time.process_time()
        done = _do(job, compiled)
        done = msgspec.structs.replace(done, seconds=time.process_time() - began, worn=_worn())
        answers.write(framed(msgspec.msgpack.encode(done)))
        answers.flush()


if __name__ == "__main__":
    if sys.argv[1:] == ["low-priority"]:
        lower_priority()
    main(sys.stdin.buffer, sys.stdout.buffer)
