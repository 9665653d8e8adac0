"""The engine's decisions without an engine: a clock, a KV pool and an adapter memory.

`World` carries out what scheduler, block manager, prefix cache and residency decide,
and checks each decision against a model that is independent of how they work:

* the KV pool maps a slot to what was computed into it, so that each step's reads can be
  compared with the content that tokens, weights and scope require;
* the adapter memory has what it had to load, so that a step which uses anything else is
  detected;
* overtaking is judged from the queue before and after.

A token is a function of its sequence and position, so mixed-up results are detected too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.residency.tiers import Action, Drop, Load, MemoryTier
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.sequence import Finish, Sequence, SequenceState
from veneer_server.engine.scheduling.speculation import Speculation, StepTimes
from veneer_server.engine.scheduling.step_limits import FIXED_CHUNK, SchedulerLimits
from veneer_server.queues.fairness import Sender
from veneer_server.step.plan import FurtherToken, PlannedSequence, SequenceResult, StepPlan
from veneer_server.wire.messages import (
    AdapterSource,
    EvictMode,
    SamplingParams,
    SequenceRequest,
)

SIZE = 100
BLOCK = 4
CONTEXT = 64


def adapter(name: str, size: int = SIZE) -> AdapterSource:
    return AdapterSource(weights_digest=name, folder="", parameters=size, name=name)


def token_of(sequence: int, position: int) -> int:
    """Every fifth sequence says the same as the others of these, so that drafts from their
    answers are right."""
    return 9 + position if sequence % 5 == 4 else 100 * sequence + position


class FreeSteps(StepTimes):
    """Says that steps take no longer for having more rows, so that every draft is verified as
    far as there is room, whatever was measured."""

    def seconds(self, rows: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Cell:
    """Content of a slot of the pool.

    Attributes:
        content: hash of scope, weights and all tokens up to this one; None if the
            computation went wrong.
        writer: the sequence that computed it.
        shared: whether that sequence uses the prefix cache.
    """

    content: int | None
    writer: int
    shared: bool


@dataclass(frozen=True)
class Least:
    """The least work before the first token, as predicted at submission, and the tokens
    computed and sequences ended early by then."""

    tokens: int
    computed: int
    ended_early: int


@dataclass
class World:
    """See the module docstring. Sizes are bytes, tokens or blocks; times are seconds."""

    device: int = 3 * SIZE
    host: int = 6 * SIZE
    blocks: int = 17
    max_running: int = 8
    budget: int = 32
    beside_decode: int = 32
    patience: float = 5.0
    max_wait: float = 10.0
    planned: int = 256
    shared: bool = False
    exact: bool = False
    prefix_cache: bool = True
    window: int | None = None
    drafts: bool = False
    now: float = 0.0
    pending: list[tuple[str, str]] = field(default_factory=list)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, Finish] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    live: dict[int, Sequence] = field(default_factory=dict)
    pool: dict[int, Cell] = field(default_factory=dict)
    memory: set[tuple[str, str]] = field(default_factory=set)
    preempted: set[int] = field(default_factory=set)
    starts: list[int] = field(default_factory=list)
    """Sequences in the order in which they (last) started."""
    blocked: tuple[str, float] | None = None
    load_turns: dict[str, int] = field(default_factory=dict)
    """By tenant: lower ones load an adapter first. A turn ends when a request of the adapter at
    the tenant's head starts."""
    overtaken: dict[int, Counter[str | None]] = field(default_factory=dict)
    """By sequence that has waited for `max_wait`: starts of younger ones, by adapter."""
    most: dict[str, int] = field(default_factory=dict)
    """Allowed bytes by tier: they decrease with each planning until a lowered budget is met."""
    draining: dict[str, set[int]] = field(default_factory=dict)
    """Evicted adapters that are not gone yet -> the sequences that ran at that time."""
    drains: int = 0
    """Number of evictions that waited for such sequences and were completed."""
    shrinks: int = 0
    """Number of plannings that could not meet a budget yet."""
    cached_reads: int = 0
    computed: int = 0
    """Tokens of all steps."""
    ended_early: int = 0
    """Number of sequences that were cancelled or failed."""
    least: dict[int, Least] = field(default_factory=dict)
    bounds_met: int = 0
    histories: int = 0
    """Number of plans of sequences with penalties."""
    given_back: int = 0
    """Number of plans of sequences that no longer have all their blocks."""

    accepted: int = 0
    rejected: int = 0
    """Draft tokens."""
    redone: int = 0
    """Number of drafts whose rows were not finite."""
    from_others: int = 0
    """Number of drafts with other sequences' answers."""
    visible: dict[tuple[str, str, str | None], set[int]] = field(
        default_factory=lambda: defaultdict(set)
    )
    """Tokens of sequences that share them, by tenant, scope and adapter."""

    def __post_init__(self) -> None:
        self.residency = Residency(self.host, self.device, itemsize=1, shared=self.shared)
        self.limits = SchedulerLimits(
            max_batch_tokens=self.budget,
            max_running=self.max_running,
            context_length=CONTEXT,
            prefill_beside_decode=self.beside_decode,
            patience=self.patience,
            max_wait=self.max_wait,
            planned_adapters=self.planned,
            exact=self.exact,
        )
        self.scheduler = Scheduler(
            self.limits,
            BlockManager(
                self.blocks,
                BLOCK,
                prefix_cache=self.prefix_cache and not self.exact,
                window=self.window,
                chunk=self.limits.chunk,
            ),
            self.residency,
            frozenset({0}),
            self._speculation() if self.drafts and not self.exact else None,
        )

    def _speculation(self) -> Speculation:
        speculation = Speculation([(1, 1.0)], frozenset({0}))
        speculation.times = FreeSteps([(1, 1.0)])
        return speculation

    # ------------------------------------------------------------ requests

    def submit(self, number: int, prompt: int, new: int, source: AdapterSource | None) -> None:
        """Submit a request whose prompt shares nothing with any other."""
        self.ask(number, [-number] * prompt, new, source)

    def ask(
        self,
        number: int,
        prompt: list[int],
        new: int,
        source: AdapterSource | None = None,
        *,
        scope: str = "",
        share: bool = True,
        scores: bool = False,
        penalties: bool = False,
        tenant: str = "",
        weight: float = 1.0,
        priority: int = 0,
        key: str = "",
        expected: Iterable[int] = (),
    ) -> Sequence:
        request = SequenceRequest(
            sender=Sender(tenant, key),
            prompt=prompt,
            max_tokens=new,
            sampling=SamplingParams(frequency_penalty=0.5 if penalties else 0.0),
            adapter=source,
            use_prefix_cache=share,
            cache_scope=scope,
            prompt_logprobs=scores,
            tenant=tenant,
            weight=weight,
            priority=priority,
            prediction=[*expected],
        )
        if all(s.place < 0 or s.request.tenant != tenant for s in self.scheduler.queue):
            self.load_turns[tenant] = self._next_turn()
        found = self.residency.lease(source) if source else None
        sequence = Sequence(number, request, self.now, found)
        least = sum(self.scheduler.least_tokens(sequence))
        self.least[number] = Least(least, self.computed, self.ended_early)
        self.scheduler.add(sequence)
        self.live[number] = sequence
        self._show(sequence, prompt)
        self.outputs[number] = []
        return sequence

    def _show(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        if sequence.request.use_prefix_cache:
            self.visible[_reader(sequence)].update(tokens)

    def _next_turn(self) -> int:
        return 1 + max(self.load_turns.values(), default=0)

    def cancel(self, number: int) -> None:
        self.ended_early += 1
        _, actions = self.scheduler.cancel(number)
        self.carry_out(actions)
        self.live.pop(number, None)
        self.failed.add(number)

    # ------------------------------------------------------------ adapters

    def activate(self, source: AdapterSource, tier: MemoryTier, pin: bool) -> None:
        """Raises AdapterBudgetExceeded."""
        self.residency.activate(source, tier, pin)
        self.draining.pop(source.weights_digest, None)

    def evict(self, name: str, mode: EvictMode, unpin: bool) -> None:
        """Raises AdapterInUse, AdapterPinned."""
        _, _, actions = self.residency.evict(name, mode, unpin)
        if mode != "forget":
            self.draining[name] = self._running_on(name)
        self.carry_out(actions)
        self._check_drained()

    def _running_on(self, name: str) -> set[int]:
        return {
            s.id
            for s in self.live.values()
            if s.digest == name and s.state is SequenceState.RUNNING
        }

    def _takes_room(self, name: str) -> bool:
        return any(digest == name for digest, _ in {*self.memory, *self.pending})

    def _check_drained(self, *, planned: bool = False) -> None:
        """Check that an evicted adapter is gone once the sequences that ran then have ended.

        Args:
            planned: whether adapters were just planned. Until then, it stays if the last of
                those sequences was preempted.
        """
        for name, ran in list(self.draining.items()):
            ran &= self._running_on(name)  # a preempted sequence starts over
            if not self._takes_room(name):
                del self.draining[name]  # it was not in memory
            elif not ran:
                coming = any(digest == name for digest, _ in self.pending)
                assert coming or not planned, f"{name} was evicted, and is still there"

    def carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Load(source):
                    self.pending.append((source.weights_digest, "host"))
                case Drop(digest, tier):
                    self.memory.remove((digest, tier))
                    if digest in self.draining and not self._takes_room(digest):
                        self.drains += 1
                        del self.draining[digest]
                case _:
                    assert (action.weights_digest, "host") in self.memory
                    self.pending.append((action.weights_digest, "device"))
            self._check_room()

    def set_budgets(self, *, host: int | None = None, device: int | None = None) -> None:
        """Raises AdapterBudgetExceeded."""
        self.residency.set_budgets(host=host, device=device)
        self.host = self.host if host is None else host
        self.device = self.device if device is None else device
        self.most = {tier: self.bytes_held(tier) for tier in ("host", "device")}

    def most_bytes(self, tier: str) -> int:
        if tier == "device":
            return self.device
        return max(self.host, self.device) if self.shared else self.host

    def bytes_held(self, tier: str) -> int:
        """Bytes actually held; with shared memory a DEVICE copy is the HOST copy."""
        copies = {*self.memory, *self.pending}
        if self.shared and tier == "host":
            held = {digest for digest, _ in copies}
        else:
            held = {digest for digest, where in copies if where == tier}
        return sum(self.residency.bytes_of(digest) for digest in held)

    def _check_room(self) -> None:
        """Check that no more is held than budgets allow, except what was in use when they were
        lowered."""
        for tier in ("host", "device"):
            most = max(self.most_bytes(tier), self.most.get(tier, 0))
            assert self.bytes_held(tier) <= most, f"more in {tier} than was planned"

    def _check_in_use(self) -> None:
        """Check that copies beyond a lowered budget are in use."""
        running = {s.digest for s in self.live.values() if s.state is SequenceState.RUNNING}
        moving = {digest for digest, tier in self.pending if tier == "device"}
        for tier in ("host", "device"):
            self.most[tier] = self.bytes_held(tier)
            if self.most[tier] <= self.most_bytes(tier):
                continue
            self.shrinks += 1
            for digest in (digest for digest, where in self.memory if where == tier):
                used = digest in moving or (
                    digest in running and (tier == "device" or self.shared)
                )
                pinned = self.residency.pinned(digest, None if self.shared else tier)
                assert used or pinned, f"{digest} is past the {tier} budget, and not in use"

    def plan_adapters(self) -> None:
        waiting, near = self._wanted()
        wants = list(dict.fromkeys([*self.residency.operator_wants, *waiting]))
        overdue = self._lacking()
        actions, impossible = self.scheduler.plan_adapters(self.now)
        self._check_passed_over(actions, wants, overdue)
        self._check_evicted(actions, wants, {*near, *self.residency.operator_wants})
        self.carry_out(actions)
        self._check_in_use()
        self._check_drained(planned=True)
        for digest in impossible:
            self.fail_adapter(digest)

    def _wanted(self) -> tuple[list[str], set[str]]:
        """Adapters in the order in which they are to be loaded, and those that the sequences
        at the head of the queue use: preempted ones, then those of all tenants in turn."""
        queue = self.scheduler.queue
        head = [s for s in queue if s.place < 0]
        tenants: dict[str, list[Sequence]] = {}
        for s in sorted(
            (s for s in queue if s.place > 0),
            key=_order,
        ):
            tenants.setdefault(s.request.tenant, []).append(s)
        tenants = dict(sorted(tenants.items(), key=lambda item: self.load_turns[item[0]]))
        left = max(0, self.max_running - len(head))
        each = max(1, left // max(1, len(tenants))) if left else 0
        ranked: list[tuple[bool, int, int, str | None]] = []
        for tenant, sequences in tenants.items():
            firsts: dict[tuple[str | None, int], Sequence] = {}
            for s in sequences:
                firsts.setdefault((s.digest, s.request.priority), s)
            used = {(s.digest, s.request.priority) for s in sequences[:each]}
            for rank, key in enumerate(firsts):
                ranked.append((key not in used, rank, self.load_turns[tenant], key[0]))
        ranked.sort(key=lambda entry: entry[:3])
        near = [s.digest for s in head[: self.max_running]]
        near += [digest for far, *_, digest in ranked if not far][:left]
        order = [s.digest for s in head] + [digest for *_, digest in ranked]
        wants = dict.fromkeys(digest for digest in order if digest is not None)
        return list(wants), {digest for digest in near if digest is not None}

    def _check_passed_over(
        self, actions: Iterable[Action], wants: list[str], overdue: str | None
    ) -> None:
        """Check that requests behind a want without space do not take that space for long."""
        blocked = self.scheduler.admission.lacking
        if blocked is None:
            return
        behind = wants[wants.index(blocked) + 1 :]
        for drops, action in _with_drops(actions):
            digest = _digest(action)
            if digest not in behind:
                continue
            harmless = isinstance(action, Load) and (blocked, "host") in self.memory
            assert harmless or blocked != overdue, f"{digest} takes {blocked}'s room"
            assert harmless or not drops, f"{digest} evicts, though {blocked} is before it"
            self._check_idle(drops, digest)

    def _check_evicted(
        self, actions: Iterable[Action], wants: list[str], near: set[str | None]
    ) -> None:
        """Check that a waiting request loses its adapter only to older ones, and that
        prefetching evicts nothing that is waited for."""
        for drops, action in _with_drops(actions):
            digest = _digest(action)
            if digest not in near:
                assert isinstance(action, Load) or not drops, f"{digest} is not needed yet"
                self._check_idle(drops, digest)
            for drop in drops:
                if drop.weights_digest in wants:
                    later = wants.index(drop.weights_digest) > wants.index(digest)
                    assert later, f"{drop.weights_digest} is evicted for a younger {digest}"

    def _check_idle(self, drops: Iterable[Drop], digest: str) -> None:
        used = {s.digest for s in self.live.values()}
        for drop in drops:
            assert drop.weights_digest not in used, f"{digest} is read ahead over a used one"

    def fail_adapter(self, digest: str) -> None:
        for sequence in self.scheduler.using(digest):
            self.cancel(sequence.id)
        self.residency.failed(digest)
        self.carry_out(self.residency.settle(digest))
        self._check_drained()

    def arrive(self, index: int = 0) -> None:
        digest, tier = self.pending.pop(index)
        self.memory.add((digest, tier))
        (self.residency.loaded if tier == "host" else self.residency.moved)(digest)
        self.carry_out(self.residency.settle(digest))
        self._check_drained()

    # ---------------------------------------------------------------- steps

    def step(self, seconds: float = 1.0, poison: int | None = None) -> StepPlan | None:
        """One turn of the loop; the ``poison``-th sequence of the plan fails."""
        self.now += seconds
        self.plan_adapters()
        plan = self._schedule()
        if plan is not None:
            self.apply(plan, poison)
        self.check_integrity()
        return plan

    def drain(self, limit: int = 3000) -> None:
        """Run until everything has ended."""
        for _ in range(limit):
            if not self.scheduler.has_work():
                return
            self.step()
            while self.pending:
                self.arrive()
        raise AssertionError(f"never ended: {sorted(self.live)}")

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()
        for sequence in self.live.values():
            needed = self.scheduler.blocks.blocks_for(len(sequence.tokens))
            assert len(sequence.blocks) <= needed, f"{sequence.id} keeps a block for a draft"
        used = {block for s in self.live.values() for block in s.blocks} - {0}
        assert self.scheduler.blocks.used == len(used)
        for sequence in self.live.values():
            self._check_held(sequence)

    def _check_held(self, sequence: Sequence) -> None:
        """Check that a sequence has the blocks that a layer still reaches, and no others."""
        reached = 0 if self.window is None else sequence.computed + 1 - self.window
        for index, block in enumerate(sequence.blocks):
            assert (block != 0) == ((index + 1) * BLOCK > reached), (
                f"{sequence.id} has {'' if block else 'no '}block {index}, with "
                f"{sequence.computed} tokens computed"
            )

    def _schedule(self) -> StepPlan | None:
        queue = list(self.scheduler.queue)
        running = [s for s in self.live.values() if s.state is SequenceState.RUNNING]
        resident = {s.id for s in queue if self._on_device(s)}
        plan = self.scheduler.schedule(self.now)
        preempted = {s.id for s in running if s.state is SequenceState.WAITING}
        if running:
            first = min((s.id for s in running), key=self.starts.index)
            assert first not in preempted, "nobody is sure to get on"
        waited = {s.id for s in queue}
        # In the order of starts, which within a step differs from the queue's.
        started = [s.id for s in self.scheduler.batch if s.id in waited]
        self._end_turns(queue, started)
        self.starts = [n for n in self.starts if n not in started] + started
        self.preempted |= preempted
        for number in started:
            digest = self.live[number].digest
            assert digest not in self.draining, f"{number} starts on {digest}, which is evicted"
        self._check_order(queue, resident)
        if plan is not None:
            self._check_plan(plan, running)
            if any(p.draft for p in plan.sequences):
                assert not preempted, "a draft in a step without room"
                self._check_drafts(plan)
        return plan

    def _check_drafts(self, plan: StepPlan) -> None:
        """Check that drafts take no block that others soon need, and no token that its sequence
        must not see."""
        for p in plan.sequences:
            if not p.draft:
                continue
            sequence = self.live[p.sequence]
            if len(p.blocks) > self.scheduler.blocks.blocks_for(len(sequence.tokens)):
                assert self.scheduler.blocks.free >= self.scheduler.running
            foreign = {*p.draft}.difference(sequence.tokens, sequence.request.prediction)
            if foreign:
                assert sequence.request.use_prefix_cache, "it asked not to share"
                stray = foreign - self.visible[_reader(sequence)]
                assert not stray, f"{p.sequence} is drafted from what it must not see"
                self.from_others += 1

    def _end_turns(self, queue: list[Sequence], started: list[int]) -> None:
        left = [s for s in queue if s.id not in self.preempted]
        for sequence in [self.live[n] for n in started if n not in self.preempted]:
            head = min(
                (s for s in left if s.request.tenant == sequence.request.tenant),
                key=_order,
            )
            if (head.digest, _class(head)) == (sequence.digest, _class(sequence)):
                self.load_turns[sequence.request.tenant] = self._next_turn()
            left.remove(sequence)

    def _on_device(self, sequence: Sequence) -> bool:
        if sequence.digest is None:
            return True
        there = (sequence.digest, "device") in self.memory
        if there and not self.residency.ready(sequence.digest):
            past = any(self.most[tier] > self.most_bytes(tier) for tier in self.most)
            assert past or sequence.digest in self.draining, (
                f"{sequence.digest} is kept from sequences for no reason"
            )
            return False
        return there

    def _check_order(self, queue: list[Sequence], resident: set[int]) -> None:
        """Check that no request is overtaken more often than the bound."""
        started = [s for s in queue if s.state is SequenceState.RUNNING]
        lacking = self._lacking()
        # Requests behind the one that lacks space, whose adapters occupy that space.
        held: set[int] = set()
        if lacking is not None:
            order = sorted(queue, key=_order)
            places = [i for i, s in enumerate(order) if s.digest == lacking]
            behind = order[places[0] if places else 0 :]
            held = {
                s.id
                for s in behind
                if s.digest is not None and not self.residency.pinned(s.digest, "device")
            }
            if len({s.request.tenant for s in queue}) <= 1:
                assert not held & {s.id for s in started}, "starts, and keeps the room taken"
            else:
                held = {s.id for s in queue}  # tenants take turns to load, see `_wanted`
        for sequence in queue:
            if sequence.state is not SequenceState.WAITING or sequence.id in held:
                continue
            preempted = sequence.id in self.preempted
            due = preempted or self.now - sequence.arrived >= self.max_wait
            if not due or sequence.id not in resident:
                continue
            younger = [
                s
                for s in started
                if s.id not in self.preempted and s.arrived > sequence.arrived
            ]
            if preempted:
                assert not younger, f"{sequence.id} is overtaken by {younger}"
                continue
            own = [s for s in queue if _class(s) == _class(sequence)]
            same = [s for s in own if s.digest == sequence.digest]
            assert not set(same) & set(younger), f"{sequence.id} is overtaken by its own"
            if min(same, key=lambda s: s.place) is sequence:
                # Adapters of a tenant take turns: each other one has one turn at most.
                turns = self.overtaken.setdefault(sequence.id, Counter())
                turns.update(s.digest for s in younger if s in own)
                assert max(turns.values(), default=0) <= 1, f"{sequence.id} has had no turn"

    def _lacking(self) -> str | None:
        """The want that has found no space for `patience`, by the world's clock."""
        digest = self.scheduler.admission.lacking
        if digest is None:
            self.blocked = None
        elif self.blocked is None or self.blocked[0] != digest:
            self.blocked = (digest, self.now)
        if self.blocked is None or self.now - self.blocked[1] < self.patience:
            return None
        return self.blocked[0]

    def _check_plan(self, plan: StepPlan, running: list[Sequence]) -> None:
        planned = {p.sequence: p for p in plan.sequences}
        assert len(planned) == len(plan.sequences), "a sequence twice in a step"
        assert list(plan.sequences) == sorted(plan.sequences, key=lambda p: p.digest or "")
        assert len(self.live) >= self.scheduler.running <= self.max_running
        decoding = [s for s in running if s.remaining == 1]
        for sequence in decoding:
            # Under large adapters they take turns.
            if sequence.state is SequenceState.RUNNING and sequence.work <= 1:
                assert sequence.id in planned, f"{sequence.id} decodes and was left out"
        others = [p for p in plan.sequences if p.sequence not in {s.id for s in decoding}]
        prefill = sum(len(p.tokens) - len(p.draft) for p in others)
        slack = FIXED_CHUNK if self.exact else 0
        assert plan.rows <= self.budget + slack
        if len(others) < len(plan.sequences):
            assert prefill <= self.beside_decode + self.beside_decode // 4 + slack
        for p in plan.sequences:
            assert p.tokens, "a sequence with nothing to compute"
            if p.digest is not None:
                assert (p.digest, "device") in self.memory, f"{p.digest} is not there"
            if self.exact:
                length = len(self.live[p.sequence].request.prompt)
                assert len(p.tokens) == max(1, min(FIXED_CHUNK, length - p.start))

    # ----------------------------------------------------------- execution

    def apply(self, plan: StepPlan, poison: int | None = None) -> None:
        self.computed += plan.rows
        for p in plan.sequences:
            self._check_reads(p)
        bad = None if poison is None else plan.sequences[poison % len(plan.sequences)].sequence
        for p in plan.sequences:
            self._write(p, p.sequence == bad)
        results = tuple(self._result(p, bad=p.sequence == bad) for p in plan.sequences)
        redone = {p.sequence for p in plan.sequences if p.draft and p.sequence == bad}
        if redone:
            self.redone += 1
            self.preempted |= redone
            bad = None  # it is computed again, without a draft
        doubtful = set(self.live[bad].blocks) if bad is not None else set()
        updates, actions = self.scheduler.update(plan, results)
        for p in plan.sequences:
            sequence = self.live[p.sequence]
            for position in range(p.start, sequence.computed if p.draft else 0):
                cell = self.pool[self._slot(p, position)]
                assert cell.content == self._content(sequence, position), (
                    f"{p.sequence} keeps a refused token at position {position}"
                )
        self.carry_out(actions)
        for update in updates:
            number = update.sequence.id
            if not update.finite:
                assert number == bad
                self.ended_early += 1
                self._check_forgotten(self.live.pop(number), doubtful)
                self.failed.add(number)
                continue
            assert update.token is not None
            self.outputs[number].append(update.token)
            self._show(update.sequence, [update.token])
            if update.first:
                self._check_least(number)
            if update.first and update.sequence.request.prompt_logprobs:
                scored = len(update.sequence.prompt_logprobs)
                assert scored == update.sequence.prompt_length - 1
            if update.finish is not None:
                self.finished[number] = update.finish
                self.live.pop(number)

    def _result(self, p: PlannedSequence, *, bad: bool) -> SequenceResult:
        """The result of a runner: a token after each draft token that is right."""
        if bad:
            return SequenceResult(finite=bool(p.draft), redo=bool(p.draft))
        if not p.samples:
            return SequenceResult(scores=(-1.0,) * len(p.score))
        sampled = [token_of(p.sequence, p.position + i) for i in range(len(p.draft) + 1)]
        pairs = zip(p.draft, sampled, strict=False)
        right = next((i for i, (one, other) in enumerate(pairs) if one != other), len(p.draft))
        self.accepted += right
        self.rejected += len(p.draft) - right
        further = [FurtherToken(token) for token in sampled[1 : right + 1]]
        return SequenceResult(sampled[0], scores=(-1.0,) * len(p.score), further=further)

    def _check_least(self, number: int) -> None:
        """Check that a deadline refused by `least_tokens` could not have been met."""
        least = self.least[number]
        if least.ended_early == self.ended_early:
            took = self.computed - least.computed
            assert took >= least.tokens, f"{number} needed {took} tokens, not {least.tokens}"
            self.bounds_met += 1

    def _check_forgotten(self, sequence: Sequence, blocks: set[int]) -> None:
        cache = self.scheduler.blocks.cache
        left = blocks & {cache.find(key) for key in sequence.block_keys}
        assert not left, f"blocks of {sequence.id}, which went wrong, can be found"

    def _slot(self, p: PlannedSequence, position: int) -> int:
        return p.blocks[position // BLOCK] * BLOCK + position % BLOCK

    def _content(self, sequence: Sequence, position: int, draft: tuple[int, ...] = ()) -> int:
        scope, tokens = sequence.request.cache_scope, (*sequence.tokens, *draft)
        return hash((scope, sequence.digest, tokens[: position + 1]))

    def _check_reads(self, p: PlannedSequence) -> None:
        sequence = self.live[p.sequence]
        end = p.start + len(p.tokens) - len(p.draft)
        assert p.tokens == (*sequence.tokens[p.start : end], *p.draft)
        assert p.samples == (end == len(sequence.tokens))
        assert p.position == len(sequence.tokens)
        self._check_history(p, sequence)
        first = 0 if self.window is None else max(0, p.start + 1 - self.window)
        self.given_back += 0 in p.blocks
        for position in range(first, p.start):
            assert p.blocks[position // BLOCK], f"{p.sequence} lacks position {position}"
            cell = self.pool[self._slot(p, position)]
            assert cell.content == self._content(sequence, position), (
                f"sequence {p.sequence} reads another's K and V at position {position}"
            )
            if cell.writer != p.sequence:
                self.cached_reads += 1
                assert cell.shared, "K and V of a sequence that does not share them"
                assert sequence.request.use_prefix_cache, "it asked not to share"
                assert not sequence.request.prompt_logprobs, "its prompt must be computed"

    def _check_history(self, p: PlannedSequence, sequence: Sequence) -> None:
        """Check that penalties cover what the sequence has, however often it started over."""
        if not (p.samples and p.sampling.needs_token_counts):
            assert p.token_counts is None, "a history that nothing needs"
            return
        output = Counter(sequence.tokens[sequence.prompt_length :])
        expected = {token: output[token] for token in sequence.tokens}
        assert p.token_counts is not None
        found = zip(p.token_counts.ids.tolist(), p.token_counts.counts.tolist(), strict=True)
        assert dict(found) == expected, f"penalties of {p.sequence} are of other tokens"
        self.histories += 1

    def _write(self, p: PlannedSequence, bad: bool) -> None:
        sequence = self.live[p.sequence]
        taken = {b for s in self.live.values() if s is not sequence for b in s.blocks}
        for position in range(p.start, p.start + len(p.tokens)):
            slot = self._slot(p, position)
            assert slot // BLOCK, f"{p.sequence} writes to the padding block"
            assert slot // BLOCK not in taken, f"{p.sequence} writes to a shared block"
            content = None if bad else self._content(sequence, position, p.draft)
            self.pool[slot] = Cell(content, p.sequence, sequence.request.use_prefix_cache)


def _reader(sequence: Sequence) -> tuple[str, str, str | None]:
    """Those with the same may see each other's tokens in drafts."""
    return sequence.request.tenant, sequence.request.cache_scope, sequence.digest


def _order(sequence: Sequence) -> tuple[bool, float, int]:
    """Of a tenant's sequences: preempted ones, then by arrival, moved by their priority."""
    if sequence.place < 0:
        return False, 0, sequence.place
    return True, sequence.arrived + 10 * sequence.request.priority, sequence.place


def _class(sequence: Sequence) -> tuple[str, int]:
    """Those of one class take turns by adapter."""
    return sequence.request.tenant, sequence.request.priority


def _digest(action: Action) -> str:
    return action.source.weights_digest if isinstance(action, Load) else action.weights_digest


def _with_drops(actions: Iterable[Action]) -> Iterator[tuple[list[Drop], Action]]:
    """Each load and move with the evictions for it."""
    drops: list[Drop] = []
    for action in actions:
        if not isinstance(action, Drop):
            yield drops, action
            drops = []
        elif action.cause == "capacity":
            drops.append(action)
    assert not drops, "evicted for nothing"
