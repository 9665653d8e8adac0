"""Who takes part in the next step. Pure Python: no torch, no clock, no I/O.

The order of a step: every running sequence that decodes gets its one token;
running prefills get a chunk each; then waiting sequences are admitted in
arrival order while tokens, rows and KV blocks last. A waiting sequence whose
adapter is not resident is passed over, so it never blocks others; but when the
oldest one finds no *room* for its adapter for `patience` seconds, younger ones
are held back until it gets in, so traffic on resident adapters cannot starve it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from veneer_server.engine.block_manager import BlockManager
from veneer_server.engine.messages import Tops
from veneer_server.engine.residency import Action, Residency
from veneer_server.engine.sequence import (
    Finish,
    PlannedSequence,
    Sequence,
    SequenceState,
    StepPlan,
    StepResult,
)

__all__ = ["Scheduler", "SchedulerLimits", "Update"]

SCORE_CHUNK = 128
"""Most prompt tokens of one sequence in a step when their log-probabilities are
wanted: each costs a row of logits."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Attributes:
    max_batch_tokens: tokens computed in one step; at least ``max_running``.
    max_running: sequences running at once.
    context_length: longest sequence.
    patience: seconds that the oldest waiting sequence may find no room for its
        adapter before younger ones are held back.
    """

    max_batch_tokens: int
    max_running: int
    context_length: int
    patience: float = 0.5


@dataclass(frozen=True, slots=True)
class Update:
    """What a step gave one sequence.

    Attributes:
        token, logprob: the new token; None if the sequence only prefilled.
        first: it is the sequence's first token.
        finish: set if the sequence has ended.
        finite: False if its logits were not finite; it has ended.
        tops: the most likely tokens beside the new one, if asked for.
        failure: why its constraint could not be followed; it has ended.
    """

    sequence: Sequence
    token: int | None
    logprob: float | None
    first: bool
    finish: Finish | None
    finite: bool = True
    tops: Tops | None = None
    failure: str | None = None


class Scheduler:
    """Owns all sequences from `add` to their end.

    Everything a sequence grips (lease, hold, blocks, place) is given back in
    `_end`, whatever ended it.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        residency: Residency,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self.residency = residency
        self._eos = eos_token_ids
        self._waiting: deque[Sequence] = deque()
        self._running: OrderedDict[int, Sequence] = OrderedDict()
        self._by_id: dict[int, Sequence] = {}
        self._room_wait: tuple[int, float] | None = None
        """(sequence, since): the oldest one that finds no room for its adapter."""
        self._preempted = False

    # --------------------------------------------------------------- inspection

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_for_adapter(self) -> int:
        return sum(1 for s in self._waiting if not self._resident(s))

    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def using(self, digest: str) -> list[Sequence]:
        """Sequences not ended that use this adapter."""
        return [s for s in self._by_id.values() if s.digest == digest]

    # ------------------------------------------------------------- in and out

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that already holds its lease."""
        self._by_id[sequence.id] = sequence
        self._waiting.append(sequence)

    def cancel(self, sequence_id: int) -> tuple[Sequence | None, list[Action]]:
        """End a sequence now, whatever it is doing; None if it has ended already."""
        sequence = self._by_id.get(sequence_id)
        if sequence is None:
            return None, []
        return sequence, self._end(sequence)

    def _end(self, sequence: Sequence) -> list[Action]:
        """The one place where a sequence gives back everything."""
        if sequence.state is SequenceState.RUNNING:
            self._leave_running(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        del self._by_id[sequence.id]
        return self.residency.release(sequence.digest) if sequence.digest else []

    def _leave_running(self, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self.blocks.release(sequence)
        if sequence.digest is not None:
            self.residency.unhold(sequence.digest)

    # ---------------------------------------------------------------- adapters

    def plan_adapters(self, now: float) -> tuple[tuple[Action, ...], tuple[str, ...]]:
        """Loads, moves and drops to start for the waiting sequences, and the
        adapters that pins leave no room for (their sequences must be failed)."""
        wanted = dict.fromkeys(s.digest for s in self._waiting if s.digest is not None)
        plan = self.residency.plan(list(wanted))
        oldest = self._oldest_waiting_for(plan.blocked)
        if oldest is None:
            self._room_wait = None
        elif self._room_wait is None or self._room_wait[0] != oldest.id:
            self._room_wait = (oldest.id, now)
        return plan.actions, plan.impossible

    def _oldest_waiting_for(self, digest: str | None) -> Sequence | None:
        if digest is None:
            return None
        return next((s for s in self._waiting if s.digest == digest), None)

    def _resident(self, sequence: Sequence) -> bool:
        return sequence.digest is None or self.residency.tier(sequence.digest) == "device"

    # ---------------------------------------------------------------- the step

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None if no sequence can go on."""
        chosen: dict[int, PlannedSequence] = {}
        self._preempted = False
        budget = self.limits.max_batch_tokens
        # Decoding rows first: whoever streams is never left out for a prefill.
        by_need = sorted(self._running.values(), key=lambda s: s.remaining > 1)
        for sequence in by_need:
            if sequence.state is not SequenceState.RUNNING:
                continue  # preempted for an older one a moment ago
            count = self._chunk(sequence, budget)
            if count and self._grow_or_preempt(sequence, count, chosen):
                chosen[sequence.id] = _planned(sequence, count)
                budget -= count
        # A step that preempted has no blocks to spare: admitting would only thrash.
        for sequence in self._admissible(now) if not self._preempted else ():
            if not budget or len(self._running) >= self.limits.max_running:
                break
            count = self._chunk(sequence, budget)
            if not self.blocks.grow(sequence, sequence.computed + count):
                break
            self._start(sequence, now)
            chosen[sequence.id] = _planned(sequence, count)
            budget -= count
        if not chosen:
            return None
        # A stable sort: within an adapter, order of arrival.
        return StepPlan(tuple(sorted(chosen.values(), key=lambda p: p.digest or "")))

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        count = min(sequence.remaining, budget)
        if sequence.request.prompt_logprobs and sequence.computed < sequence.prompt_length:
            count = min(count, SCORE_CHUNK)
        return count

    def _grow_or_preempt(
        self, sequence: Sequence, count: int, chosen: dict[int, PlannedSequence]
    ) -> bool:
        """Blocks for ``count`` more tokens, taken from the youngest if need be."""
        while not self.blocks.grow(sequence, sequence.computed + count):
            youngest = next(reversed(self._running.values()))
            self._preempt(youngest)
            chosen.pop(youngest.id, None)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; its tokens stay, its K and V are computed anew."""
        self._preempted = True
        self._leave_running(sequence)
        sequence.state = SequenceState.WAITING
        sequence.computed = 0
        sequence.prompt_logprobs.clear()
        sequence.prompt_top_logprobs.clear()
        self._waiting.appendleft(sequence)

    def _admissible(self, now: float) -> Iterator[Sequence]:
        """Waiting sequences that may start, oldest first."""
        held_back = self._room_wait is not None and (
            now - self._room_wait[1] >= self.limits.patience
        )
        for sequence in list(self._waiting):
            if held_back and self._room_wait and sequence.id == self._room_wait[0]:
                return
            if self._resident(sequence):
                yield sequence
            elif sequence.waiting_since is None:
                sequence.waiting_since = now

    def _start(self, sequence: Sequence, now: float) -> None:
        if sequence.digest is not None:
            held = self.residency.try_hold(sequence.digest)
            assert held, "a sequence was admitted without its adapter"
        self._waiting.remove(sequence)
        if sequence.waiting_since is not None:
            sequence.load_seconds += now - sequence.waiting_since
            sequence.waiting_since = None
        if sequence.admitted is None:
            sequence.admitted = now
        sequence.state = SequenceState.RUNNING
        self._running[sequence.id] = sequence

    def update(
        self, plan: StepPlan, result: StepResult, on_actions: Callable[[list[Action]], None]
    ) -> list[Update]:
        """Apply a step's tokens; ends sequences that stop. Sequences cancelled
        while the step ran are not in the answer."""
        updates: list[Update] = []
        count = len(plan.sequences)
        for planned, token, logprob, scores, finite, tops, score_tops, complete, failure in zip(
            plan.sequences,
            result.tokens,
            result.logprobs,
            result.scores,
            result.finite,
            result.tops or (None,) * count,
            result.score_tops or ((),) * count,
            result.complete or (False,) * count,
            result.failures or (None,) * count,
            strict=True,
        ):
            sequence = self._running.get(planned.sequence)
            if sequence is None:
                continue
            sequence.computed = planned.start + len(planned.tokens)
            sequence.prompt_logprobs.extend(scores)
            sequence.prompt_top_logprobs.extend(score_tops)
            if failure is not None or not finite:
                on_actions(self._end(sequence))
                updates.append(
                    Update(sequence, None, None, False, None, finite=finite, failure=failure)
                )
                continue
            if token is None:
                continue
            sequence.tokens.append(token)
            finish = self._finish(sequence, token, complete)
            first = sequence.generated == 1
            updates.append(Update(sequence, token, logprob, first, finish, tops=tops))
            if finish is not None:
                on_actions(self._end(sequence))
        return updates

    def _finish(self, sequence: Sequence, token: int, complete: bool) -> Finish | None:
        request = sequence.request
        if complete or token in request.stop_token_ids:
            return Finish.STOP
        if token in self._eos and not request.ignore_eos:
            return Finish.STOP
        full = len(sequence.tokens) >= self.limits.context_length
        if sequence.generated >= request.max_tokens or full:
            return Finish.LENGTH
        return None

    def check_integrity(self) -> None:
        """Blocks, holds, leases and queues agree; raises AssertionError."""
        running, waiting = list(self._running.values()), list(self._waiting)
        assert {s.id for s in running} | {s.id for s in waiting} == set(self._by_id)
        assert all(not s.blocks for s in waiting), "a waiting sequence owns KV blocks"
        self.blocks.check_integrity(running)
        self.residency.check_integrity(
            held=[s.digest for s in running if s.digest],
            leased=[s.digest for s in self._by_id.values() if s.digest],
        )


def _planned(sequence: Sequence, count: int) -> PlannedSequence:
    start, end = sequence.computed, sequence.computed + count
    score: tuple[int, ...] = ()
    if sequence.request.prompt_logprobs and end <= sequence.prompt_length:
        # The token after each computed one; the last prompt token has none.
        score = tuple(sequence.tokens[start + 1 : min(end + 1, sequence.prompt_length)])
    elif sequence.request.prompt_logprobs and start < sequence.prompt_length:
        score = tuple(sequence.tokens[start + 1 : sequence.prompt_length])
    return PlannedSequence(
        sequence=sequence.id,
        digest=sequence.digest,
        tokens=tuple(sequence.tokens[start:end]),
        start=start,
        blocks=tuple(sequence.blocks),
        samples=end == len(sequence.tokens),
        score=score,
        logprobs=sequence.request.logprobs,
        sampling=sequence.request.sampling,
        position=len(sequence.tokens),
        top_logprobs=sequence.request.top_logprobs,
        history=tuple(sequence.tokens) if sequence.request.sampling.needs_history else (),
        prompt_length=sequence.prompt_length,
        constraint=sequence.request.constraint,
    )
