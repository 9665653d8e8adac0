"""Who takes part in the next step. Pure Python: no torch, no clock, no I/O.

The order of a step: every running sequence that decodes gets its one token, so a
stream is never left out; then running prefills get a chunk each, oldest first;
then waiting sequences start in the order that `Admission` gives, while tokens,
places and KV blocks last. A step that decodes computes few prompt tokens beside
(`prefill_beside_decode`), since every stream waits for the whole step.

When KV blocks run out, the sequence that started last gives up its own and goes
back to the head of the queue. The one that started first is never preempted and a
sequence that can never fit is refused before it gets here, so something always
ends, and everything does in turn.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from itertools import islice

from veneer_server.engine import integrity
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.residency.tiers import Action
from veneer_server.engine.scheduling.admission import Admission
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.prefill_room import PrefillRoom
from veneer_server.engine.scheduling.sequence import (
    Finish,
    Sequence,
    SequenceState,
    plan_sequence,
)
from veneer_server.engine.scheduling.step_limits import SchedulerLimits
from veneer_server.engine.scheduling.updates import PrefixLookups, Update
from veneer_server.step.plan import Following, PlannedSequence, SequenceResult, StepPlan

__all__ = ["Scheduler"]


class Scheduler:
    """Owns all sequences from `add` to their end.

    Everything a sequence grips (lease, hold, blocks, place) is given back in
    `_end`, whatever ended it.

    Attributes:
        admission: in what order those that wait start.
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
        self._held: set[int] = set()
        """Sequences that are left out of steps until `unhold`."""
        self.admission = Admission(
            residency, patience=limits.patience, max_wait=limits.max_wait
        )
        self._lookups = PrefixLookups()
        self._preempted = False

    # --------------------------------------------------------------- inspection

    @property
    def queue(self) -> tuple[Sequence, ...]:
        """Sequences that wait: by arrival, preempted ones first."""
        return tuple(self._waiting)

    @property
    def batch(self) -> tuple[Sequence, ...]:
        """Sequences that run, in the order in which they started."""
        return tuple(self._running.values())

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_for_adapter(self) -> int:
        return sum(1 for s in self._waiting if not self.admission.resident(s))

    @property
    def running_adapters(self) -> tuple[str, ...]:
        """Weights digests, sorted."""
        return _digests(self._running.values())

    @property
    def waiting_adapters(self) -> tuple[str, ...]:
        """Weights digests, sorted."""
        return _digests(self._waiting)

    def least_tokens(self, sequence: Sequence) -> tuple[int, int]:
        """Tokens that must be computed before a sequence that is not queued yet can have
        its first token, if nothing ends early: its own, and those of running sequences.

        Never too many: those that wait are left out, since any of them may be passed
        over, and so is what can be preempted, since that may be overtaken.
        """
        known, ahead, longest = self.blocks.cached_prefix(sequence), 0, 0
        for other in self._running.values():
            # Preempted is who finds no room beside those that started before it.
            request = other.request
            longest += self.blocks.blocks_for(len(request.prompt) + request.max_tokens)
            if longest <= self.blocks.total:
                # In each step they take this much before anything is left to start on.
                ahead += PrefillRoom(other.remaining, self.limits.exact).chunk(other)
            # What it is going to publish is computed once, for both.
            known = max(known, self.blocks.common_prefix(sequence, other))
        return max(1, sequence.prompt_length - known), ahead

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
        self._held.discard(sequence.id)
        return self.residency.release(sequence.digest) if sequence.digest else []

    def unhold(self, sequence_id: int) -> None:
        """A sequence whose constraint was late may take part in steps again."""
        self._held.discard(sequence_id)

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
        first = islice(self._waiting, self.limits.max_running)
        near = len({s.digest for s in first if s.digest is not None})
        plan = self.residency.plan(list(wanted), self.admission.lacking_too_long(now), near)
        self.admission.note_lack_of_room(plan.blocked, now)
        return plan.actions, plan.impossible

    # ---------------------------------------------------------------- the step

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None if no sequence can go on."""
        self._preempted = False
        chosen: dict[int, PlannedSequence] = {}
        started = [s for s in self._running.values() if s.id not in self._held]
        for sequence in (s for s in started if s.remaining == 1):
            self._choose(sequence, 1, chosen)
        room = PrefillRoom.beside(chosen, self.limits)
        for sequence in (s for s in started if s.remaining > 1):
            remaining, count = sequence.remaining, room.chunk(sequence)
            taken = self._choose(sequence, count, chosen) if count else 0
            room.take(taken, remaining, sequence.computed)
        # A step that preempted has no blocks to spare: admitting would only thrash.
        for sequence in () if self._preempted else self._candidates(now):
            if sequence.id in self._held:
                continue
            if len(self._running) >= self.limits.max_running:
                break
            count = self._start(sequence, room, now)
            if not count:
                break
            chosen[sequence.id] = plan_sequence(sequence, count)
            room.take(count, sequence.remaining, sequence.computed)
        if not chosen:
            return None
        # A stable sort: within an adapter, order of arrival.
        return StepPlan(tuple(sorted(chosen.values(), key=lambda p: p.digest or "")))

    def _choose(
        self, sequence: Sequence, count: int, chosen: dict[int, PlannedSequence]
    ) -> int:
        """Take a running sequence into the step: tokens it computes, 0 if it is preempted."""
        if sequence.state is not SequenceState.RUNNING:
            return 0  # preempted for an older one a moment ago
        if not self._grow_or_preempt(sequence, count, chosen):
            return 0
        chosen[sequence.id] = plan_sequence(sequence, count)
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

    def _candidates(self, now: float) -> list[Sequence]:
        return self.admission.order(
            self._waiting,
            in_batch={s.digest for s in self._running.values() if s.digest is not None},
            places=self.limits.max_running - len(self._running),
            now=now,
        )

    def _start(self, sequence: Sequence, room: PrefillRoom, now: float) -> int:
        """Let a waiting sequence run: tokens it computes, 0 if there is no room or there
        are no blocks for it."""
        sequence.computed = self.blocks.adopt(sequence)
        count = room.chunk(sequence)
        # Those that run will each want a block soon: without one to spare for them, this
        # one would be preempted a few steps later, and its work lost.
        spare = len(self._running)
        if not count or not self.blocks.grow(sequence, sequence.computed + count, spare=spare):
            self.blocks.release(sequence)
            sequence.computed = 0
            return 0
        if sequence.digest is not None:
            held = self.residency.try_hold(sequence.digest)
            assert held, "a sequence was admitted without its adapter"
        self._waiting.remove(sequence)
        if sequence.admitted is None:
            sequence.admitted = now
            sequence.cached_tokens = sequence.computed
            if self.blocks.shares(sequence):
                self._lookups = PrefixLookups(
                    self._lookups.asked + sequence.prompt_length,
                    self._lookups.found + sequence.cached_tokens,
                )
        sequence.state = SequenceState.RUNNING
        self._running[sequence.id] = sequence
        return count

    def take_lookups(self) -> PrefixLookups:
        """What was asked of the prefix cache since the last call."""
        lookups, self._lookups = self._lookups, PrefixLookups()
        return lookups

    def update(
        self, plan: StepPlan, results: tuple[SequenceResult, ...]
    ) -> tuple[list[Update], list[Action]]:
        """Apply a step's tokens; ends sequences that stop. Sequences cancelled while the step
        ran are not in the answer. The actions are to be carried out next."""
        updates: list[Update] = []
        actions: list[Action] = []
        for planned, result in zip(plan.sequences, results, strict=True):
            sequence = self._running.get(planned.sequence)
            if sequence is None:
                continue
            if result.following is Following.LATE:
                self._held.add(sequence.id)
                if result.token is None and result.finite:
                    continue  # as if the step had been without it: it computes the same again
            sequence.computed = planned.start + len(planned.tokens)
            sequence.prompt_logprobs.extend(result.scores)
            sequence.prompt_top_logprobs.extend(result.score_tops)
            if not result.finite:
                self.blocks.forget(sequence)
            if result.failure is not None or not result.finite:
                actions += self._end(sequence)
                updates.append(
                    Update(
                        sequence,
                        None,
                        None,
                        False,
                        None,
                        finite=result.finite,
                        failure=result.failure,
                    )
                )
                continue
            self.blocks.publish(sequence)
            if (token := result.token) is None and result.following is Following.COMPLETE:
                actions += self._end(sequence)
                updates.append(Update(sequence, None, None, False, Finish.STOP))
            if token is None:
                continue
            sequence.tokens.append(token)
            finish = self._finish(sequence, token, result.following is Following.COMPLETE)
            first = sequence.generated == 1
            logprob, tops = result.logprob, result.tops
            updates.append(Update(sequence, token, logprob, first, finish, tops=tops))
            if finish is not None:
                actions += self._end(sequence)
        return updates, actions

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

    def check_unused(self) -> None:
        """While there is no sequence, nothing is kept for one: no place, block, lease or
        hold. Costs nothing, so that it can follow every message."""
        assert not self._by_id, "a sequence that neither runs nor waits"
        self.blocks.check_unused()
        self.residency.check_unused()

    def check_integrity(self) -> None:
        """Blocks, holds, leases and queues agree; raises AssertionError."""
        integrity.run(self.integrity())

    def integrity(self) -> Iterator[None]:
        """`check_integrity` in slices, see the module `integrity`."""
        running, waiting = list(self._running.values()), list(self._waiting)
        assert {s.id for s in running} | {s.id for s in waiting} == set(self._by_id)
        assert all(not s.blocks for s in waiting), "a waiting sequence owns KV blocks"
        assert self._held <= set(self._by_id), "a sequence that has ended is held"
        yield from self.blocks.integrity(running)
        yield from self.residency.integrity(
            held=[s.digest for s in running if s.digest],
            leased=[s.digest for s in self._by_id.values() if s.digest],
        )


def _digests(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({s.digest for s in sequences if s.digest is not None}))
