"""Turns at the template processes, and the options that callers may give a chat template.

The sender with the least recent CPU time is next. CPU time is charged to the tenant, to its
key, to the key's user, to the connection and to the template, and compared in this order, so
that a sender's share does not depend on how many connections it opens or templates it uploads.
New templates cannot be told from slow ones. So a party's template counts as having used `NEW_S`
until it has been quick once. CPU time that one party uses with a template does not count for
other parties.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar, get_args

from veneer_registry.errors import InvalidField, QueueFull

from veneer_server.queues.fair_queue import FairQueue
from veneer_server.queues.fairness import Sender
from veneer_server.queues.recent import Recent

MAX_WAITING: Final = 64
"""Most renderings of one template that may wait for one connection."""

NEW_S: Final = 0.25
"""CPU time charged to a template until it has been quick once."""

CREDIT_S: Final = 0.05
"""A sender that returns counts as having used at most this much less CPU time than those that
are waiting, so nobody is first for long."""

_HALF_LIFE_S: Final = 10.0
"""Seconds after which used CPU time counts half."""

_KNOWN: Final = 1000

Key = tuple[Sender, bytes]
"""A sender, and the digest of the template that it uses."""

N = TypeVar("N", bound=Hashable)


class Accounts:
    """Recent CPU time of senders, at each level, and of their templates."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Args: clock: returns seconds."""
        self._clock = clock
        self._levels = [_Used[tuple[str, ...]](clock) for _ in Sender._fields]
        self._templates = _Used[tuple[tuple[str, ...], bytes]](clock)
        self._quick: Recent[tuple[tuple[str, ...], bytes], bool] = Recent(_KNOWN)

    def charge(self, key: Key, seconds: float, *, quick: bool) -> None:
        """Count a rendering's CPU time, and whether it was quick."""
        sender, template = key
        for depth, level in enumerate(self._levels, start=1):
            level.add(sender[:depth], seconds)
        self._templates.add((sender.party, template), seconds)
        if quick:
            self._quick[sender.party, template] = True

    def begin(self, key: Key, active: Iterable[Key]) -> None:
        """Register a sender that starts to wait: at each level, it counts as having used at
        most `CREDIT_S` less than those in ``active``, which have renderings waiting or
        running."""
        mine, others = key[0], {each for each, _ in active}
        now = self._clock()
        for depth, level in enumerate(self._levels, start=1):
            others = {each for each in others if each[: depth - 1] == mine[: depth - 1]}
            names = {each[:depth] for each in others}
            if names and mine[:depth] not in names:
                least = min(level.of(name, now) for name in names)
                level.add(mine[:depth], least - CREDIT_S - level.of(mine[:depth], now))

    def ranks(self) -> Callable[[Key], tuple[float, ...]]:
        """Return a sort key as of now: the lowest is next. The last figure orders a
        connection's own templates."""
        now = self._clock()
        *outer, connections = self._levels
        # Hundreds of connections may wait, most of them from one party, so cache its figures.
        parties: dict[tuple[str, ...], tuple[float, ...]] = {}
        templates: dict[tuple[tuple[str, ...], bytes], tuple[float, float]] = {}

        def rank(key: Key) -> tuple[float, ...]:
            sender, template = key
            party = sender.party
            if (levels := parties.get(party)) is None:
                levels = parties[party] = tuple(
                    level.of(sender[:depth], now) for depth, level in enumerate(outer, start=1)
                )
            if (found := templates.get((party, template))) is None:
                least = 0.0 if (party, template) in self._quick else NEW_S
                used = self._templates.of((party, template), now) + least
                found = templates[party, template] = least, used
            least, used = found
            if least:
                levels = tuple(max(least, each) for each in levels)
            return (*levels, max(least, connections.of(sender, now)), used)

        return rank


