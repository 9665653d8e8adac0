"""Random histories of scheduler, block manager, prefix cache and residency, together.

A hypothesis state machine with pools so tiny that everything runs out. `World` has the
invariants of each step; this module has the histories, their required end, and planted bugs
that must be caught. A failure prints the shortest history that reproduces it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from veneer_registry.errors import AdapterBudgetExceeded, AdapterInUse, AdapterPinned
from veneer_server.engine.residency import load_planner, residency
from veneer_server.engine.residency.ledger import Ledger
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.residency.tiers import Action, Drop, LedgerEntry, ResidencyPlan
from veneer_server.engine.scheduling import (
    admission,
    block_manager,
    prefill_room,
    prefix_cache,
    scheduler,
    speculation,
)
from veneer_server.engine.scheduling.admission import Admission
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.prefix_cache import PrefixCache
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.engine.scheduling.updates import SequenceUpdate
from veneer_server.step.plan import StepPlan
from veneer_server.wire.messages import AdapterSource

from tests.planted import edited
from tests.unit.server.engine.world import BLOCK, CONTEXT, SIZE, World, adapter, token_of

HISTORIES = int(os.environ.get("VENEER_HISTORIES", "500"))
"""Each run of the suite has others."""
MUTANTS_HISTORIES = 2000
"""In which a planted bug must be caught."""
LONGEST = 40
"""Rules of a history."""

SIZES = {name: 40 + 12 * i for i, name in enumerate("abcdefgh")}

# Two token ids only: chains that differ late are common, and so are equal blocks.
TEXTS = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=30)
NAMES = st.sampled_from(list(SIZES))
SOMETIMES = st.integers(0, 9).map(lambda number: number == 9)
WHICH = st.integers(0, 63)


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prefix: which of the texts so far its prompt begins with, from the latest on.
        own: what follows in its prompt.
        new: tokens it wants.
        alone: it takes no part in the prefix cache.
        scores: it wants its prompt's log-probabilities.
        expects: for each of its first tokens, whether it says beforehand what it will be.
    """

    prefix: int
    own: list[int]
    new: int
    adapter: str | None
    scope: str
    priority: int
    alone: bool
    scores: bool
    expects: list[bool]


ASKS = st.builds(
    Ask,
    prefix=WHICH,
    own=st.just([]) | TEXTS | TEXTS,
    new=st.sampled_from([1, 4, 12, 20]),
    adapter=st.none() | NAMES,
    scope=st.sampled_from(["", "", "other"]),
    priority=st.sampled_from([0, 0, 0, -1]),
    alone=SOMETIMES,
    scores=SOMETIMES,
    expects=st.just([]) | st.lists(st.integers(0, 4).map(bool), max_size=20),
)


