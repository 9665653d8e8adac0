"""Renders adapters' chat templates in separate processes, which can be killed.

A sandbox isolates a template, but cannot stop it from looping for ever or doubling a string
until memory runs out, and a thread that does so cannot be stopped. So the front process
renders only the operator's own template (the base's); uploaded templates are rendered in
separate processes, under limits of memory and CPU time.

There are two processes. The quick one interrupts a rendering after `QUICK_LIMIT_S`. The
rendering is then repeated in the slow one, at low priority and for up to `RENDER_LIMIT_S`, and
so are the template's next renderings for a while. Compiling, which happens once, may take
`COMPILE_LIMIT_S` in the quick process, after all others. In both, the template and caller
with the least recent CPU time are next. So a slow template delays only itself and other slow
ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from veneer_registry.errors import TemplateFailed

from veneer_server.logs import get_logger
from veneer_server.queues.recent import Recent
from veneer_server.text.templates.options import TemplateOptions
from veneer_server.text.templates.process import MEMORY_LIMIT, Done, Job, TooSlow
from veneer_server.text.templates.turns import Accounts, Turns
from veneer_server.text.templates.worker import Cause, Ended, Worker

__all__ = ["UploadedTemplates"]

RENDER_LIMIT_S: Final = 2.0
"""Limit for one rendering, in CPU time: on a busy machine, wall-clock time would make a good
template look bad."""

QUICK_LIMIT_S: Final = 0.02
"""The limit in the quick process. Rendering hundreds of messages takes less."""

COMPILE_LIMIT_S: Final = 0.25
"""Limit for compiling in the quick process: enough for about the largest template."""

SLOW_FOR_S: Final = 60.0
"""How long a template counts as slow, or is refused if the machine may be at fault."""

_TRIES: Final = 2
"""Attempts at a rendering whose process something else kills."""

_KNOWN: Final = 1000

_PLAIN: Final = TemplateOptions()

_log = get_logger(__name__)


class UploadedTemplates:
    """Renders adapters' templates. Belongs to one event loop.

    A template that exceeds a limit is refused from then on. One that does not answer in
    time, or whose process something else kills, is refused for a while.
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
        self._quick_limit_s = min(quick_limit_s, limit_s)
        self._accounts = Accounts(_now)
        self.quick, self._quick_turns = Worker(), Turns(self._accounts)
        self.slow, self._slow_turns = Worker(low_priority=True), Turns(self._accounts)
        self._compile_limit: Recent[bytes, float] = Recent(_KNOWN)
        """Limits for templates that take more than the quick limit to compile."""
        self._slow_until: Recent[bytes, float] = Recent(_KNOWN)
        self._refused: Recent[bytes, tuple[float, Cause]] = Recent(_KNOWN)
        """Until when a template is refused, and why."""

    async def close(self) -> None:
        """End the processes."""
        async with self._quick_turns.turn(b"", ""):
            await self.quick.kill()
        async with self._slow_turns.turn(b"", ""):
            await self.slow.kill()

    async def render(
        self,
        source: str,
        messages: Sequence[Mapping[str, Any]],
        caller: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        options: TemplateOptions = _PLAIN,
    ) -> str:
        """The prompt for an assistant's answer to ``messages``, see `ChatTemplate.render`.

        Args:
            caller: its connection.
            tools: see `ChatTemplate.render`.

        Raises:
            TemplateFailed: the template rejects these messages, or exceeded a limit.
            QueueFull: too many renderings of this template are waiting.
        """
        key = hashlib.sha256(source.encode()).digest()
        limit = self._limit_s
        job = Job(
            source,
            self._special,
            [dict(each) for each in messages],
            compile_limit_s=limit,
            limit_s=limit,
            kwargs=json.dumps(options.kwargs),
            add_generation_prompt=options.add_generation_prompt,
            continue_final=options.continue_final,
            tools=[dict(each) for each in tools],
        )
        tries = _TRIES
        try:
            done = await self._quickly(key, caller, job)
        except Ended:
            done, tries = None, tries - 1
        if done is None:
            done = await self._slowly(key, caller, job, tries)
        if done.error:
            raise TemplateFailed(done.error, metadata={"cause": done.cause})
        return done.text

    async def _quickly(self, key: bytes, caller: str, job: Job) -> Done | None:
        """Render in the quick process; None if the template is too slow for it. Raises Ended
        if something else killed the process."""
        while not self._is_slow(key):
            async with self._quick_turns.turn(key, caller):
                if self._is_slow(key):  # found out while it waited
                    break
                self._check(key)
                limit = self._compile_limit.get(key, self._quick_limit_s)
                job = msgspec.structs.replace(
                    job, compile_limit_s=limit, limit_s=self._quick_limit_s
                )
                try:
                    done = await self._do(self.quick, key, caller, job)
                except Ended as error:
                    match error.cause:
                        case Cause.OTHERS:
                            raise
                        case Cause.ITSELF:
                            raise self._refuse(key, error.cause) from error
                        case Cause.NO_ANSWER:  # the process or the machine may be at fault
                            return None
                        case Cause.CPU_TIME:
                            done = Done(too_slow=TooSlow.RENDERING)
                if not done.too_slow:
                    return done
                longer = max(COMPILE_LIMIT_S, self._quick_limit_s)
                if done.too_slow is TooSlow.COMPILING and limit < longer:
                    self._compile_limit[key] = longer
                else:
                    self._slow_until[key] = _now() + SLOW_FOR_S
        return None

    async def _slowly(self, key: bytes, caller: str, job: Job, tries: int) -> Done:
        async with self._slow_turns.turn(key, caller):
            while True:
                self._check(key)
                tries -= 1
                try:
                    done = await self._do(self.slow, key, caller, job)
                except Ended as error:
                    if error.cause is Cause.OTHERS and tries:
                        continue
                    raise self._refuse(key, error.cause) from error
                if done.too_slow:
                    raise self._refuse(key, Cause.CPU_TIME)
                if done.seconds > self._quick_limit_s:
                    self._slow_until[key] = _now() + SLOW_FOR_S
                return done

    async def _do(self, worker: Worker, key: bytes, caller: str, job: Job) -> Done:
        """Do a job and charge its CPU time. Raises Ended."""
        seconds, quick = job.compile_limit_s + job.limit_s, False
        try:
            done = await worker.do(job)
            seconds = done.seconds
            quick = worker is self.quick and not done.too_slow
            return done
        finally:
            self._accounts.charge(key, caller, seconds, quick=quick)

    def _is_slow(self, key: bytes) -> bool:
        return _now() < self._slow_until.get(key, 0.0)

    def _check(self, key: bytes) -> None:
        until, cause = self._refused.get(key, (0.0, Cause.ITSELF))
        if _now() < until:
            raise self._failure(cause)

    def _refuse(self, key: bytes, cause: Cause) -> TemplateFailed:
        perhaps_the_machine = cause in (Cause.NO_ANSWER, Cause.OTHERS)
        until = _now() + SLOW_FOR_S if perhaps_the_machine else float("inf")
        self._refused[key] = until, cause
        _log.warning("chat template refused", sha256=key.hex(), cause=cause.value)
        return self._failure(cause)

    def _failure(self, cause: Cause) -> TemplateFailed:
        if cause is Cause.OTHERS:
            return TemplateFailed(
                "the process that renders the adapter's chat template was killed, perhaps for "
                f"lack of memory: retry after {SLOW_FOR_S:g} s, or use `prompt`",
                metadata={"cause": "killed"},
            )
        return TemplateFailed(
            f"the adapter's chat template takes more than {self._limit_s:g} s or "
            f"{MEMORY_LIMIT >> 20} MiB: fix it and push the adapter again, or use `prompt`",
            metadata={"cause": "too_slow", "limit_s": f"{self._limit_s:g}"},
        )


def _now() -> float:
    return asyncio.get_running_loop().time()
