"""Renders chat templates in separate processes, which can be killed.

A sandbox isolates a template, but cannot stop it from looping for ever or doubling a string
until memory runs out, and a thread that does so cannot be stopped. The base's own template is
no exception: public templates take quadratic time on some messages, and callers choose the
messages. So all templates are rendered in separate processes, with limits on memory and CPU
time. The base's template has processes of its own, since an adapter's template might take over
its process.

A `Renderer` has two processes. The quick one interrupts a rendering after `QUICK_LIMIT_S`. The
rendering is then repeated in the slow one, at low priority and for up to `RENDER_LIMIT_S`.
Compiling, which happens once, may take `COMPILE_LIMIT_S` in the quick process, behind all
others, and `RENDER_LIMIT_S` for the base's template, which the operator chose. In both
processes, the sender with the least recent CPU time is next.

The renderer remembers slow inputs for a while. An input then counts as slow if it has the same
template, is at least as large, and is from the same party: a tenant's key, or a host, where
callers have no keys. So slow chats delay only their sender and other slow chats, and nobody can
make a template slow for somebody else, or for small inputs. The exception is a template that
could not be interrupted, so that the quick process had to be ended: it is slow for that party
with any input.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec
from veneer_registry.errors import TemplateFailed

from veneer_server.logs import get_logger
from veneer_server.queues.fairness import NOBODY, Sender
from veneer_server.queues.recent import Recent
from veneer_server.text.template_process import (
    MEMORY_LIMIT,
    ChatToRender,
    RenderDone,
    RenderJob,
    TooSlow,
)
from veneer_server.text.template_worker import Cause, RenderEnded, RenderWorker
from veneer_server.text.turns import Accounts, TemplateOptions, Turns

RENDER_LIMIT_S: Final = 2.0
"""Limit for one rendering, in CPU time: on a busy machine, wall-clock time would make a good
template look bad."""

QUICK_LIMIT_S: Final = 0.02
"""CPU time limit for a rendering in the quick process. Hundreds of messages take less."""

COMPILE_LIMIT_S: Final = 0.25
"""Limit for compiling an uploaded template in the quick process. A template of 32 KB takes
0.2 s, the largest about 0.4 s."""

SLOW_FOR_S: Final = 60.0
"""How long an input counts as slow, or is refused if the machine may be at fault."""

REFUSED_FOR_S: Final = 300.0
"""How long an input that exceeded the limits is refused at once."""

_TRIES: Final = 2
"""Attempts at a rendering, if its process is killed for other reasons."""

_COMPILE_LIMITS: Final = 1000

_PARTIES: Final = 1000
MOST_TEMPLATES: Final = 16
MOST_SIZES: Final = 8
"""Most parties, templates per party and sizes per template that are remembered. If a party
sends more, only its own are forgotten."""

_PLAIN: Final = TemplateOptions()

_log = get_logger(__name__)


class Size(NamedTuple):
    """Size of an input to a template.

    Attributes:
        items: number of messages and tools.
        bytes_: bytes of the whole input, in the form sent to the process.
    """

    items: int
    bytes_: int

    def covers(self, other: Size) -> bool:
        """Whether this size is at least as large as another, in both numbers."""
        return self.items >= other.items and self.bytes_ >= other.bytes_


ANY: Final = Size(0, 0)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A finding about inputs of at least ``size``: they are slow, or refused because of
    ``cause``."""

    size: Size
    until: float
    cause: Cause | None = None


class Input(NamedTuple):
    """A chat to render.

    Attributes:
        template: digest of the template.
        with_options: digest of the template and the caller's variables for it, which may
            control its loops.
    """

    sender: Sender
    template: bytes
    with_options: bytes
    size: Size

    @property
    def key(self) -> tuple[Sender, bytes]:
        return self.sender, self.template


@dataclass(slots=True)
class _Known:
    """Findings about a party's inputs to a template.

    Attributes:
        quick: sizes of inputs that were quick. If a larger input was quick, an input's size is
            not what makes it slow, so nothing is concluded about its size.
    """

    verdicts: list[_Verdict] = field(default_factory=list)
    quick: list[Size] = field(default_factory=list)


