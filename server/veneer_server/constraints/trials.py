"""The queue of constraints to try, and a cache of outcomes. No I/O.

Senders take turns: tenants, within each tenant its keys, and so on (`Sender`), so that many
connections of one sender share one turn. One sender may use all workers but one. For this
rule, a sender is a tenant once several tenants have asked; else a key or host once several have
asked; else a connection. So one sender's constraints, however many and slow, never delay
another sender's by more than that sender's own. A constraint is tried once for all senders, and
its outcome is cached.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from veneer_server.constraints.frames import Limit
from veneer_server.queues.fair_queue import SenderQueue
from veneer_server.queues.fairness import Sender
from veneer_server.wire.messages import Constraint

REMEMBERED: Final = 1024
"""Outcomes in the cache (LRU): some 500 bytes each, whatever the constraint's size."""

TOO_SLOW_FOR_S: Final = 300.0
"""Seconds that an outcome due to CPU time is cached: other load on the machine increases it."""

_BY_TIME: Final[tuple[Limit, ...]] = ("compile_seconds", "mask_seconds")


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
    """A constraint to try: the waiting sequences with their senders, and, while it runs, the
    sender whose turn it uses. Before it runs, it is in the queue of each of the senders."""

    waiting: dict[int, Sender] = field(default_factory=dict)
    running_for: Sender | None = None


class Trials:
    """The queue of trials and their outcomes.

    Args:
        workers: maximum number of trials that run at once.
        clock: monotonic seconds.
    """

    def __init__(self, workers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._workers = workers
        self._clock = clock
        self._jobs: dict[Constraint, _Job] = {}
        self._waits_for: dict[int, Constraint] = {}
        self._queue: SenderQueue[Constraint] = SenderQueue()
        self._first: Sender | None = None
        """The first sender that asked."""
        self._depth = len(Sender._fields)
        """Number of leading fields of a `Sender` that together may not use all workers: up to
        the outermost field in which the senders so far differ."""
        self._known: OrderedDict[bytes, tuple[Outcome, float]] = OrderedDict()
        """Outcomes, and the time until which each is valid."""

    def __len__(self) -> int:
        """Number of constraints waiting or running."""
        return len(self._jobs)

    def ask(self, sequence: int, constraint: Constraint, sender: Sender) -> Outcome | None:
        """Return the cached outcome; else queue the constraint for this sequence and return
        None."""
        key = _key(constraint)
        known, until = self._known.get(key, (None, 0.0))
        if known is not None and self._clock() < until:
            self._known.move_to_end(key)
            return known
        job = self._jobs.setdefault(constraint, _Job())
        if job.running_for is None and sender not in job.waiting.values():
            self._queue.push(sender, constraint)
        job.waiting[sequence] = sender
        self._waits_for[sequence] = constraint
        self._first = self._first or sender
        alike = (sender[:n] == self._first[:n] for n in range(1, self._depth))
        self._depth = 1 + sum(alike)
        return None

    def leave(self, sequence: int) -> Constraint | None:
        """Stop waiting for a sequence's outcome. A constraint that is running but no longer
        needed is dropped here and returned, so that its trial can be stopped."""
        constraint = self._waits_for.pop(sequence, None)
        if constraint is None:
            return None
        job = self._jobs[constraint]
        sender = job.waiting.pop(sequence)
        if job.running_for is None and sender not in job.waiting.values():
            self._queue.remove(sender, constraint)
        if job.waiting:
            return None
        del self._jobs[constraint]
        return constraint if job.running_for is not None else None

    def start(self) -> Constraint | None:
        """Take the next constraint, which then counts as running; None if none may run."""
        running = [
            job.running_for for job in self._jobs.values() if job.running_for is not None
        ]
        if len(running) >= self._workers:
            return None
        share = max(1, self._workers - 1)

        def may(sender: Sender) -> bool:
            mine = sender[: self._depth]
            return sum(mine == each[: self._depth] for each in running) < share

        if (found := self._queue.pop(may)) is None:
            return None
        sender, constraint = found
        job = self._jobs[constraint]
        job.running_for = sender
        for other in {*job.waiting.values()} - {sender}:
            self._queue.remove(other, constraint)
        return constraint

    def again(self, constraint: Constraint) -> bool:
        """Put a constraint at the front of its senders' queues, since its trial ended through
        no fault of its own. Returns False if no sequence waits for it any more."""
        job = self._jobs.get(constraint)
        if job is None or job.running_for is None:
            return False
        job.running_for = None
        for sender in {*job.waiting.values()}:
            self._queue.push(sender, constraint, first=True)
        return True

    def end(self, constraint: Constraint, outcome: Outcome) -> list[int]:
        """Record the outcome of a trial. Returns the sequences that waited for it."""
        if outcome.lasting:
            by_time = outcome.limit in _BY_TIME
            until = self._clock() + TOO_SLOW_FOR_S if by_time else math.inf
            self._known[_key(constraint)] = outcome, until
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
