"""The queue of constraints to try, and a cache of outcomes. No I/O.

Callers take turns. Each may use all workers but one, so that one caller's constraints,
however many and slow, never delay another's by more than its own. A constraint is tried
once, whoever asks for it, and its outcome is cached.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

from veneer_server.constraints.frames import Limit
from veneer_server.wire.messages import Constraint

__all__ = ["REMEMBERED", "Outcome", "Trials"]

REMEMBERED: Final = 1024
"""Outcomes in the cache (LRU): some 500 bytes each, whatever the constraint's size."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a trial. ``problem`` is empty if the constraint may be used.

    Attributes:
        compile_seconds, mask_seconds: CPU time; 0 if the trial did not get that far.
        lasting: the trial would end the same way again, so the outcome may be cached.
    """

    limit: Limit = ""
    problem: str = ""
    compile_seconds: float = 0.0
    mask_seconds: float = 0.0
    lasting: bool = True


@dataclass(slots=True)
class _Job:
    """A constraint to try: the waiting sequences with their callers, and, while it runs, the
    caller whose turn it uses."""

    waiting: dict[int, str] = field(default_factory=dict)
    running_for: str | None = None


class Trials:
    """The queue of trials and their outcomes.

    Args:
        workers: trials that run at once.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._jobs: dict[Constraint, _Job] = {}
        self._waits_for: dict[int, Constraint] = {}
        self._queues: OrderedDict[str, deque[Constraint]] = OrderedDict()
        """By caller; the one whose turn is next comes first."""
        self._known: OrderedDict[bytes, Outcome] = OrderedDict()

    def __len__(self) -> int:
        """Number of constraints waiting or running."""
        return len(self._jobs)

    def ask(self, sequence: int, constraint: Constraint, caller: str) -> Outcome | None:
        """The cached outcome; else None, and the constraint is queued for this sequence."""
        key = _key(constraint)
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        job = self._jobs.setdefault(constraint, _Job())
        if job.running_for is None and caller not in job.waiting.values():
            self._queues.setdefault(caller, deque()).append(constraint)
        job.waiting[sequence] = caller
        self._waits_for[sequence] = constraint
        return None

    def leave(self, sequence: int) -> Constraint | None:
        """Stop waiting for a sequence's outcome. A constraint that is running but no longer
        needed is dropped here and returned, so that its trial can be stopped."""
        constraint = self._waits_for.pop(sequence, None)
        if constraint is None:
            return None
        job = self._jobs[constraint]
        del job.waiting[sequence]
        if job.waiting:
            return None
        del self._jobs[constraint]
        return constraint if job.running_for is not None else None

    def start(self) -> Constraint | None:
        """The next constraint to run, which then counts as running; None if none may run."""
        running = [
            job.running_for for job in self._jobs.values() if job.running_for is not None
        ]
        if len(running) >= self._workers:
            return None
        share = max(1, self._workers - 1)
        for caller in list(self._queues):
            if running.count(caller) >= share:
                continue
            constraint = self._pop(caller)
            if constraint is not None:
                self._jobs[constraint].running_for = caller
                return constraint
        return None

    def _pop(self, caller: str) -> Constraint | None:
        """The caller's next constraint that still has to run; this uses the caller's turn."""
        queue = self._queues[caller]
        while queue:
            constraint = queue.popleft()
            job = self._jobs.get(constraint)
            if job is None or job.running_for is not None or caller not in job.waiting.values():
                continue
            self._queues.move_to_end(caller)
            return constraint
        del self._queues[caller]
        return None

    def again(self, constraint: Constraint) -> bool:
        """Put a constraint whose trial ended through no fault of its own at the front of its
        caller's queue. False if no sequence waits for it any more."""
        job = self._jobs.get(constraint)
        if job is None or job.running_for is None:
            return False
        caller, job.running_for = job.running_for, None
        if caller not in job.waiting.values():
            caller = next(iter(job.waiting.values()))
        self._queues.setdefault(caller, deque()).appendleft(constraint)
        return True

    def end(self, constraint: Constraint, outcome: Outcome) -> list[int]:
        """Record the outcome of a trial. Returns the sequences that waited for it."""
        if outcome.lasting:
            self._known[_key(constraint)] = outcome
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        job = self._jobs.pop(constraint, None)
        if job is None:
            return []
        for sequence in job.waiting:
            del self._waits_for[sequence]
        return list(job.waiting)


def _key(constraint: Constraint) -> bytes:
    return hashlib.sha256(f"{constraint.kind}\0{constraint.text}".encode()).digest()
