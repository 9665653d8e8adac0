"""The scheduler: which sequences take part in the next step. No torch, no clock, no I/O.

A step is filled in this order: every running sequence that decodes gets its one token,
so that no stream is left out; then running prefills get their chunks, see
`Scheduler._continue_prompts`; then waiting sequences start in the order that `Admission`
gives, fair between tenants, while tokens, places and KV blocks last. A step that decodes
takes only a few prompt tokens (`prefill_beside_decode`), since every stream waits for the
whole step. A step without decode is limited in time, too, while there are several callers:
who comes next waits for all of it. For the same reason a token under a large adapter counts
for several, in proportion to its time, and sequences that decode under such adapters take
turns if a step with all of them would be long.

When KV blocks run out, the sequence that started last is preempted: it loses its blocks
and goes back to the head of the queue. The one that started first is never preempted,
and a sequence that can never fit is refused before it gets here, so some sequence
always ends, and in turn all of them do.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from veneer_server.engine import integrity
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.residency.tiers import Action
from veneer_server.engine.scheduling.admission import Admission
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.fair_shares import OUTPUT_COST, PROMPT_COST, FairShares
from veneer_server.engine.scheduling.prefill_room import PrefillRoom
from veneer_server.engine.scheduling.sequence import (
    Finish,
    Sequence,
    SequenceState,
    plan_sequence,
)
from veneer_server.engine.scheduling.speculation import Speculation
from veneer_server.engine.scheduling.step_limits import SEVERAL_S, SchedulerLimits
from veneer_server.engine.scheduling.updates import PrefixLookups, SequenceUpdate
from veneer_server.engine.scheduling.waiting import WaitingSequences
from veneer_server.step.plan import (
    ConstraintState,
    FurtherToken,
    PlannedSequence,
    SequenceResult,
    StepPlan,
)
from veneer_server.wire.messages import pack_tops, token_work


class Scheduler:
    """Owns all sequences from `add` to their end.

    Everything a sequence holds (lease, hold, blocks, place) is released in `_end`,
    however the sequence ends.

    Args:
        speculation: makes drafts; None if the backend's rows depend on the rows beside them, or
            speculation is off.

    Attributes:
        admission: decides in what order waiting sequences start.
        shares: the service that each tenant has had.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        residency: Residency,
        eos_token_ids: frozenset[int],
        speculation: Speculation | None = None,
    ) -> None:
        self.speculation = speculation
        self.limits = limits
        self.blocks = blocks
        self.residency = residency
        self._eos = eos_token_ids
        self.shares = FairShares()
        self._waiting = WaitingSequences(self.shares)
        self._running: OrderedDict[int, Sequence] = OrderedDict()
        self._by_id: dict[int, Sequence] = {}
        self._held: set[int] = set()
        """Ids of sequences that are left out of steps until `unhold`."""
        self.admission = Admission(
            residency, patience=limits.patience, max_wait=limits.max_wait
        )
        self._lookups = PrefixLookups()
        self._preempted = self._ahead = False
        self._turn = 0
        self._parties: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        """When each caller of the last `SEVERAL_S` last had a sequence, by `Sender.party`."""
        self._now = 0.0
        """Time of the last `schedule`."""
        self._prefilled: dict[int, Sequence] = {}
        """Sequences with part of their prompt computed and no token yet, by id, for
        `take_prefilled`."""

    # --------------------------------------------------------------- inspection

    @property
    def queue(self) -> tuple[Sequence, ...]:
        """Waiting sequences in order of arrival, preempted ones first."""
        return tuple(self._waiting)

    @property
    def batch(self) -> tuple[Sequence, ...]:
        """Running sequences, in the order in which they started."""
        return tuple(self._running.values())

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_for_adapter(self) -> int:
        """Number of waiting sequences whose adapter is not ready in DEVICE."""
        ready = self.residency.ready_among(self._waiting.keys)
        return len(self._waiting) - sum(map(self._waiting.count, (None, *ready)))

    @property
    def running_adapters(self) -> tuple[str, ...]:
        """Weights digests, sorted."""
        return _digests(self._running.values())

    @property
    def waiting_adapters(self) -> tuple[str, ...]:
        """Weights digests, sorted: at most `planned_adapters`, the longest waiting ones of
        each tenant."""
        return tuple(sorted(self._waiting.wanted(0, self.limits.planned_adapters)[0]))

    def least_tokens(self, sequence: Sequence) -> tuple[int, int]:
        """Return a lower bound on the tokens to compute before a sequence that is not queued
        yet can get its first token, if nothing ends early: (its own, running sequences').

        To stay a lower bound, this leaves out waiting sequences, any of which may be passed
        over, and running ones that could be preempted, which may be overtaken.
        """
        known, ahead, longest = self.blocks.cached_prefix(sequence), 0, 0
        prompts: list[Sequence] = []
        for other in self._running.values():
            # A sequence is preempted if it does not fit beside those that started before it.
            request = other.request
            longest += self.blocks.most_blocks(len(request.prompt) + request.max_tokens)
            # One under a large adapter takes turns, and leaves room for others in its turn.
            in_each_step = other.work == 1.0 or self.limits.exact
            if in_each_step and longest <= self.blocks.total:
                if other.remaining == 1 or self.limits.exact:
                    # It gets this many tokens before a new sequence may start.
                    ahead += PrefillRoom(other.remaining, self.limits.exact).chunk(other)
                else:
                    prompts.append(other)
            # A prefix that it is about to publish is computed only once, for both.
            known = max(known, self.blocks.common_prefix(sequence, other))
        own = max(1, sequence.prompt_length - known)
        if own >= 2 * self.limits.max_batch_tokens:
            # Too long for two steps, so it starts after its caller's other prompts.
            ahead += sum(other.remaining for other in prompts if _same_caller(other, sequence))
        return own, ahead

    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def using(self, digest: str) -> list[Sequence]:
        """Unfinished sequences that use this adapter."""
        return [s for s in self._by_id.values() if s.digest == digest]

    # ------------------------------------------------------------- in and out

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that already holds its lease."""
        request = sequence.request
        self._by_id[sequence.id] = sequence
        sequence.work = token_work(request.adapter, self.limits.base_parameters)
        sequence.score_work = self.limits.score_work
        sequence.share = self.shares.hold(request.tenant, request.fairness_id, request.weight)
        self._waiting.append(sequence)
        self._note_caller(sequence)

    def cancel(self, sequence_id: int) -> tuple[Sequence | None, list[Action]]:
        """End a sequence now, whatever its state; None if it has already ended."""
        sequence = self._by_id.get(sequence_id)
        if sequence is None:
            return None, []
        sequence.computed = sequence.begun  # a submitted step's tokens count as computed
        self._note_prefill(sequence)
        return sequence, self._end(sequence)

    def _end(self, sequence: Sequence) -> list[Action]:
        """End a sequence: the only place where it releases everything."""
        if sequence.state is SequenceState.RUNNING:
            self._leave_running(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        del self._by_id[sequence.id]
        self._note_caller(sequence)
        self.shares.release(sequence.share)
        self._held.discard(sequence.id)
        if self.speculation is not None:
            self.speculation.ended(sequence, keep=sequence.sound)
        return self.residency.release(sequence.digest) if sequence.digest else []

    def unhold(self, sequence_id: int) -> None:
        """Let a sequence whose constraint was late take part in steps again."""
        self._held.discard(sequence_id)

    def _leave_running(self, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self.blocks.release(sequence)
        if sequence.digest is not None:
            self.residency.unhold(sequence.digest)

    def _note_caller(self, sequence: Sequence) -> None:
        party = sequence.request.sender.party
        self._parties[party] = self._now
        self._parties.move_to_end(party)

    def _several_callers(self) -> bool:
        """Whether more than one caller has had a sequence within the last `SEVERAL_S`."""
        while self._parties and next(iter(self._parties.values())) < self._now - SEVERAL_S:
            self._parties.popitem(last=False)
        running = {sequence.request.sender.party for sequence in self._running.values()}
        return len(running.union(self._parties)) > 1

    # ---------------------------------------------------------------- adapters

    def plan_adapters(self, now: float) -> tuple[tuple[Action, ...], tuple[str, ...]]:
        """Return the loads, moves and drops to start for the waiting sequences, and the
        adapters that can never fit (their sequences must be failed)."""
        limits = self.limits
        wanted, near = self._waiting.wanted(limits.max_running, limits.planned_adapters)
        plan = self.residency.plan(wanted, self.admission.lacking_too_long(now), near)
        self.admission.note_lack_of_room(plan.blocked, now)
        return plan.actions, plan.impossible

    # ---------------------------------------------------------------- the step

    def schedule(self, now: float) -> StepPlan | None:
        """Plan the next step; None if no sequence can run."""
        self._preempted, self._now = False, now
        self.admission.note(self._waiting, now)
        chosen: dict[int, PlannedSequence] = {}
        started = [s for s in self._running.values() if s.id not in self._held]
        if self._ahead:
            context = self.limits.context_length
            started = [s for s in started if s.may_follow(context)]
        prefilling: list[Sequence] = []
        heavy: list[Sequence] = []
        for sequence in started:
            remaining = sequence.remaining
            if remaining == 1:
                if sequence.work > 1.0 and not self.limits.exact:
                    heavy.append(sequence)
                else:
                    self._choose(sequence, 1, chosen)
            elif remaining > 1:
                prefilling.append(sequence)
        if heavy:
            may_start = self._waiting and len(self._running) < self.limits.max_running
            self._choose_in_turns(heavy, chosen, prompts=bool(prefilling or may_start))
        shared = not chosen and self._several_callers()
        room = PrefillRoom.beside(chosen, self.limits, shared=shared)
        cut = self._continue_prompts(prefilling, room, chosen)
        continued = len(chosen)
        # A step that preempted has no blocks to spare: admitting would only thrash.
        for sequence in () if self._preempted else self._candidates(now):
            if sequence.id in self._held:
                continue
            if len(self._running) >= self.limits.max_running:
                break
            if not self._start(sequence, room, chosen, cut, now):
                break
        if not any(planned.samples for planned in islice(chosen.values(), continued, None)):
            self._lengthen(cut, room, chosen)
        if not chosen:
            return None
        if self.speculation is not None and not self._preempted:
            self._add_drafts(self.speculation, chosen)
        # A stable sort: within an adapter, order of arrival.
        return StepPlan(tuple(sorted(chosen.values(), key=lambda p: p.digest or "")))

    def _continue_prompts(
        self,
        prompts: list[Sequence],
        room: PrefillRoom,
        chosen: dict[int, PlannedSequence],
    ) -> list[Sequence]:
        """Give room to prompts that have started; return those that this step does not finish.

        Tenants take turns, and so do the callers of each: the oldest prompt of the caller whose
        turn it is gets half of the room, or enough to finish it. Then come prompts that can be
        finished in the room left. The rest is for prompts that start now, so that a short one
        does not wait for the end of a long one, and finally for the returned prompts
        (`_lengthen`), unless a prompt has started that this step finishes: its first token
        would come later.
        """
        cut: list[Sequence] = []
        if self.limits.exact:
            for sequence in prompts:
                self._extend(sequence, room.chunk(sequence), room, chosen)
            return cut
        if not prompts:
            return cut
        first = min(prompts, key=_last_turn)
        self.shares.take_turn(first.share)
        self._extend(first, room.chunk(first, part=0.5), room, chosen)
        others = [sequence for sequence in prompts if sequence is not first]
        for sequence in sorted(others, key=lambda each: each.remaining):
            if (count := room.chunk(sequence)) == sequence.remaining:
                self._extend(sequence, count, room, chosen)
        others.sort(key=_last_turn)
        for sequence in (*others, first):
            planned = chosen.get(sequence.id)
            if planned is None or not planned.samples:
                cut.append(sequence)
        return cut

    def _add_drafts(self, speculation: Speculation, chosen: dict[int, PlannedSequence]) -> None:
        """Add drafts to sequences that decode, in rows and KV blocks that nothing else of the
        step or of the next one needs. A prompt's last chunk gets none: its sequence's first
        token would come later."""
        sampled = [
            self._running[number]
            for number, planned in chosen.items()
            if planned.samples
            and planned.known == 1
            and planned.work == 1.0
            and not (planned.carries or planned.score)
        ]
        rows = sum(len(planned.tokens) for planned in chosen.values())
        drafts = speculation.choose(
            sampled, rows, self.limits.max_batch_tokens, self.limits.context_length
        )
        for number, draft in drafts.items():
            sequence = self._running[number]
            spare = len(self._running) + bool(self._waiting)
            length = len(sequence.tokens)
            if not self.blocks.grow(sequence, length + len(draft), spare=spare):
                room = len(sequence.blocks) * self.blocks.block_size
                draft = draft[: room - length]
            if draft:
                known = len(chosen[number].tokens)
                chosen[number] = plan_sequence(sequence, known, self._eos, tuple(draft))

    def _extend(
        self,
        sequence: Sequence,
        count: int,
        room: PrefillRoom,
        chosen: dict[int, PlannedSequence],
    ) -> None:
        taken = self._choose(sequence, count, chosen) if count else 0
        room.take(sequence, taken)

    def _lengthen(
        self,
        cut: list[Sequence],
        room: PrefillRoom,
        chosen: dict[int, PlannedSequence],
    ) -> None:
        """Give the remaining room to prompts that were cut, as far as there are blocks."""
        for sequence in cut:
            if sequence.state is SequenceState.WAITING:
                continue  # preempted meanwhile
            planned = chosen.get(sequence.id)
            given = 0 if planned is None else len(planned.tokens)
            more = room.chunk(sequence, given)
            if more and self.blocks.grow(sequence, sequence.begun + given + more):
                chosen[sequence.id] = plan_sequence(sequence, given + more, self._eos)
                room.take(sequence, more, given)

    def _choose_in_turns(
        self, heavy: list[Sequence], chosen: dict[int, PlannedSequence], *, prompts: bool
    ) -> None:
        """Add decoding sequences under large adapters, in turns.

        At least one is added, and further ones while their extra work (beyond one token of the
        base each) fits in `prefill_beside_decode`, or in half of that if there are prompts to
        compute. Tenants take turns, and so do the sequences of each: those that have waited
        longest go first."""
        self._turn += 1
        left = self.limits.prefill_beside_decode / (2 if prompts else 1)
        for at, sequence in enumerate(_in_turns(heavy)):
            left -= sequence.work - 1.0
            if left < 0 and at:
                return
            sequence.turn = self._turn
            self._choose(sequence, 1, chosen)

    def _choose(
        self, sequence: Sequence, count: int, chosen: dict[int, PlannedSequence]
    ) -> int:
        """Add a running sequence to the step; return its token count, 0 if it is preempted."""
        if sequence.state is not SequenceState.RUNNING:
            return 0  # just preempted for an older sequence
        if not self._grow_or_preempt(sequence, count, chosen):
            return 0
        chosen[sequence.id] = plan_sequence(sequence, count, self._eos)
        return count

    def _grow_or_preempt(
        self, sequence: Sequence, count: int, chosen: dict[int, PlannedSequence]
    ) -> bool:
        """Allocate blocks for ``count`` more tokens, preempting the youngest sequences if
        need be; False if that preempted ``sequence`` itself."""
        while not self.blocks.grow(sequence, sequence.begun + count):
            youngest = next(reversed(self._running.values()))
            self._preempt(youngest)
            chosen.pop(youngest.id, None)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Move a sequence back to the head of the queue. It keeps its tokens; their K and V
        will be recomputed."""
        self._preempted = True
        self._leave_running(sequence)
        sequence.state = SequenceState.WAITING
        sequence.computed = sequence.ahead = sequence.awaited = 0
        sequence.prompt_logprobs.clear()
        sequence.mixed = False
        sequence.prompt_top_logprobs.clear()
        sequence.prompt_ranks.clear()
        self._waiting.appendleft(sequence)

    def _candidates(self, now: float) -> Iterator[Sequence]:
        return self.admission.order(
            self._waiting,
            in_batch={s.digest for s in self._running.values() if s.digest is not None},
            places=self.limits.max_running - len(self._running),
            now=now,
        )

    def _start(
        self,
        sequence: Sequence,
        room: PrefillRoom,
        chosen: dict[int, PlannedSequence],
        cut: list[Sequence],
        now: float,
    ) -> bool:
        """Start a waiting sequence, unless it has to wait for unfinished prompts. Return False
        if nothing else may start in this step: there is no room or there are no blocks for it,
        or it was preempted, and none may overtake it."""
        sequence.computed = self.blocks.adopt(sequence)
        count = room.chunk(sequence)
        whole = count == sequence.remaining
        if count and not whole and not self._may_be_cut(sequence, count, cut):
            self.blocks.release(sequence)
            sequence.computed = 0
            return sequence.place >= 0  # nothing overtakes one that was preempted
        # Each running sequence soon needs another block. Without a spare one for each, this
        # sequence would be preempted a few steps later, and its work would be lost.
        spare = len(self._running)
        if not count or not self.blocks.grow(sequence, sequence.computed + count, spare=spare):
            self.blocks.release(sequence)
            sequence.computed = 0
            return False
        if sequence.digest is not None:
            held = self.residency.try_hold(sequence.digest)
            assert held, "a sequence was admitted without its adapter"
        self._waiting.remove(sequence, now)
        if sequence.admitted is None:
            sequence.admitted = now
            sequence.cached_tokens = sequence.computed
            computed = sequence.prompt_length - sequence.cached_tokens
            sequence.share.charge(PROMPT_COST * sequence.prompt_work * max(1, computed))
            if self.blocks.shares(sequence):
                self._lookups = PrefixLookups(
                    self._lookups.asked + sequence.prompt_length,
                    self._lookups.found + sequence.cached_tokens,
                )
        sequence.state = SequenceState.RUNNING
        self._running[sequence.id] = sequence
        chosen[sequence.id] = plan_sequence(sequence, count, self._eos)
        room.take(sequence, count)
        if not whole and not self.limits.exact:
            cut.append(sequence)
        return True

    def _may_be_cut(self, sequence: Sequence, count: int, cut: list[Sequence]) -> bool:
        """Whether a prompt may start with ``count`` tokens although this step cannot finish it.

        It may if no other prompt is unfinished. Otherwise there must be KV blocks for all of
        these prompts, or they would preempt each other and be computed again. It must also be
        its caller's only one, unless it takes about two steps or was preempted: long prompts of
        one caller are computed one after another, so that the first answer comes as soon as
        possible.
        """
        if not cut or self.limits.exact:
            return True
        blocks = self.blocks
        missing = sum(blocks.most_blocks(o.length) - len(o.blocks) for o in (*cut, sequence))
        if missing + 2 * len(self._running) > blocks.free:
            return False
        if sequence.place < 0 or sequence.remaining <= 2 * count:
            return True
        return all(other.share is not sequence.share for other in cut)

    def _note_prefill(self, sequence: Sequence) -> None:
        if sequence.computed and not sequence.generated:
            self._prefilled[sequence.id] = sequence

    def take_prefilled(self) -> Collection[Sequence]:
        """Return the sequences that had part of their prompt computed since the last call and
        have no token yet."""
        found, self._prefilled = self._prefilled, {}
        return found.values()

    def take_drafts(self) -> tuple[int, int]:
        """Return the draft tokens that were verified and accepted since the last call."""
        return (0, 0) if self.speculation is None else self.speculation.take()

    def took(self, plan: StepPlan, seconds: float) -> None:
        """Note how long a step took."""
        if self.speculation is not None and not plan.prefill_tokens:
            self.speculation.times.observe(plan.rows, seconds)

    def take_lookups(self) -> PrefixLookups:
        """Return the prefix cache lookups since the last call."""
        lookups, self._lookups = self._lookups, PrefixLookups()
        return lookups

    def submitted(self, plan: StepPlan) -> None:
        """Record that a step is submitted: `schedule` may be called once before `update`."""
        self._ahead = True
        for planned in plan.sequences:
            self._running[planned.sequence].submitted(planned)

    def update(
        self, plan: StepPlan, results: tuple[SequenceResult, ...]
    ) -> tuple[list[SequenceUpdate], list[Action]]:
        """Apply a step's tokens and end the sequences that stop. Sequences that have ended or
        been preempted since it was planned are left out. The caller must carry out the returned
        actions next."""
        updates: list[SequenceUpdate] = []
        actions: list[Action] = []
        charged = self.shares.several
        for planned, result in zip(plan.sequences, results, strict=True):
            sequence = self._running.get(planned.sequence)
            if sequence is None:
                continue
            if sequence.ahead:
                sequence.returned(planned)
            if result.following is ConstraintState.LATE:
                self._held.add(sequence.id)
                if result.token is None and result.finite:
                    self.blocks.trim(sequence, len(sequence.tokens))
                    continue  # as if it had not been in the step: it recomputes the same tokens
            if result.redo and self.speculation is not None:
                self.speculation.stop(sequence)
                self._preempt(sequence)
                continue
            # K and V of refused draft tokens do not count: later steps write over them.
            refused = len(planned.draft) - len(result.further)
            sequence.computed = planned.start + len(planned.tokens) - refused
            if planned.score:
                sequence.mixed |= plan.mixed
            if result.scores:
                sequence.prompt_logprobs.extend(result.scores)
                sequence.prompt_top_logprobs.extend(map(pack_tops, result.score_tops))
                sequence.prompt_ranks.extend(result.score_ranks)
            if not result.finite:
                sequence.sound = False
                self.blocks.forget(sequence)
            if result.failure is not None or not result.finite:
                actions += self._end(sequence)
                finite, why = result.finite, result.failure
                self._note_prefill(sequence)
                updates.append(
                    SequenceUpdate(
                        sequence, None, None, False, None, finite=finite, failure=why
                    )
                )
                continue
            complete = result.following is ConstraintState.COMPLETE
            finish = Finish.STOP if complete else None
            if result.token is not None:
                made = self._take(sequence, planned, result, complete=complete, charged=charged)
                updates += made
                finish = made[-1].finish
            elif complete:
                updates.append(SequenceUpdate(sequence, None, None, False, finish))
            self.blocks.publish(sequence)
            self.blocks.give_back(sequence)
            if planned.draft:
                self.blocks.trim(sequence, len(sequence.tokens))
            if finish is not None:
                actions += self._end(sequence)
            if result.token is None:
                self._note_prefill(sequence)
        return updates, actions

    def _take(
        self,
        sequence: Sequence,
        planned: PlannedSequence,
        result: SequenceResult,
        *,
        complete: bool,
        charged: bool,
    ) -> list[SequenceUpdate]:
        """Append the tokens that a step gave a sequence, up to one that ends it; return an
        update for each.

        Args:
            complete: whether the constraint allows none after the last one.
            charged: whether the tokens count for the caller's share.
        """
        updates: list[SequenceUpdate] = []
        given: list[SequenceResult | FurtherToken] = [result, *result.further]
        for each in given:
            token = each.token
            assert token is not None, "a token is sampled after each accepted one"
            sequence.tokens.append(token)
            if charged:
                sequence.share.charge(OUTPUT_COST * sequence.work)
            finish = self._finish(sequence, token, complete and each is given[-1])
            first = sequence.generated == 1
            updates.append(
                SequenceUpdate(sequence, token, each.logprob, first, finish, tops=each.tops)
            )
            if finish is not None:
                break
        if planned.draft:
            accepted = len(updates) - 1
            sequence.computed = planned.start + planned.known + accepted
            for update in updates[:-1]:
                update.accepted = True
            updates[0].rejected = len(planned.draft) - accepted
            if self.speculation is not None:
                self.speculation.judge(sequence, planned.draft, accepted)
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

    def check_unused(self) -> None:
        """Assert, when there is no sequence, that no place, block, lease or hold is left.
        Cheap enough to run after every message."""
        assert not self._by_id, "a sequence that neither runs nor waits"
        self.shares.check_unused()
        if self.speculation is not None:
            self.speculation.check_unused()
        self.blocks.check_unused()
        self.residency.check_unused()

    def check_integrity(self) -> None:
        """Check that blocks, holds, leases and queues agree; raise AssertionError if not."""
        integrity.run(self.integrity())

    def integrity(self) -> Iterator[None]:
        """Run `check_integrity` in slices, see the module `integrity`."""
        running, waiting = list(self._running.values()), list(self._waiting)
        assert {s.id for s in running} | {s.id for s in waiting} == set(self._by_id)
        assert all(not s.blocks for s in waiting), "a waiting sequence owns KV blocks"
        assert self._held <= set(self._by_id), "a sequence that has ended is held"
        yield from self.blocks.integrity(running)
        yield from self.residency.integrity(
            held=[s.digest for s in running if s.digest],
            leased=[s.digest for s in self._by_id.values() if s.digest],
        )