class Histories(RuleBasedStateMachine):
    """A world, and what was asked of it."""

    seen: ClassVar[Counter[str]] = Counter()
    """What all histories came upon: they would prove nothing if nothing had run out."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.asked: dict[int, tuple[int, int]] = {}
        self.texts: list[list[int]] = []
        """Token lists that prompts begin with: a few prefixes, then whole conversations."""
        self.calm = False
        """Nothing ends early."""

    @initialize(
        device=st.sampled_from([SIZES["h"], 2 * SIZE, 4 * SIZE]),
        host=st.sampled_from([2 * SIZE, 6 * SIZE]),
        blocks=st.sampled_from([CONTEXT // BLOCK + 1, 24, 60]),
        max_running=st.sampled_from([1, 3, 8]),
        budget=st.sampled_from([8, 16, 64]),
        beside_decode=st.sampled_from([1, 4, 64]),
        patience=st.sampled_from([0.5, 5.0]),
        max_wait=st.sampled_from([1.0, 10.0]),
        planned=st.sampled_from([1, 3, 256]),
        shared=st.booleans(),
        exact=SOMETIMES,
        window=st.sampled_from([None, None, None, 1, 6, 21]),
        tight=st.booleans(),
        no_prefix_cache=SOMETIMES,
        calm=st.booleans(),
        drafts=st.sampled_from([True, True, False]),
        texts=st.lists(TEXTS, min_size=3, max_size=3),
    )
    def begin(
        self,
        texts: list[list[int]],
        no_prefix_cache: bool,
        calm: bool,
        tight: bool,
        **sizes: Any,
    ) -> None:
        self.world = World(prefix_cache=not no_prefix_cache, **sizes)
        if tight and sizes["window"] is not None:
            # As few blocks as the longest sequence can do with, and the padding.
            sizes["blocks"] = self.world.scheduler.blocks.most_blocks(CONTEXT) + 1
            self.world = World(prefix_cache=not no_prefix_cache, **sizes)
        self.texts = texts
        self.calm = calm

    @rule(asks=st.lists(ASKS, min_size=1, max_size=4))
    def submit(self, asks: list[Ask]) -> None:
        for ask in asks:
            self._submit(ask)

    def _submit(self, ask: Ask) -> None:
        number = len(self.world.outputs) + 1
        prompt = (self.texts[-1 - ask.prefix % len(self.texts)] + ask.own)[: CONTEXT - 10]
        new = min(ask.new, CONTEXT - len(prompt))
        try:
            self.world.ask(
                number,
                prompt,
                new,
                self._adapter(ask.adapter) if ask.adapter else None,
                scope=ask.scope,
                tenant=ask.scope,
                priority=ask.priority,
                share=not ask.alone,
                scores=ask.scores,
                penalties=number % 3 == 0,
                expected=[
                    token_of(number, len(prompt) + at) if known else 3
                    for at, known in enumerate(ask.expects)
                ],
            )
        except AdapterBudgetExceeded:
            return
        self.asked[number] = (len(prompt), new)
        self.texts.append([*prompt, *(token_of(number, len(prompt) + i) for i in range(3))])

    def _adapter(self, name: str) -> AdapterSource:
        return adapter(name, SIZES[name])

    @rule(steps=st.integers(1, 8), seconds=st.sampled_from([0.1, 1.0]))
    def step(self, steps: int, seconds: float) -> None:
        for _ in range(steps):
            self.world.step(seconds)

    @precondition(lambda self: self.world.live and not self.calm)
    @rule(sequence=WHICH)
    def go_wrong(self, sequence: int) -> None:
        self.world.step(poison=sequence)

    @precondition(lambda self: self.world.pending)
    @rule(which=WHICH)
    def arrive(self, which: int) -> None:
        self.world.arrive(which % len(self.world.pending))

    @precondition(lambda self: self.world.pending)
    @rule()
    def all_arrive(self) -> None:
        while self.world.pending:
            self.world.arrive()

    @precondition(lambda self: self.world.pending and not self.calm)
    @rule(which=WHICH)
    def cannot_be_loaded(self, which: int) -> None:
        digest, _ = self.world.pending.pop(which % len(self.world.pending))
        self.world.fail_adapter(digest)

    @precondition(lambda self: self.world.live and not self.calm)
    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        self.world.cancel(list(self.world.live)[which % len(self.world.live)])

    @rule(name=NAMES, tier=st.sampled_from(["host", "device"]), pin=SOMETIMES)
    def activate(self, name: str, tier: Any, pin: bool) -> None:
        with suppress(AdapterBudgetExceeded):  # the operator is told; nothing has changed
            self.world.activate(self._adapter(name), tier, pin)

    @rule(
        name=NAMES,
        mode=st.sampled_from(["drain", "drain", "fail_if_busy", "forget"]),
        unpin=st.booleans(),
        again=st.none() | ASKS,
    )
    def evict(self, name: str, mode: Any, unpin: bool, again: Ask | None) -> None:
        """Also: a request for the adapter arrives at once."""
        with suppress(AdapterInUse, AdapterPinned):
            self.world.evict(name, mode, unpin)
        if again is not None:
            self._submit(replace(again, adapter=name))

    @rule(
        host=st.sampled_from([None, 60, 2 * SIZE, 6 * SIZE]),
        device=st.sampled_from([None, 60, SIZES["h"], 4 * SIZE]),
        busy=st.just([]) | st.lists(ASKS, min_size=1, max_size=3),
    )
    def set_budgets(self, host: int | None, device: int | None, busy: list[Ask]) -> None:
        """Often with requests that run: what they use cannot leave at once."""
        for ask in busy:
            self._submit(ask)
        if busy:
            self.world.step()
            self.all_arrive()
            self.world.step()
        with suppress(AdapterBudgetExceeded):  # pins; nothing has changed
            self.world.set_budgets(host=host, device=device)

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        self.world.check_integrity()

    def teardown(self) -> None:
        """Loads end, nothing goes wrong any more: every request must get all its tokens."""
        if sys.exc_info()[0] is not None:
            return  # the history has shown something already
        world = self.world
        while world.pending:
            world.arrive()
        world.drain()
        assert not world.live
        assert world.scheduler.blocks.used == 0
        world.scheduler.check_unused()
        world.plan_adapters()
        for tier in ("host", "device"):
            held, most = world.bytes_held(tier), world.most_bytes(tier)
            assert held <= most, f"the {tier} budget is not kept"
        for number, (prompt, new) in self.asked.items():
            if number not in world.failed:
                assert number in world.finished, f"{number} was lost"
                expected = [token_of(number, p) for p in range(prompt, prompt + new)]
                assert world.outputs[number] == expected
        self.seen.update(
            histories=1,
            cached_reads=world.cached_reads,
            preempted=len(world.preempted),
            finished=len(world.finished),
            bounds_met=world.bounds_met,
            penalties=world.histories,
            shrinks=world.shrinks,
            drains=world.drains,
            given_back=world.given_back,
            accepted=world.accepted,
            rejected=world.rejected,
            redone=world.redone,
            from_others=world.from_others,
        )


def run_histories(count: int, **options: Any) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Histories,
        settings=settings(
            max_examples=count,
            stateful_step_count=LONGEST,
            deadline=None,
            print_blob=True,  # what reproduces a failure
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


@pytest.mark.push
@pytest.mark.timeout(900)  # a minute, and the search for the shortest if one fails
def test_random_histories() -> None:
    Histories.seen.clear()
    run_histories(HISTORIES)
    seen = Histories.seen
    print(dict(seen))
    assert seen["histories"] >= HISTORIES
    assert seen["cached_reads"] > 5 * HISTORIES
    assert seen["preempted"] > HISTORIES / 8
    assert seen["finished"] > 5 * HISTORIES
    assert seen["bounds_met"] > 2.5 * HISTORIES
    assert seen["penalties"] > 2.5 * HISTORIES
    assert seen["shrinks"] > HISTORIES / 10
    assert seen["drains"] > HISTORIES / 10
    assert seen["given_back"] > 2.5 * HISTORIES
    assert seen["accepted"] > HISTORIES
    assert seen["rejected"] > HISTORIES
    assert seen["redone"] > 0
    assert seen["from_others"] > HISTORIES / 20


# ------------------------------------------------------------------- planted bugs


def _edit(patch: pytest.MonkeyPatch, module: ModuleType, old: str, new: str) -> None:
    function, code = edited(module, old, new)
    patch.setattr(function, "__code__", code)


def _sampled_tokens_count_as_computed(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler.update

    def wrong(self: Scheduler, *args: Any) -> tuple[list[SequenceUpdate], list[Action]]:
        updates, actions = right(self, *args)
        for update in updates:
            update.sequence.computed += 1
        return updates, actions

    patch.setattr(Scheduler, "update", wrong)


def _chunks_ignore_the_budget(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        prefill_room,
        "if self.left + self.crumb <= 0:\n            return 0",
        "if True:\n            return sequence.remaining",
    )


def _preempted_to_the_end_of_the_queue(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        scheduler,
        "self._waiting.appendleft(sequence)",
        "self._waiting.append(sequence)",
    )


def _end_forgets_the_hold(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        scheduler,
        "self.residency.unhold(sequence.digest)",
        "pass",
    )


def _nothing_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "forget", lambda self, sequence: None)


def _published_before_computed(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        scheduler,
        "self._running[sequence.id] = sequence\n",
        "self._running[sequence.id] = sequence\n"
        "        sequence.computed += count\n"
        "        self.blocks.publish(sequence)\n"
        "        sequence.computed -= count\n",
    )


def _some_decode_later(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        scheduler,
        "if sequence.state is not SequenceState.RUNNING:",
        "if sequence.state is not SequenceState.RUNNING or (\n"
        "            sequence.remaining == 1 and len(chosen) >= 2\n"
        "        ):",
    )


def _the_first_is_preempted_too(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler.schedule

    def wrong(self: Scheduler, now: float) -> StepPlan | None:
        self._running = type(self._running)(
            sorted(self._running.items(), key=lambda item: -item[1].remaining)
        )
        return right(self, now)

    patch.setattr(Scheduler, "schedule", wrong)


def _shared_blocks_are_freed(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: BlockManager, sequence: Sequence) -> None:
        for block in reversed(sequence.blocks[sequence.given_back :]):
            self._references[block] = 0
            if not self.cache.keep(block):
                self._free.append(block)
        del sequence.blocks[:]
        sequence.published = sequence.given_back = 0

    patch.setattr(BlockManager, "release", wrong)


def _the_last_token_is_adopted_too(patch: pytest.MonkeyPatch) -> None:
    right = BlockManager.adopt

    def wrong(self: BlockManager, sequence: Sequence) -> int:
        sequence.tokens.append(1)
        found = right(self, sequence)
        sequence.tokens.pop()
        return found

    patch.setattr(BlockManager, "adopt", wrong)


def _grow_hands_out_one_block_twice(patch: pytest.MonkeyPatch) -> None:
    right = BlockManager.grow

    def wrong(self: BlockManager, sequence: Sequence, tokens: int, *, spare: int = 0) -> bool:
        before = len(sequence.blocks)
        grown = right(self, sequence, tokens, spare=spare)
        if before and len(sequence.blocks) > before and len(self._free) % 7 == 3:
            self._free.append(sequence.blocks[-1])
        return grown

    patch.setattr(BlockManager, "grow", wrong)


def _keys_without_parents(patch: pytest.MonkeyPatch) -> None:
    right = prefix_cache.extend_chain

    def wrong(keys: list[bytes], count: int, **rest: Any) -> None:
        size, tokens = rest.pop("block_size"), rest.pop("tokens")
        for i in range(len(keys), count):
            own: list[bytes] = []
            right(own, 1, tokens=tokens[i * size :], block_size=size, **rest)
            keys += own

    patch.setattr("veneer_server.engine.scheduling.block_manager.extend_chain", wrong)


def _keys_without(field: str, value: str | None) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        right = prefix_cache.extend_chain

        def wrong(keys: list[bytes], count: int, **rest: Any) -> None:
            right(keys, count, **{**rest, field: value})

        patch.setattr("veneer_server.engine.scheduling.block_manager.extend_chain", wrong)

    plant.__name__ = f"keys_without_{field}"
    return plant


def _given_up_blocks_are_still_found(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixCache, "give_up", lambda self: self._idle.popitem(last=False)[0])
    patch.setattr(PrefixCache, "integrity", lambda self, used: iter(()))


def _nobody_is_overdue(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        admission,
        "if group.first.arrived <= self.overdue:",
        "if False:",
    )


def _nobody_is_held_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Admission, "lacking_too_long", lambda self, now: None)


def _the_room_is_taken_for_ever(patch: pytest.MonkeyPatch) -> None:
    right = Residency.plan

    def wrong(self: Residency, wants: Any, overdue: Any, near: Any) -> ResidencyPlan:
        return right(self, wants, None, near)

    patch.setattr(Residency, "plan", wrong)


def _older_ones_lose_their_adapters(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        load_planner,
        "found[-1][0] > index",
        "found[-1][0] > -1",
    )


def _adapters_that_are_not_planned_yet_stay(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        load_planner,
        "(running if entry.holds else later).append((len(queue), entry))",
        "running += [(len(queue), entry)] if entry.holds else []",
    )


def _reading_ahead_takes_what_others_use(patch: pytest.MonkeyPatch) -> None:
    right = Residency.plan

    def wrong(self: Residency, wants: Any, overdue: Any, near: Any) -> ResidencyPlan:
        return right(self, wants, overdue, None)

    patch.setattr(Residency, "plan", wrong)


def _lower_budgets_drop_nothing(patch: pytest.MonkeyPatch) -> None:
    def wrong(copies: Ledger, waiting: tuple[LedgerEntry, ...]) -> list[Drop]:
        copies.lower_ceilings()
        return []

    patch.setattr("veneer_server.engine.residency.residency.shrink", wrong)


def _a_lower_budget_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What could not go at once is not looked at again."""
    _edit(
        patch,
        residency,
        "self._shrinking = any(self.ledger.excess(tier) for tier in TIERS)",
        "self._shrinking = False",
    )


