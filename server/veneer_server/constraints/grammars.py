"""Constrained output as the engine sees it: which tokens a sequence may have next.

The engine does not compile or follow callers' constraints itself: if the library hung, ran
out of memory, panicked or aborted on one of them, every stream would end. A constraint is
first tried in a separate child process under limits of CPU time and memory (`Tryouts`). Then
one of two matcher processes compiles it again and follows the sequence (`Matchers`): it
computes the next mask while the step runs. Steps do not wait for a late mask; they leave its
sequence out until the mask arrives.
"""

from __future__ import annotations

import logging
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from veneer_registry.errors import InvalidField

from veneer_server.constraints.family import MatcherChild, MatcherFamily, Sockets
from veneer_server.constraints.frames import (
    LONGEST,
    Advanced,
    ChildEnded,
    ConstraintCompiled,
    Masks,
    MatchingFailed,
    MatchingSetup,
    ParentReady,
    Role,
    TrialVerdict,
    receive,
)
from veneer_server.constraints.matched import (
    SLOW_MASK_S,
    SLOW_TRIAL_S,
    MatchedSequence,
    refusal,
)
from veneer_server.constraints.matchers import Matchers
from veneer_server.constraints.trials import Outcome
from veneer_server.constraints.tryouts import Tryouts
from veneer_server.queues.fairness import NOBODY, Sender
from veneer_server.step.plan import ConstraintFailure, ConstraintState
from veneer_server.wire.messages import (
    Constraint,
    ConstraintDone,
    ConstraintLimits,
    MatcherEnded,
)

log = logging.getLogger(__name__)

_READY_S: Final = 60.0
"""Time within which the parent process must load its tokenizer; else it is restarted."""

_STEADY_S: Final = 10.0
_PAUSE_S: Final = 2.0
"""A parent process that ran for less than `_STEADY_S` is restarted after `_PAUSE_S`."""


class GrammarFailed(Exception):
    """A sequence's constraint cannot be followed any further."""

    def __init__(self, failure: ConstraintFailure) -> None:
        super().__init__(failure.problem)
        self.failure = failure