class Verdicts:
    """Remembers findings about inputs, by party and template."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Args: clock: returns seconds."""
        self._clock = clock
        self.parties: Recent[tuple[str, ...], Recent[bytes, _Known]] = Recent(_PARTIES)

    def slow(self, what: Input) -> bool:
        """Whether such an input is known to be too slow for the quick process."""
        return any(each.cause is None for each in self._about(what))

    def refused(self, what: Input) -> Cause | None:
        """Why such an input is refused; None if it is not."""
        causes = (each.cause for each in self._about(what) if each.cause is not None)
        return next(causes, None)

    def note(
        self, what: Input, seconds: float, cause: Cause | None, *, any_size: bool = False
    ) -> None:
        """Remember for ``seconds`` that an input is slow, or refused because of ``cause``.

        Args:
            any_size: the finding holds for any input, as when the template takes too long to
                compile.
        """
        size, known = ANY if any_size else what.size, self.known(what)
        if not any_size and any(each.covers(size) for each in known.quick):
            return
        now = self._clock()
        kept = [
            each
            for each in known.verdicts
            if now < each.until
            and not (each.size.covers(size) and (each.cause is None) == (cause is None))
        ]
        known.verdicts = [*kept[1 - MOST_SIZES :], _Verdict(size, now + seconds, cause)]

    def quick(self, what: Input) -> None:
        """Remember that an input was quick, and drop findings about smaller inputs, which may
        be wrong."""
        known, size = self.known(what), what.size
        if any(each.covers(size) for each in known.quick):
            return
        kept = [each for each in known.quick if not size.covers(each)]
        known.quick = [*kept[1 - MOST_SIZES :], size]
        known.verdicts = [
            each for each in known.verdicts if each.size == ANY or not size.covers(each.size)
        ]

    def known(self, what: Input) -> _Known:
        if (templates := self.parties.get(what.sender.party)) is None:
            templates = self.parties[what.sender.party] = Recent(MOST_TEMPLATES)
        if (known := templates.get(what.with_options)) is None:
            known = templates[what.with_options] = _Known()
        return known

    def _about(self, what: Input) -> list[_Verdict]:
        verdicts = self.known(what).verdicts
        if not verdicts:
            return verdicts
        now = self._clock()
        return [each for each in verdicts if now < each.until and what.size.covers(each.size)]