def _held_adapters_are_evicted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Residency, "try_hold", lambda self, digest: True)
    patch.setattr(Residency, "unhold", lambda self, digest: None)
    patch.setattr(Residency, "integrity", lambda self, held, leased: iter(()))


def _a_new_request_ends_a_drain(patch: pytest.MonkeyPatch) -> None:
    right = Residency.lease

    def wrong(self: Residency, source: AdapterSource) -> str:
        if (entry := self.ledger.entries.get(source.weights_digest)) is not None:
            self.ledger.drain(entry, draining=False)
        return right(self, source)

    patch.setattr(Residency, "lease", wrong)


def _a_drain_waits_for_what_waits(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        residency,
        "(entry.leases > 0 and not entry.draining)",
        "entry.leases > 0",
    )


def _all_that_wait_is_ahead(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Scheduler, sequence: Sequence) -> tuple[int, int]:
        own = sequence.prompt_length - self.blocks.cached_prefix(sequence)
        return own, sum(s.remaining for s in self._by_id.values())

    patch.setattr(Scheduler, "least_tokens", wrong)


def _penalties_count_again_after_a_preemption(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        scheduler,
        "sequence.awaited = 0\n        sequence.prompt_logprobs.clear()",
        "sequence.awaited = 0\n"
        "        if sequence.token_counts is not None:\n"
        "            sequence.token_counts.generated = 0\n"
        "        sequence.prompt_logprobs.clear()",
    )