def _last_turn(sequence: Sequence) -> tuple[int, int]:
    """Sort key: when its tenant last had a turn, then when its caller did. Sorting by it keeps
    the order of arrival among the prompts of one caller."""
    share = sequence.share
    return (share.owner.turn if share.owner else 0), share.turn


def _same_caller(one: Sequence, other: Sequence) -> bool:
    """Whether two sequences belong to one share; also works before they are queued."""
    ones, others = one.request, other.request
    return (ones.tenant, ones.fairness_id) == (others.tenant, others.fairness_id)


def _in_turns(sequences: Iterable[Sequence]) -> list[Sequence]:
    """Return the first sequence of each tenant, then the second of each, and so on, beginning
    with the tenant whose last turn is longest ago."""
    by_turn = sorted(sequences, key=lambda each: each.turn)
    last, rank = dict[str, int](), Counter[str]()
    order: list[tuple[int, int, Sequence]] = []
    for sequence in by_turn:
        last[sequence.request.tenant] = sequence.turn
    for sequence in by_turn:
        tenant = sequence.request.tenant
        order.append((rank[tenant], last[tenant], sequence))
        rank[tenant] += 1
    order.sort(key=lambda each: each[:2])
    return [sequence for *_, sequence in order]


def _digests(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({s.digest for s in sequences if s.digest is not None}))