class Renderer:
    """Renders with templates of one origin. Belongs to one event loop.

    An input that exceeds a limit is refused for the next `REFUSED_FOR_S`. An input that is not
    answered in time, or whose process is killed for other reasons, is refused for `SLOW_FOR_S`.
    """

    def __init__(
        self,
        special_tokens: Mapping[str, str],
        *,
        whose: str = "the adapter's",
        limit_s: float = RENDER_LIMIT_S,
        quick_limit_s: float = QUICK_LIMIT_S,
        compile_limit_s: float | None = None,
    ) -> None:
        """Args:
        whose: owner of the templates, for error messages.
        compile_limit_s: limit for compiling in the quick process; None: `COMPILE_LIMIT_S`.
        """
        self._special = dict(special_tokens)
        self._whose = whose
        self._limit_s = limit_s
        self._quick_limit_s = min(quick_limit_s, limit_s)
        longest = COMPILE_LIMIT_S if compile_limit_s is None else compile_limit_s
        self._longest_compile_s = max(longest, self._quick_limit_s)
        self._accounts = Accounts(_now)
        self.quick, self._quick_turns = RenderWorker(), Turns(self._accounts)
        self.slow, self._slow_turns = RenderWorker(low_priority=True), Turns(self._accounts)
        self._compile_limit: Recent[bytes, float] = Recent(_COMPILE_LIMITS)
        """Limits for templates that take more than the quick limit to compile."""
        self._verdicts = Verdicts(_now)
        self._ended: Recent[tuple[tuple[str, ...], bytes], float] = Recent(_PARTIES)
        """Until when a party's template is kept out of the quick process, with any input,
        because the process had to be ended for it: the next sender had to wait for a new
        process."""

    async def close(self) -> None:
        """End the processes."""
        async with self._quick_turns.turn((NOBODY, b"")):
            await self.quick.close()
        async with self._slow_turns.turn((NOBODY, b"")):
            await self.slow.close()

    async def render(
        self,
        source: str,
        messages: Sequence[Mapping[str, Any]],
        sender: Sender = NOBODY,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        options: TemplateOptions = _PLAIN,
    ) -> str:
        """Render the prompt for an assistant's answer to ``messages``, see
        `ChatTemplate.render`.

        Args:
            tools: see `ChatTemplate.render`.

        Raises:
            TemplateFailed: the template rejects these messages, or they exceeded a limit.
            QueueFull: too many of the sender's renderings of this template are waiting.
        """
        kwargs = json.dumps(options.kwargs)
        chat = ChatToRender(
            source,
            self._special,
            [dict(each) for each in messages],
            kwargs=kwargs,
            add_generation_prompt=options.add_generation_prompt,
            continue_final=options.continue_final,
            tools=[dict(each) for each in tools],
        )
        template = hashlib.sha256(source.encode())
        digest = template.digest()
        template.update(kwargs.encode())
        size = Size(len(messages) + len(tools), len(msgspec.msgpack.encode(chat)))
        what = Input(sender, digest, template.digest(), size)
        job = RenderJob(chat, compile_limit_s=self._limit_s, limit_s=self._limit_s)
        tries = _TRIES
        try:
            done = await self._quickly(what, job)
        except RenderEnded:
            done, tries = None, tries - 1
        if done is None:
            done = await self._slowly(what, job, tries)
        if done.error:
            raise TemplateFailed(done.error, metadata={"cause": done.cause})
        return done.text

    async def _quickly(self, what: Input, job: RenderJob) -> RenderDone | None:
        """Render in the quick process; None if the input is too slow for it. Raises RenderEnded
        if the process was killed for other reasons."""
        key = what.template
        while not self._slow(what):
            async with self._quick_turns.turn(what.key):
                if self._slow(what):  # noticed while it waited
                    break
                self._check(what)
                limit = self._compile_limit.get(key, self._quick_limit_s)
                job = msgspec.structs.replace(
                    job, compile_limit_s=limit, limit_s=self._quick_limit_s
                )
                try:
                    done = await self._do(self.quick, what, job)
                except RenderEnded as error:
                    if error.cause in (Cause.CPU_TIME, Cause.ITSELF):
                        self._ended[what.sender.party, key] = _now() + SLOW_FOR_S
                    match error.cause:
                        case Cause.OTHERS:
                            raise
                        case Cause.ITSELF:
                            raise self._refuse(what, error.cause) from error
                        case Cause.NO_ANSWER:  # the process or the machine may be at fault
                            return None
                        case Cause.CPU_TIME:
                            done = RenderDone(too_slow=TooSlow.RENDERING)
                if not done.too_slow:
                    return done
                compiling = done.too_slow is TooSlow.COMPILING
                if compiling and limit < self._longest_compile_s:
                    self._compile_limit[key] = self._longest_compile_s
                else:
                    self._verdicts.note(what, SLOW_FOR_S, None, any_size=compiling)
                    return None
        return None

    def _slow(self, what: Input) -> bool:
        """Whether an input is kept out of the quick process."""
        until = self._ended.get((what.sender.party, what.template), 0.0)
        return _now() < until or self._verdicts.slow(what)

    async def _slowly(self, what: Input, job: RenderJob, tries: int) -> RenderDone:
        async with self._slow_turns.turn(what.key):
            while True:
                self._check(what)
                tries -= 1
                try:
                    done = await self._do(self.slow, what, job)
                except RenderEnded as error:
                    if error.cause is Cause.OTHERS and tries:
                        continue
                    raise self._refuse(what, error.cause) from error
                if done.too_slow:
                    compiling = done.too_slow is TooSlow.COMPILING
                    raise self._refuse(what, Cause.CPU_TIME, any_size=compiling)
                if done.seconds > self._quick_limit_s:
                    self._verdicts.note(what, SLOW_FOR_S, None)
                return done

    async def _do(self, worker: RenderWorker, what: Input, job: RenderJob) -> RenderDone:
        """Do a job, and charge its CPU time to the sender. Raises RenderEnded."""

        def charge(seconds: float, done: RenderDone | None) -> None:
            quick = worker is self.quick and done is not None and not done.too_slow
            self._accounts.charge(what.key, seconds, quick=quick)
            if quick:
                self._verdicts.quick(what)

        return await worker.do(job, charge)

    def _check(self, what: Input) -> None:
        if (cause := self._verdicts.refused(what)) is not None:
            raise self._failure(cause)

    def _refuse(self, what: Input, cause: Cause, *, any_size: bool = False) -> TemplateFailed:
        perhaps_the_machine = cause in (Cause.NO_ANSWER, Cause.OTHERS)
        seconds = SLOW_FOR_S if perhaps_the_machine else REFUSED_FOR_S
        self._verdicts.note(what, seconds, cause, any_size=any_size)
        _log.warning(
            "chat template refused",
            sha256=what.template.hex(),
            cause=cause.value,
            tenant=what.sender.tenant,
            **what.size._asdict(),
        )
        return self._failure(cause)

    def _failure(self, cause: Cause) -> TemplateFailed:
        if cause is Cause.OTHERS:
            return TemplateFailed(
                f"the process that renders {self._whose} chat template was killed, possibly "
                f"out of memory: retry after {SLOW_FOR_S:g} s, or use `prompt`",
                metadata={"cause": "killed"},
            )
        return TemplateFailed(
            f"{self._whose} chat template needs more than {self._limit_s:g} s or "
            f"{MEMORY_LIMIT >> 20} MiB for these messages: send fewer or shorter ones, use "
            "`prompt`, or fix the template",
            metadata={"cause": "too_slow", "limit_s": f"{self._limit_s:g}"},
        )


def _now() -> float:
    return asyncio.get_running_loop().time()