def _blocks_are_given_back_too_early(patch: pytest.MonkeyPatch) -> None:
    """A block too early, and the check that would notice it sees no difference."""
    right = block_manager.first_reached
    patch.setattr(
        block_manager,
        "first_reached",
        lambda computed, window, size: right(computed + size, window, size),
    )


def _a_prefix_is_used_though_its_window_is_gone(patch: pytest.MonkeyPatch) -> None:
    right = BlockManager.adopt

    def wrong(self: BlockManager, sequence: Sequence) -> int:
        if self._window is None or not self.shares(sequence):
            return right(self, sequence)
        keys = self._keys(sequence, (len(sequence.tokens) - 1) // self.block_size)
        cached = [self.cache.find(key) is not None for key in keys]
        end = max((i + 1 for i, there in enumerate(cached) if there), default=0)
        for i in range(end):
            if not cached[i]:
                self.cache.insert(keys[i], self._free[-1] if self._free else 1)
        return right(self, sequence)

    patch.setattr(BlockManager, "adopt", wrong)


def _given_back_blocks_stay_taken(patch: pytest.MonkeyPatch) -> None:
    _edit(patch, block_manager, "self._drop(sequence.blocks[index])", "pass")


def _nothing_is_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "give_back", lambda self, sequence: None)


def _a_window_is_counted_without_its_chunk(patch: pytest.MonkeyPatch) -> None:
    """So that a sequence is let in that can never run."""
    right = block_manager.most_blocks
    patch.setattr(
        block_manager,
        "most_blocks",
        lambda tokens, window, chunk, size: right(tokens, window, 1, size),
    )


