"""Random histories of scheduler, block manager, prefix cache and residency, together.

Thousands of short ones with pools so tiny that everything runs out. What must hold at
each step is in `World`; here are the histories, the end that each must come to, and
planted bugs that must be caught. A failure prints the seed of its history.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from veneer_registry.errors import AdapterBudgetExceeded, AdapterInUse, AdapterPinned
from veneer_server.engine import prefix_cache
from veneer_server.engine.admission import Admission
from veneer_server.engine.block_manager import BlockManager
from veneer_server.engine.messages import AdapterSource
from veneer_server.engine.prefix_cache import PrefixCache
from veneer_server.engine.residency import Residency
from veneer_server.engine.scheduler import Scheduler, Update
from veneer_server.engine.sequence import Sequence, StepPlan

from tests.unit.server.engine.world import BLOCK, CONTEXT, SIZE, World, adapter, token_of

HISTORIES = 2000
SEED = 20261125
SIZES = {name: 40 + 12 * i for i, name in enumerate("abcdefgh")}


class History:
    """One random history: a world, and what was asked of it."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.world = World(
            device=dice.choice([SIZES["h"], 2 * SIZE, 4 * SIZE]),
            host=dice.choice([2 * SIZE, 6 * SIZE]),
            blocks=dice.choice([CONTEXT // BLOCK + 1, 24, 60]),
            max_running=dice.choice([1, 3, 8]),
            budget=dice.choice([8, 16, 64]),
            beside_decode=dice.choice([1, 4, 64]),
            patience=dice.choice([0.5, 5.0]),
            max_wait=dice.choice([1.0, 10.0]),
            shared=seed % 2 == 1,
            exact=dice.random() < 0.15,
            prefix_cache=dice.random() < 0.9,
        )
        self.numbers = iter(range(1, 1000))
        self.asked: dict[int, tuple[int, int]] = {}
        self.texts = [self._text(1) for _ in range(3)]
        """Token lists that prompts begin with: a few prefixes, then whole conversations."""

    def _text(self, shortest: int) -> list[int]:
        # Two token ids only: chains that differ late are common, and so are equal blocks.
        length = self.dice.randint(shortest, 30)
        return [self.dice.choice([1, 2]) for _ in range(length)]

    def run(self) -> None:
        dice = self.dice
        for _ in range(dice.randint(10, 60)):
            kind = dice.choices(
                ["submit", "step", "arrive", "cancel", "fail", "operator"],
                [5, 12, 5, 1, 0.3, 1.5],
            )[0]
            getattr(self, "_" + kind)()
            self.world.check_integrity()
        self._end()

    def _submit(self) -> None:
        dice, number = self.dice, next(self.numbers)
        own = self._text(1) if dice.random() < 0.7 else []
        prompt = (dice.choice(self.texts) + own)[: CONTEXT - 10]
        new = dice.randint(1, min(20, CONTEXT - len(prompt)))
        name = dice.choice([None, None, *SIZES])
        scope = dice.choice(["", "", "other"])
        try:
            self.world.ask(
                number,
                prompt,
                new,
                self._adapter(name) if name else None,
                scope=scope,
                share=dice.random() < 0.9,
                scores=dice.random() < 0.1,
                penalties=number % 3 == 0,
            )
        except AdapterBudgetExceeded:
            return
        self.asked[number] = (len(prompt), new)
        self.texts.append([*prompt, *(token_of(number, len(prompt) + i) for i in range(3))])

    def _adapter(self, name: str) -> AdapterSource:
        return adapter(name, SIZES[name])

    def _step(self) -> None:
        poison = self.dice.randrange(8) if self.dice.random() < 0.02 else None
        self.world.step(self.dice.choice([0.1, 1.0]), poison)

    def _arrive(self) -> None:
        if self.world.pending:
            self.world.arrive(self.dice.randrange(len(self.world.pending)))

    def _cancel(self) -> None:
        if self.world.live:
            self.world.cancel(self.dice.choice(list(self.world.live)))

    def _fail(self) -> None:
        if self.world.pending:
            index = self.dice.randrange(len(self.world.pending))
            digest, _ = self.world.pending.pop(index)
            self.world.fail_adapter(digest)

    def _operator(self) -> None:
        residency, dice = self.world.residency, self.dice
        name = dice.choice(list(SIZES))
        try:
            if dice.random() < 0.5:
                tier, pin = dice.choice(["host", "device"]), dice.random() < 0.3
                residency.activate(self._adapter(name), tier, pin)
            else:
                mode, unpin = dice.choice(["drain", "fail_if_busy"]), dice.random() < 0.7
                _, _, actions = residency.evict(name, mode, unpin)
                self.world.carry_out(actions)
        except (AdapterInUse, AdapterPinned, AdapterBudgetExceeded):
            pass  # the operator is told; nothing has changed

    def _end(self) -> None:
        """Loads end, nothing goes wrong any more: every request must get all its tokens."""
        world = self.world
        while world.pending:
            world.arrive()
        world.drain()
        assert not world.live
        assert world.scheduler.blocks.used == 0
        for number, (prompt, new) in self.asked.items():
            if number not in world.failed:
                assert number in world.finished, f"{number} was lost"
                expected = [token_of(number, p) for p in range(prompt, prompt + new)]
                assert world.outputs[number] == expected


def run_history(seed: int) -> History:
    history = History(seed)
    try:
        history.run()
    except Exception as error:
        raise AssertionError(f"history {seed}: {type(error).__name__}: {error}") from error
    return history


def test_random_histories() -> None:
    print(f"seeds {SEED} to {SEED + HISTORIES - 1}")
    histories = [run_history(SEED + i) for i in range(HISTORIES)]
    # They would prove nothing if nothing had run out or been shared.
    assert sum(h.world.cached_reads for h in histories) > 10_000
    assert sum(len(h.world.preempted) for h in histories) > 500
    assert sum(len(h.world.finished) for h in histories) > 10_000
    assert sum(h.world.bounds_met for h in histories) > 5_000
    assert sum(h.world.histories for h in histories) > 5_000


# ------------------------------------------------------------------- planted bugs


def _sampled_tokens_count_as_computed(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler.update

    def wrong(self: Scheduler, *args: Any) -> list[Update]:
        updates = right(self, *args)
        for update in updates:
            update.sequence.computed += 1
        return updates

    patch.setattr(Scheduler, "update", wrong)


def _chunks_ignore_the_budget(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_chunk", lambda self, sequence, left: sequence.remaining)


def _preempted_to_the_end_of_the_queue(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler._preempt

    def wrong(self: Scheduler, sequence: Sequence) -> None:
        right(self, sequence)
        self._waiting.rotate(-1)

    patch.setattr(Scheduler, "_preempt", wrong)


def _end_forgets_the_hold(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Scheduler, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self.blocks.release(sequence)

    patch.setattr(Scheduler, "_leave_running", wrong)


def _nothing_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "forget", lambda self, sequence: None)


def _published_before_computed(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler._start

    def wrong(self: Scheduler, sequence: Sequence, left: int, now: float) -> int:
        count = right(self, sequence, left, now)
        if count:
            sequence.computed += count
            self.blocks.publish(sequence)
            sequence.computed -= count
        return count

    patch.setattr(Scheduler, "_start", wrong)


def _some_decode_later(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler._choose

    def wrong(self: Scheduler, sequence: Sequence, count: int, chosen: dict[int, Any]) -> int:
        if sequence.remaining == 1 and len(chosen) >= 2:
            return 0
        return right(self, sequence, count, chosen)

    patch.setattr(Scheduler, "_choose", wrong)


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
        for block in reversed(sequence.blocks):
            self._references[block] = 0
            if not self._cache.keep(block):
                self._free.append(block)
        sequence.blocks.clear()
        sequence.published = 0

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

    patch.setattr("veneer_server.engine.block_manager.extend_chain", wrong)


def _keys_without(field: str, value: str | None) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        right = prefix_cache.extend_chain

        def wrong(keys: list[bytes], count: int, **rest: Any) -> None:
            right(keys, count, **{**rest, field: value})

        patch.setattr("veneer_server.engine.block_manager.extend_chain", wrong)

    plant.__name__ = f"keys_without_{field}"
    return plant


def _given_up_blocks_are_still_found(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixCache, "give_up", lambda self: self._idle.popitem(last=False)[0])
    patch.setattr(PrefixCache, "check_integrity", lambda self, used: set(self._idle))


def _nobody_is_overdue(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Admission, sequence: Sequence, in_batch: set[str], now: float) -> int:
        return int(sequence.digest is not None and sequence.digest not in in_batch)

    patch.setattr(Admission, "_rank", wrong)


def _nobody_is_held_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Admission, "lacking_too_long", lambda self, now: None)


def _the_room_is_taken_for_ever(patch: pytest.MonkeyPatch) -> None:
    right = Residency._left_for_younger

    def wrong(self: Residency, lacking: Any, overdue: bool) -> dict[Any, int]:
        return right(self, lacking, False)

    patch.setattr(Residency, "_left_for_younger", wrong)


def _held_adapters_are_evicted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Residency, "try_hold", lambda self, digest: True)
    patch.setattr(Residency, "unhold", lambda self, digest: None)
    patch.setattr(Residency, "check_integrity", lambda self, held, leased: None)


def _all_that_wait_is_ahead(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Scheduler, sequence: Sequence) -> tuple[int, int]:
        own = sequence.prompt_length - self.blocks.cached_prefix(sequence)
        return own, sum(s.remaining for s in self._by_id.values())

    patch.setattr(Scheduler, "least_tokens", wrong)


def _what_is_computed_for_two_counts_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "common_prefix", lambda self, sequence, other: 0)


def _what_can_be_preempted_is_ahead(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler.least_tokens

    def wrong(self: Scheduler, sequence: Sequence) -> tuple[int, int]:
        total, self.blocks.total = self.blocks.total, 1 << 60
        found = right(self, sequence)
        self.blocks.total = total
        return found

    patch.setattr(Scheduler, "least_tokens", wrong)


def _penalties_count_again_after_a_preemption(patch: pytest.MonkeyPatch) -> None:
    right = Scheduler._preempt

    def wrong(self: Scheduler, sequence: Sequence) -> None:
        right(self, sequence)
        if sequence.history is not None:
            sequence.history.generated = 0

    patch.setattr(Scheduler, "_preempt", wrong)


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
    _held_adapters_are_evicted,
    _all_that_wait_is_ahead,
    _what_is_computed_for_two_counts_twice,
    _what_can_be_preempted_is_ahead,
    _penalties_count_again_after_a_preemption,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__.strip("_"))
def test_a_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    for i in range(HISTORIES):
        try:
            run_history(SEED + i)
        except AssertionError as error:
            print(f"caught: {error}")
            return
    pytest.fail("no history noticed")