class Grammars:
    """All constrained sequences. Thread-safe; one lock guards everything.

    Args:
        unhold: called when a sequence that was LATE in `allowed` or `advance` can continue.
        report: called with the outcome of each constraint, for metrics.
    """

    def __init__(
        self,
        setup: MatchingSetup,
        *,
        unhold: Callable[[int], None],
        report: Callable[[ConstraintDone | MatcherEnded], None] = lambda message: None,
    ) -> None:
        self._vocab_size = setup.vocab_size
        self._report = report
        self._news = threading.Condition()
        self._followed: dict[int, MatchedSequence] = {}
        self._children: dict[int, MatcherChild] = {}
        self._family = MatcherFamily(setup)
        self._tryouts = Tryouts(setup.limits, self._fork, self._tried)
        self._matchers = Matchers(
            setup,
            fork=self._fork,
            followed=self._followed,
            unhold=unhold,
            report=report,
        )
        self._sockets = Sockets()
        self._stop = threading.Event()
        self._lost = False
        self._started_at = 0.0
        self._ready = False
        self._thread = threading.Thread(target=self._watch, name="constraints", daemon=True)

    # -------------------------------------------------------------------- lifecycle

    @classmethod
    def of_base(
        cls,
        folder: Path,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        limits: ConstraintLimits,
        unhold: Callable[[int], None],
        report: Callable[[ConstraintDone | MatcherEnded], None] = lambda message: None,
    ) -> Grammars:
        """Start loading a base folder's ``tokenizer.json``; see `usable`."""
        path = str(folder / "tokenizer.json")
        grammars = cls(
            MatchingSetup(path, vocab_size, list(eos_token_ids), limits),
            unhold=unhold,
            report=report,
        )
        grammars._start()
        return grammars

    def usable(self) -> bool:
        """Wait for the tokenizer. If it cannot be used, closes everything and returns False.

        Must be called once, before any other method.
        """
        self._family.control.settimeout(_READY_S)
        try:
            answer = self._family.receive()
        except TimeoutError:
            answer = None
        if not isinstance(answer, ParentReady) or answer.error:
            problem = answer.error if isinstance(answer, ParentReady) else "its process ended"
            log.warning("constrained output is not available with this base: %s", problem)
            self.close()
            return False
        self._ready = True
        self._sockets.add_parent(self._family)
        self._matchers.prepare()
        self._thread.start()
        return True

    def close(self) -> None:
        """End all processes. Waiting sequences get no callback."""
        self._stop.set()
        self._sockets.poke()
        if self._thread.is_alive():
            self._thread.join()
        self._family.end()
        for child in self._children.values():
            child.close()
        self._sockets.close()

    def __len__(self) -> int:
        """Number of constrained sequences."""
        return len(self._followed)

    # -------------------------------------------------------- for the loop and the runner

    def compile(
        self,
        sequence: int,
        constraint: Constraint,
        done: Callable[[InvalidField | None], None],
        sender: Sender = NOBODY,
    ) -> None:
        """Prepare a sequence. ``done`` is called with an error or None: in another thread, or
        in this one if the outcome is already known. Call `forget` in the end either way.
        """
        with self._news:
            followed = MatchedSequence(sequence, constraint, done)
            self._followed[sequence] = followed
            outcome = self._tryouts.ask(sequence, constraint, sender)
            if outcome is not None:
                self._follow(followed, outcome)
        self._sockets.poke()

    def forget(self, sequence: int) -> None:
        """Drop a sequence that has ended; does nothing if it has no constraint."""
        with self._news:
            followed = self._followed.pop(sequence, None)
            if followed is None:
                return
            self._tryouts.leave(sequence)
            self._matchers.forget(followed)
        self._sockets.poke()

    def allowed(self, sequence: int, until: float) -> NDArray[np.bool_] | ConstraintState:
        """Tokens that may come next: [vocab] bool, at least one of them True.

        Args:
            until: time on the monotonic clock at which to stop waiting. If the mask is not
                known by then, the answer is LATE, and the sequence is held until `unhold`.

        Raises:
            GrammarFailed: a limit was exceeded, or nothing may follow.
        """
        with self._news:
            followed = self._followed[sequence]
            self._await([followed], lambda f: f.ready, until)
            if followed.failure is not None:
                raise GrammarFailed(followed.failure)
            if followed.stopped:
                return ConstraintState.COMPLETE
            if not followed.ready:
                followed.held = True
                return ConstraintState.LATE
            bits = followed.bits
        mask = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")
        return mask[: self._vocab_size].view(np.bool_)

    def ready(self, sequence: int, until: float) -> bool:
        """Whether `allowed` would return a mask; waits for it until ``until``. Unlike
        `allowed`, this does not hold the sequence."""
        with self._news:
            followed = self._followed[sequence]
            self._await([followed], lambda f: f.ready, until)
            failed = followed.failure is not None or followed.stopped
            return followed.ready and not failed

    def advance(self, chosen: dict[int, int], until: float) -> dict[int, ConstraintState]:
        """Give each sequence the token that was chosen for it.

        Returns:
            COMPLETE for sequences that allow no further token, LATE for those held until
            `unhold`, GOES_ON for the rest. If a sequence is not known to be complete by
            ``until``, `allowed` says so later.
        """
        with self._news:
            followed = [self._followed[sequence] for sequence in chosen]
            self._matchers.advance(followed, chosen)
            if any(child.backlog for child in self._children.values()):
                self._sockets.poke()
            quick = [f for f in followed if not f.slow]
            self._await(quick, lambda f: f.confirmed == len(f.tokens) or f.ready, until)
            return {f.sequence: f.how() for f in followed}

    def ending(self, sequence: int) -> ConstraintFailure | ConstraintState:
        """The state of a sequence that was held, or why it cannot continue."""
        with self._news:
            followed = self._followed.get(sequence)
            if followed is None:
                return ConstraintState.GOES_ON
            return followed.failure or followed.how()

    def _await(
        self,
        followed: list[MatchedSequence],
        known: Callable[[MatchedSequence], bool],
        until: float,
    ) -> None:
        """Wait until ``known`` holds for all sequences that are not slow, at most until
        ``until``."""
        while not all(f.slow or known(f) for f in followed):
            if not self._news.wait(until - time.monotonic()):
                return

    # ------------------------------------------------------------------- under the lock

    def _follow(self, followed: MatchedSequence, outcome: Outcome) -> None:
        """Have a sequence followed after its trial, or refuse it."""
        if outcome.problem:
            done, followed.done = followed.done, None
            if done is not None:
                done(refusal(followed.constraint, outcome.limit, outcome.problem))
            return
        followed.slow = (
            outcome.mask_seconds > SLOW_MASK_S or outcome.compile_seconds > SLOW_TRIAL_S
        )
        self._matchers.follow(followed)

    def _tried(self, outcome: Outcome, sequences: list[int]) -> None:
        invalid = bool(outcome.problem) and not outcome.limit
        self._report(
            ConstraintDone(
                "trial",
                "invalid" if invalid else outcome.limit or "ok",
                outcome.compile_seconds,
            )
        )
        for sequence in sequences:
            self._follow(self._followed[sequence], outcome)

    def _fork(self, role: Role) -> MatcherChild:
        child = self._family.fork(role)
        self._children[child.number] = child
        self._sockets.add_child(child)
        return child

    # ----------------------------------------------------------------- the watching thread

    def _start(self) -> None:
        self._started_at = time.monotonic()
        self._family.start()

    def _watch(self) -> None:
        buffer = bytearray(LONGEST)
        while not self._stop.is_set():
            if self._lost:
                self._revive()
                continue
            with self._news:
                timeout = self._prepare(time.monotonic())
            events = self._sockets.wait(timeout)
            with self._news:
                for child, mask in events:
                    if child is None:
                        self._hear_parent()
                        continue
                    if child.number not in self._children:
                        continue  # removed by an earlier event in this loop
                    if mask & selectors.EVENT_WRITE:
                        child.flush()
                    if mask & selectors.EVENT_READ:
                        self._hear(child, buffer)
                self._news.notify_all()

    def _prepare(self, now: float) -> float | None:
        """Do the work that is due; return the seconds until the next is due, None if never."""
        if not self._ready and now - self._started_at > _READY_S:
            self._lose_parent()
            return 0.0
        self._tryouts.tick(now)
        self._matchers.tick(now)
        self._tryouts.start(now)
        for child in self._children.values():
            self._sockets.write_too(child)
        times = [self._tryouts.next_time(), self._matchers.next_time()]
        if not self._ready:
            times.append(self._started_at + _READY_S)
        soonest = min((t for t in times if t is not None), default=None)
        return None if soonest is None else max(0.0, soonest - now) + 0.001

    def _hear(self, child: MatcherChild, buffer: bytearray) -> None:
        while True:
            try:
                message = receive(child.connection, buffer)
            except BlockingIOError:
                return
            if message is None:
                # The parent reports how it ended, which is what matters.
                self._sockets.remove(child)
                return
            if isinstance(message, ConstraintCompiled | TrialVerdict):
                self._tryouts.heard(child, message)
            elif isinstance(message, Advanced | Masks | MatchingFailed):
                self._matchers.heard(child, message)

    def _hear_parent(self) -> None:
        while True:
            try:
                message = self._family.receive()
            except BlockingIOError:
                return
            match message:
                case ParentReady(error=""):
                    self._ready = True
                case ChildEnded():
                    self._ended(self._children.pop(message.number), message.signal)
                case _:
                    self._lose_parent()
                    return

    def _ended(self, child: MatcherChild, ended_by: int) -> None:
        if self._sockets.has(child):
            self._hear(child, bytearray(LONGEST))  # messages from before it ended
        self._sockets.remove(child)
        if child.role == "trial":
            self._tryouts.ended(child, ended_by)
        else:
            self._matchers.ended(child, ended_by)
        child.close()

    def _lose_parent(self) -> None:
        """End a parent process that has died or does not answer, and all its children."""
        log.warning("the constraint processes ended; restarting them")
        self._sockets.remove(self._family)
        self._family.end()
        self._lost = True

    def _revive(self) -> None:
        """Start another parent process. Not under the lock, so that no caller waits for it."""
        pause = 0.0 if time.monotonic() - self._started_at > _STEADY_S else _PAUSE_S
        while not self._stop.wait(pause):
            try:
                self._start()
            except OSError as error:
                log.warning("the constraint processes cannot be started: %s", error)
                pause = _PAUSE_S
                continue
            with self._news:
                self._lost = self._ready = False
                self._sockets.add_parent(self._family)
                for number in list(self._children):
                    self._ended(self._children.pop(number), signal.SIGKILL)
            return
