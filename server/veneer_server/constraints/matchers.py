"""The two processes that follow sequences, and how the end of one is handled.

The quick one has normal priority. A sequence with slow masks or slow compilation moves to the
slow one, which has low priority and follows the sequence again from its tokens. When a process
ends, its successor follows its sequences again in the same way.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Literal

from veneer_server.constraints.family import MatcherChild
from veneer_server.constraints.frames import (
    Advance,
    Advanced,
    Forget,
    FromMatcher,
    Limit,
    Mask,
    Masks,
    MatchingFailed,
    MatchingSetup,
    MatchSequence,
    Role,
)
from veneer_server.constraints.matched import DEATHS, SLOW_MASK_S, MatchedSequence, refusal
from veneer_server.step.plan import ConstraintFailure
from veneer_server.wire.messages import ConstraintDone, MatcherEnded

log = logging.getLogger(__name__)

SILENCE_S: Final = 10.0
"""A process that owes an answer for this long (wall-clock time), or up to twice as long, is
replaced."""

_SILENT: Final = "silent"


class Matchers:
    """Called under the lock of `Grammars`.

    Args:
        followed: all sequences by id, including those without a process.
        unhold: called when a held sequence can continue, or has ended.
    """

    def __init__(
        self,
        setup: MatchingSetup,
        *,
        fork: Callable[[Role], MatcherChild],
        followed: Mapping[int, MatchedSequence],
        unhold: Callable[[int], None],
        report: Callable[[ConstraintDone | MatcherEnded], None],
    ) -> None:
        self._limits = setup.limits
        self._fork = fork
        self._followed = followed
        self._unhold = unhold
        self._report = report
        self._processes: dict[Role, MatcherChild] = {}
        self._quiet: set[MatcherChild] = set()
        """Processes that owed an answer at the last check and have sent nothing since."""
        self._looked_at = time.monotonic()

    # ----------------------------------------------------------------- to the processes

    def follow(self, followed: MatchedSequence) -> None:
        """Have a process follow a sequence from its tokens so far."""
        child = followed.process = self._process("slow" if followed.slow else "quick")
        followed.confirmed = 0
        for at, (tokens, last) in enumerate(followed.replay()):
            constraint = None if at else followed.constraint
            child.send(MatchSequence(followed.sequence, constraint, tokens, last))

    def forget(self, followed: MatchedSequence) -> None:
        """Tell the process that a sequence has ended."""
        if followed.process is not None:
            followed.process.send(Forget(followed.sequence))

    def advance(self, followed: Iterable[MatchedSequence], chosen: Mapping[int, int]) -> None:
        """Give each sequence its token."""
        pairs: dict[MatcherChild, list[tuple[int, int]]] = {}
        for one in followed:
            token = chosen[one.sequence]
            one.tokens.append(token)
            if one.process is not None and one.failure is None:
                pairs.setdefault(one.process, []).append((one.sequence, token))
        for child, rows in pairs.items():
            child.send(Advance(rows))

    def prepare(self) -> None:
        """Start the quick process before it is needed."""
        self._process("quick")

    def _process(self, role: Role) -> MatcherChild:
        child = self._processes.get(role)
        if child is None:
            child = self._processes[role] = self._fork(role)
        return child

    # --------------------------------------------------------------- from the processes

    def heard(self, child: MatcherChild, message: FromMatcher) -> None:
        """Handle a message from a process."""
        self._quiet.discard(child)
        match message:
            case Advanced():
                for sequence, count, stopped in message.rows:
                    if (followed := self._of(child, sequence)) is not None:
                        followed.confirmed = count
                        if stopped and count == len(followed.tokens):
                            followed.stopped = True
                            self._settled(followed)
            case Masks():
                for mask in message.rows:
                    if (followed := self._of(child, mask.sequence)) is not None:
                        self._take(followed, mask)
            case MatchingFailed():
                if (followed := self._of(child, message.sequence)) is not None:
                    self._fail(followed, message.limit, message.problem)

    def _of(self, child: MatcherChild, sequence: int) -> MatchedSequence | None:
        """The sequence, if this process still follows it."""
        followed = self._followed.get(sequence)
        return followed if followed is not None and followed.process is child else None

    def _take(self, followed: MatchedSequence, message: Mask) -> None:
        followed.confirmed = message.count
        if message.count == len(followed.tokens):
            followed.bits, followed.mask_at = message.bits, message.count
        if message.seconds > SLOW_MASK_S and not followed.slow:
            self.forget(followed)
            followed.slow = True
            self.follow(followed)
        if followed.ready:
            self._settled(followed)

    def _fail(self, followed: MatchedSequence, limit: Limit, problem: str) -> None:
        """Record that a sequence cannot be followed any further."""
        followed.failure = ConstraintFailure(limit, problem)
        followed.process = None
        self._report(ConstraintDone("generation", limit or "invalid", 0.0))
        self._settled(followed)

    def _settled(self, followed: MatchedSequence) -> None:
        """Call back for a sequence that was waiting: `done` at its start, else `unhold`."""
        if followed.done is not None:
            done, followed.done = followed.done, None
            failure = followed.failure
            done(
                None
                if failure is None
                else refusal(followed.constraint, failure.limit, failure.problem)
            )
        elif followed.held:
            followed.held = False
            self._unhold(followed.sequence)

    # ------------------------------------------------------------------ exits and silence

    def ended(self, child: MatcherChild, ended_by: int) -> None:
        """Handle the end of a process, by a signal or (0) by itself."""
        if self._processes.get(child.role) is child:
            del self._processes[child.role]
        self._quiet.discard(child)
        orphans = [f for f in self._followed.values() if f.process is child]
        guilty = self._of(child, child.job)
        cause: Literal["limit", "killed", "fault"] = "fault"
        if child.killed_for or ended_by == signal.SIGPROF:
            cause = "limit"
        elif ended_by == signal.SIGKILL:
            cause = "killed"
        log.warning("a matcher process ended (%s); moving %d sequences", cause, len(orphans))
        self._report(MatcherEnded(cause))
        if guilty is not None:
            guilty.deaths += 1
            # A first SIGKILL may have hit during that sequence's job by chance.
            if ended_by != signal.SIGKILL or guilty.deaths >= DEATHS:
                self._fail(guilty, *self._meaning(child, ended_by))
        for followed in orphans:
            if followed is not guilty or followed.failure is None:
                self.follow(followed)

    def _meaning(self, child: MatcherChild, ended_by: int) -> tuple[Limit, str]:
        """The limit and problem to report for the sequence that the process worked for."""
        if ended_by == signal.SIGPROF or child.killed_for == _SILENT:
            return (
                "mask_seconds",
                "computing the allowed next tokens takes more than "
                f"{self._limits.mask_seconds:g} s",
            )
        if ended_by == signal.SIGKILL or child.out_of_memory:
            return "memory", "applying it needs too much memory"
        return "library", "the library that applies it failed"

    def _owing(self, child: MatcherChild) -> bool:
        return any(
            not f.ready and f.process is child and f.failure is None
            for f in self._followed.values()
        )

    def next_time(self) -> float | None:
        """When `tick` is next due."""
        return self._looked_at + SILENCE_S if self._followed else None

    def tick(self, now: float) -> None:
        """End each process that owed an answer at the last check and has sent none since."""
        if now - self._looked_at < SILENCE_S:
            return
        recent = now - self._looked_at < 2 * SILENCE_S
        for child in self._quiet if recent else ():
            child.kill(_SILENT)
        self._looked_at = now
        self._quiet = {child for child in self._processes.values() if self._owing(child)}