def _refused_draft_tokens_stay_in_the_cache(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        scheduler,
        "sequence.computed = planned.start + planned.known + accepted",
        "sequence.computed = min(len(sequence.tokens), planned.start + len(planned.tokens))",
    )


def _drafts_of(whom: str, key: str) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        old = "return sequence.request.tenant, sequence.request.cache_scope, sequence.digest"
        _edit(patch, speculation, old, f"return {key}")

    plant.__name__ = f"drafts_of_{whom.replace(' ', '_')}"
    return plant


def _answers_are_kept_though_not_shared(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch, speculation, "if keep and sequence.request.use_prefix_cache and", "if keep and"
    )


def _blocks_for_drafts_are_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "trim", lambda self, sequence, tokens: None)


def _drafts_take_the_last_blocks(patch: pytest.MonkeyPatch) -> None:
    _edit(patch, scheduler, "len(draft), spare=spare", "len(draft), spare=0")


def _a_broken_draft_ends_its_sequence(patch: pytest.MonkeyPatch) -> None:
    _edit(
        patch,
        scheduler,
        "self.speculation.stop(sequence)\n                self._preempt(sequence)",
        "actions += self._end(sequence)",
    )


BUGS = [
    _sampled_tokens_count_as_computed,
    _chunks_ignore_the_budget,
    _preempted_to_the_end_of_the_queue,
    _end_forgets_the_hold,
    _nothing_is_forgotten,
    _published_before_computed,
    _some_decode_later,
    _the_first_is_preempted_too,
    _shared_blocks_are_freed,
    _the_last_token_is_adopted_too,
    _grow_hands_out_one_block_twice,
    _keys_without_parents,
    _keys_without("scope", ""),
    _keys_without("digest", None),
    _given_up_blocks_are_still_found,
    _nobody_is_overdue,
    _nobody_is_held_back,
    _the_room_is_taken_for_ever,
    _older_ones_lose_their_adapters,
    _adapters_that_are_not_planned_yet_stay,
    _reading_ahead_takes_what_others_use,
    _lower_budgets_drop_nothing,
    _a_lower_budget_is_forgotten,
    _held_adapters_are_evicted,
    _a_new_request_ends_a_drain,
    _a_drain_waits_for_what_waits,
    _all_that_wait_is_ahead,
    _penalties_count_again_after_a_preemption,
    _blocks_are_given_back_too_early,
    _a_prefix_is_used_though_its_window_is_gone,
    _given_back_blocks_stay_taken,
    _nothing_is_given_back,
    _a_window_is_counted_without_its_chunk,
    _refused_draft_tokens_stay_in_the_cache,
    _drafts_of("another tenant", '"", "", sequence.digest'),
    _drafts_of(
        "another adapter", "sequence.request.tenant, sequence.request.cache_scope, None"
    ),
    _answers_are_kept_though_not_shared,
    _blocks_for_drafts_are_kept,
    _drafts_take_the_last_blocks,
    _a_broken_draft_ends_its_sequence,
]


@pytest.mark.verify
@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__.strip("_"))
def test_a_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, LookupError)) as caught:
        # One that shows it is enough: no search for the shortest.
        run_histories(MUTANTS_HISTORIES, phases=[Phase.generate], database=None)
    print(f"caught: {caught.value}")
