"""Runs each trial in a separate child, and interprets how the child ends."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from veneer_server.constraints.family import MatcherChild
from veneer_server.constraints.frames import ConstraintCompiled, FromTrial, Role
from veneer_server.constraints.trials import Outcome, Trials
from veneer_server.queues.fairness import Sender
from veneer_server.wire.messages import Constraint, ConstraintLimits

WALL_FACTOR: Final = 20
"""Wall-clock limit of a trial as a multiple of its CPU time limit."""

_TRIES: Final = 2
"""Attempts at a trial whose process is killed from outside."""

_BRIEF_S: Final = 0.05
"""How long a trial runs at normal priority: nearly all end within this time."""

_LOOK_S: Final = 0.25
"""Seconds between checks of trials that take longer."""

_CANCELLED: Final = "cancelled"
_TOO_LONG: Final = "too long"
_NO_MEMORY: Final = "no memory"


@dataclass(slots=True)
class _Run:
    child: MatcherChild
    constraint: Constraint
    began: float
    look_at: float
    nice: bool = False
    compiled: float | None = None


class Tryouts:
    """The running trials. Called under the lock of `Grammars`.

    Args:
        fork: makes a child.
        finish: called with each outcome and the sequences that waited for it.
    """

    def __init__(
        self,
        limits: ConstraintLimits,
        fork: Callable[[Role], MatcherChild],
        finish: Callable[[Outcome, list[int]], None],
    ) -> None:
        self._limits = limits
        self._fork = fork
        self._finish = finish
        self._trials = Trials(limits.workers)
        self._runs: dict[int, _Run] = {}
        self._killed: dict[Constraint, int] = {}
        """How often a trial's process was killed from outside."""

    def ask(self, sequence: int, constraint: Constraint, sender: Sender) -> Outcome | None:
        """Return the outcome if it is known; else None, and call `finish` with it later."""
        return self._trials.ask(sequence, constraint, sender)

    def leave(self, sequence: int) -> None:
        """Stop waiting for a sequence's outcome."""
        constraint = self._trials.leave(sequence)
        for run in self._runs.values() if constraint is not None else ():
            if run.constraint == constraint:
                run.child.kill(_CANCELLED)

    def start(self, now: float) -> None:
        """Start all trials that may run."""
        while (constraint := self._trials.start()) is not None:
            child = self._fork("trial")
            child.send(constraint)
            self._runs[child.number] = _Run(child, constraint, now, now + _BRIEF_S)

    def heard(self, child: MatcherChild, message: FromTrial) -> None:
        """Handle a message from a child; a verdict is its last one."""
        run = self._runs.get(child.number)
        if run is None or child.killed_for:
            return
        if isinstance(message, ConstraintCompiled):
            run.compiled = message.seconds
            return
        del self._runs[child.number]
        outcome = Outcome(
            message.limit, message.problem, run.compiled or 0.0, message.mask_seconds
        )
        self._end(run, outcome)

    def ended(self, child: MatcherChild, ended_by: int) -> None:
        """Handle the end of a child, by a signal or (0) by itself."""
        run = self._runs.pop(child.number, None)
        if run is None:
            return  # it had answered
        if child.killed_for == _CANCELLED:
            self._end(run, None)
        elif ended_by == signal.SIGKILL and not child.killed_for:
            self._try_again(run)
        else:
            self._end(run, self._meaning(run, ended_by))

    def next_time(self) -> float | None:
        """When `tick` is next due."""
        return min((run.look_at for run in self._runs.values()), default=None)

    def tick(self, now: float) -> None:
        """Lower the priority of trials that run long, and end those that take too long."""
        for run in self._runs.values():
            if now < run.look_at:
                continue
            if now - run.began > self._wall:
                run.child.kill(_TOO_LONG)
            elif run.child.out_of_memory:
                run.child.kill(_NO_MEMORY)
            if not run.nice:
                run.nice = True
                run.child.yield_to_others()
            end = run.began + self._wall
            run.look_at = min(end, now + _LOOK_S) if end > now else now + _LOOK_S

    @property
    def _wall(self) -> float:
        return WALL_FACTOR * self._limits.compile_seconds

    def _try_again(self, run: _Run) -> None:
        killed = self._killed.pop(run.constraint, 0) + 1
        if killed < _TRIES:
            if self._trials.again(run.constraint):
                self._killed[run.constraint] = killed
            return
        problem = "the process compiling it was killed, possibly out of memory"
        self._end(run, Outcome("memory", problem, lasting=False))

    def _meaning(self, run: _Run, ended_by: int) -> Outcome:
        """The outcome of a trial that ended without a verdict."""
        limits, compiled = self._limits, run.compiled or 0.0
        if run.child.killed_for == _TOO_LONG:
            problem = f"compiling it took more than {self._wall:g} s on this busy machine"
            return Outcome("compile_seconds", problem, lasting=False)
        if ended_by == signal.SIGPROF and run.compiled is None:
            problem = f"compiling it takes more than {limits.compile_seconds:g} s"
            return Outcome("compile_seconds", problem)
        if ended_by == signal.SIGPROF:
            problem = (
                f"computing the allowed next tokens takes more than {limits.mask_seconds:g} s"
            )
            return Outcome("mask_seconds", problem, compiled)
        if run.child.out_of_memory:
            problem = f"compiling it needs more than {limits.memory >> 20} MiB"
            return Outcome("memory", problem, compiled)
        return Outcome("library", "the library that compiles it failed", compiled)

    def _end(self, run: _Run, outcome: Outcome | None) -> None:
        self._killed.pop(run.constraint, None)
        if outcome is not None:
            self._finish(outcome, self._trials.end(run.constraint, outcome))