class _Used(Recent[N, tuple[float, float]]):
    """Used CPU seconds by name, with the time when they were counted; they decay."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(_KNOWN)
        self._clock = clock

    def add(self, name: N, seconds: float) -> None:
        if seconds > 0:
            self[name] = self.of(name) + seconds, self._clock()

    def of(self, name: N, now: float | None = None) -> float:
        if (counted := self.get(name)) is None:
            return 0.0
        seconds, at = counted
        since = (self._clock() if now is None else now) - at
        return float(seconds * 0.5 ** (since / _HALF_LIFE_S))


class Turns:
    """Lets one rendering at a time use a process. Belongs to one event loop."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._busy: Key | None = None
        self._queue: FairQueue[Key, asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def turn(self, key: Key) -> AsyncIterator[None]:
        """Wait for the key's turn, and hold the process exclusively. Raises QueueFull."""
        if self._busy is not None:
            await self._wait(key, self._busy)
        self._busy = key
        try:
            yield
        finally:
            self._next()

    async def _wait(self, key: Key, busy: Key) -> None:
        if self._queue.waiting(key) >= MAX_WAITING:
            raise QueueFull(
                f"{MAX_WAITING} chats of this caller are waiting for the same slow chat "
                "template: retry later, or send `prompt`",
                retry_after_s=1.0,
            )
        self._accounts.begin(key, (busy, *self._queue))
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

    def _next(self) -> None:
        """Pass the turn to the next waiter; the process stays busy until it takes over."""
        while (waiter := self._queue.pop(self._accounts.ranks())) is not None:
            if not waiter.done():
                waiter.set_result(None)
                return
            # Its caller has left; others may have left too: drop them all at once.
            self._queue.drop(asyncio.Future.done)
        self._busy = None


# -------------------- options
# The options that a caller may give a chat template, apart from the messages.

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

EFFORTS: Final[tuple[str, ...]] = get_args(Effort)

MAX_KWARGS: Final = 16 << 10
"""Most characters of a template's variables as JSON, so that loops over them stay short."""

MAX_DEPTH: Final = 64
"""Deepest nesting of lists and objects in them."""

_OWN: Final = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
)
"""Names that only the server sets."""


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """Options for rendering messages.

    Attributes:
        kwargs: variables of the template, as JSON values. They cannot replace the messages or
            the base's special tokens.
        add_generation_prompt: begin an answer of the assistant after the messages.
        continue_final: leave the last message open, so that the output continues it.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final: bool = False

    def __post_init__(self) -> None:
        for name in _OWN:
            if name in self.kwargs:
                raise _invalid("template.kwargs", f"may not set {name}: send it as a field")
        too_long = _invalid(
            "template.kwargs", f"has more than {MAX_KWARGS} characters as JSON: send less"
        )
        if longer_as_json(self.kwargs, MAX_KWARGS):
            raise too_long
        if _nested(self.kwargs) > MAX_DEPTH:
            raise _invalid(
                "template.kwargs", f"is nested more than {MAX_DEPTH} deep: flatten it"
            )
        if self.kwargs and len(json.dumps(self.kwargs)) > MAX_KWARGS:
            raise too_long
        if self.continue_final and self.add_generation_prompt:
            raise _invalid(
                "template.continue_final_message",
                "excludes add_generation_prompt: an answer continues the last message or "
                "follows it; set one of them",
            )

    @classmethod
    def of(
        cls,
        kwargs: Mapping[str, Any],
        effort: str | None,
        add_generation_prompt: bool | None,
        continue_final: bool,
    ) -> TemplateOptions:
        """Make the options from a caller's values; None means unset.

        As in vLLM, an effort is passed on as ``reasoning_effort``, and as ``enable_thinking``
        for templates that only know that.

        Raises:
            InvalidField: a value is outside its range, or two exclude each other.
        """
        if effort is not None:
            if effort not in EFFORTS:
                raise _invalid(
                    "template.reasoning_effort",
                    f"is {effort[:40]!r}: give one of {', '.join(EFFORTS)}",
                )
            kwargs = {
                "enable_thinking": effort != "none",
                **kwargs,
                "reasoning_effort": effort,
            }
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final
        return cls(kwargs, add_generation_prompt, continue_final)


def kwargs_of(text: str) -> dict[str, Any]:
    """Parse the variables of a template from a JSON object.

    Raises:
        InvalidField: it is not a JSON object, or too long.
    """
    found: object = None
    if len(text) <= MAX_KWARGS:
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(text, parse_constant=_no_constant)
            json.dumps(read, ensure_ascii=False).encode()  # a lone surrogate raises ValueError
            found = read
    if not isinstance(found, dict):
        raise _invalid(
            "template.kwargs",
            f"is not a JSON object of at most {MAX_KWARGS} characters: send one",
        )
    return found


def longer_as_json(value: object, most: int) -> bool:
    """Whether a value certainly takes more than ``most`` characters as JSON.

    Writing the JSON is one call, which holds the GIL however long it takes. So the characters
    are counted first, up to ``most``. The count is a lower bound: fractions, commas and escapes
    are undercounted.
    """
    left, todo = most, [value]
    while todo and left >= 0:
        one = todo.pop()
        if isinstance(one, dict):
            left -= 4 * len(one)
            if left >= 0:
                left -= sum(map(len, one))
                todo.extend(one.values())
        elif isinstance(one, list):
            left -= 2 * len(one)
            if left >= 0:
                todo.extend(one)
        elif isinstance(one, str):
            left -= len(one)
        elif isinstance(one, int):
            left -= max(0, one.bit_length() - 1) // 4
    return left < 0


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _nested(value: object) -> int:
    """How deeply a JSON value is nested, counted up to `MAX_DEPTH` + 1."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inside = [each for each in level if isinstance(each, list | dict)]
        level = [
            inner
            for each in inside
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        depth += bool(inside)
        if not inside:
            break
    return depth


def _invalid(field: str, problem: str) -> InvalidField:
    return InvalidField(f"{field} {problem}", metadata={"field": field})
