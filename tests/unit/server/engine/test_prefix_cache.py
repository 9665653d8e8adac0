"""What is found in the prefix cache, by whom, and what is evicted first."""

from __future__ import annotations

import pytest
from veneer_server.engine.scheduling.prefix_cache import PrefixCache, extend_chain

from tests.unit.server.engine.world import BLOCK, World, adapter

PROMPT = list(range(1, 3 * BLOCK + 2))
"""Three full blocks and one token."""


def found(world: World, number: int, **options: object) -> int:
    """Tokens that a new request with `PROMPT` finds; it runs to its end."""
    prompt = options.pop("prompt", PROMPT)
    sequence = world.ask(number, prompt, 1, **options)  # type: ignore[arg-type]
    world.drain()
    return sequence.cached_tokens


def test_the_same_prompt_is_found_and_nothing_else_is() -> None:
    world = World()
    assert found(world, 1) == 0
    assert found(world, 2) == 3 * BLOCK
    assert found(world, 3, prompt=[*PROMPT[: 2 * BLOCK], 99, 99, 99]) == 2 * BLOCK
    assert found(world, 4, prompt=[99, *PROMPT[1:]]) == 0
    assert found(world, 5, source=adapter("a")) == 0
    assert found(world, 6, scope="another tenant") == 0
    assert found(world, 7, share=False) == 0
    assert found(world, 8, scores=True) == 0
    assert found(world, 9) == 3 * BLOCK


def test_what_does_not_share_leaves_nothing_behind() -> None:
    world = World()
    assert found(world, 1, share=False) == 0
    assert world.scheduler.blocks.cached == 0
    off = World(prefix_cache=False)
    assert [found(off, 1), found(off, 2)] == [0, 0]


def test_a_prompt_with_log_probabilities_finds_nothing_but_is_found() -> None:
    """All of it must be computed, but the other samples of the request need not again."""
    world = World()
    scoring = world.ask(1, PROMPT, 20, scores=True)
    world.step()
    others = [world.ask(number, PROMPT, 20) for number in (2, 3)]
    world.step()
    for other in others:
        assert other.blocks[:3] == scoring.blocks[:3]
    world.drain()
    assert [s.cached_tokens for s in (scoring, *others)] == [0, 3 * BLOCK, 3 * BLOCK]
    assert len(scoring.prompt_logprobs) == len(PROMPT) - 1
    assert found(world, 4, scores=True) == 0


def test_the_last_token_of_a_cached_prompt_is_computed_anew() -> None:
    """There would be no logits without it, and its block is not written to by two."""
    world = World()
    whole = PROMPT[: 3 * BLOCK]
    assert found(world, 1, prompt=whole) == 0
    assert found(world, 2, prompt=whole) == 2 * BLOCK


def test_a_prompt_is_found_while_its_first_sequence_still_runs() -> None:
    world = World()
    world.ask(1, PROMPT, 20)
    world.step()
    second = world.ask(2, PROMPT, 20)
    world.step()
    assert second.cached_tokens == 3 * BLOCK
    first = world.live[1]
    assert second.blocks[:3] == first.blocks[:3]
    assert second.blocks[3] != first.blocks[3]
    assert world.scheduler.blocks.used == len({*first.blocks, *second.blocks})


def test_two_that_arrive_together_both_compute() -> None:
    world = World()
    sequences = [world.ask(n, PROMPT, 4) for n in (1, 2)]
    world.drain()
    assert [s.cached_tokens for s in sequences] == [0, 0]


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    world = World()
    world.ask(1, PROMPT, 8)
    world.drain()
    conversation = [*PROMPT, *world.outputs[1]]
    # The last token was never computed.
    computed = (len(conversation) - 1) // BLOCK * BLOCK
    assert found(world, 2, prompt=[*conversation, 5, 6]) == computed > len(PROMPT)


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    computed = []
    for prefix_cache in (True, False):
        world = World(blocks=11, prefix_cache=prefix_cache)
        world.ask(1, [1] * 8, 20)
        young = world.ask(2, [2] * 8, 20)
        world.drain()
        assert world.preempted == {2}
        assert young.cached_tokens == 0, "what it found when it first started is reported"
        computed.append(world.computed)
    assert computed[0] < computed[1]


def test_cancelled_sequences_leave_their_blocks_too() -> None:
    world = World()
    world.ask(1, PROMPT, 20)
    world.step()
    world.cancel(1)
    assert found(world, 2) == 3 * BLOCK


def test_the_tail_is_given_up_before_the_head_and_the_oldest_first() -> None:
    world = World(blocks=8)
    assert found(world, 1, prompt=[1] * 9) == 0
    assert found(world, 2, prompt=[2] * 9) == 0
    assert world.scheduler.blocks.cached == 4
    # Seven blocks: four are kept, so this one takes the last of the older prompt.
    assert found(world, 3, prompt=[3] * 13) == 0
    assert found(world, 4, prompt=[2] * 9) == 8
    assert found(world, 5, prompt=[1] * 9) == 4


@pytest.mark.parametrize("window", [None, 2 * BLOCK])
def test_a_reset_is_the_end_of_what_was_cached(window: int | None) -> None:
    world = World(window=window)
    assert found(world, 1) == 0
    assert found(world, 2) == 3 * BLOCK
    running = world.ask(3, PROMPT, 20)
    world.step()
    free = world.scheduler.blocks.free
    world.scheduler.blocks.reset_cache()
    world.scheduler.check_integrity()
    assert world.scheduler.blocks.free == free, "what was idle is free"
    assert world.scheduler.blocks.cached == 0
    assert found(world, 4) == 0
    assert found(world, 5) == 3 * BLOCK, "what is computed after it is kept"
    assert len(world.outputs[3]) == 20, "what runs goes on"
    assert running.cached_tokens == 3 * BLOCK
    world.scheduler.check_integrity()


def test_lookups_are_counted_once_a_request() -> None:
    world = World()
    found(world, 1)
    found(world, 2)
    lookups = world.scheduler.take_lookups()
    assert (lookups.asked, lookups.found) == (2 * len(PROMPT), 3 * BLOCK)
    assert world.scheduler.take_lookups().asked == 0


def test_keys_depend_on_every_part() -> None:
    def last(scope: str, digest: str | None, tokens: list[int]) -> bytes:
        keys: list[bytes] = []
        extend_chain(keys, 2, scope=scope, digest=digest, tokens=tokens, block_size=2)
        return keys[-1]

    keys = [
        last("", None, [1, 2, 3, 4]),
        last("", "", [1, 2, 3, 4]),
        last("", "base", [1, 2, 3, 4]),
        last("base", None, [1, 2, 3, 4]),
        last("", "a", [1, 2, 3, 4]),
        last("a", "", [1, 2, 3, 4]),
        last("", None, [9, 2, 3, 4]),
        last("", None, [1, 2, 3, 9]),
    ]
    assert len(set(keys)) == len(keys)
    assert last("", None, [1, 2, 3, 4, 5]) == keys[0]


def test_the_first_block_with_a_key_stays_the_one_that_is_found() -> None:
    cache = PrefixCache()
    cache.insert(b"k", 1)
    cache.insert(b"k", 2)
    assert cache.find(b"k") == 1
    assert not cache.keep(2)
    assert cache.keep(1)
    assert cache.give_up() == 1
    assert cache.find(b"k") is None
    with pytest.raises(KeyError):
        cache.give_up()
