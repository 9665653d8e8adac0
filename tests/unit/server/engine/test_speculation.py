"""Drafts: what they are looked up in, how long they are, and when there are none."""

from __future__ import annotations

import random
from typing import Any

import pytest
from veneer_server.engine.scheduling import speculation
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.engine.scheduling.speculation import (
    ALL_STORED_TOKENS,
    MOST_DRAFT,
    STORE_TOKENS,
    IndexedTokens,
    Speculation,
    StepTimes,
    SuffixStore,
)
from veneer_server.step.token_counts import TokenCounts
from veneer_server.wire.messages import AdapterSource, SamplingParams, SequenceRequest

from tests.unit.server.engine.world import FreeSteps

EOS = 0
SEED = 45


def sequence(
    number: int, prompt: list[int], output: list[int] | None = None, **fields: Any
) -> Sequence:
    request = SequenceRequest(
        prompt=prompt, **{"max_tokens": 100, "sampling": SamplingParams(), **fields}
    )
    made = Sequence(number, request, 0.0, None)
    made.tokens += output or []
    return made


def free() -> Speculation:
    made = Speculation([(1, 1.0)], frozenset({EOS}))
    made.times = FreeSteps([(1, 1.0)])
    return made


def draft(made: Speculation, one: Sequence, context: int = 1000) -> list[int]:
    return made.choose([one], 1, 64, context).get(one.id, [])


def plain_match(tokens: list[int], suffix: list[int]) -> int:
    """Length of the longest earlier occurrence of an end of ``suffix``, looked up naively."""
    for length in range(len(suffix), 2, -1):
        wanted = suffix[-length:]
        if any(tokens[at : at + length] == wanted for at in range(len(tokens) - length)):
            return length
    return 0


def test_the_longest_match_is_found() -> None:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    for _ in range(300):
        tokens = [draw.randrange(3) for _ in range(draw.randrange(3, 60))]
        text = IndexedTokens(tokens)
        text.index(len(tokens) - 1)
        length, place = text.find(tokens)
        best = plain_match(tokens, tokens[-32:])
        # Of a group that occurs very often only the newest occurrences are compared.
        assert (length > 0) == (best > 0)
        assert length <= best
        if length:
            assert tokens[place - length : place] == tokens[-length:]
            assert 3 <= length <= place < len(tokens)


def test_what_followed_is_drafted_from_the_prompt_and_the_output() -> None:
    made = free()
    assert draft(made, sequence(1, [5, 6, 7, 8, 9, 10, 5, 6, 7])) == [
        *[8, 9, 10, 5, 6, 7] * 2,
        *[8, 9, 10],
    ]
    assert draft(made, sequence(2, [1, 2], [5, 6, 7, 8, 4, 5, 6, 7]))[:2] == [8, 4]
    assert draft(made, sequence(3, [5, 6, 7, 8, 9], [6, 7])) == []
    assert draft(made, sequence(4, [5, 6])) == []


def test_a_draft_ends_before_what_ends_the_sequence() -> None:
    made = free()
    prompt = [5, 6, 7, 8, EOS, 9, 3, 3, 5, 6, 7]
    assert draft(made, sequence(1, prompt)) == [8]
    assert draft(made, sequence(2, prompt, ignore_eos=True))[:3] == [8, EOS, 9]
    assert draft(made, sequence(3, prompt, ignore_eos=True, stop_token_ids=[9])) == [8, EOS]
    assert draft(made, sequence(4, prompt, ignore_eos=True, max_tokens=3)) == [8, EOS]
    assert draft(made, sequence(5, prompt, max_tokens=1)) == []
    assert draft(made, sequence(6, prompt, ignore_eos=True), context=len(prompt) + 3) == [
        8,
        EOS,
    ]
    # Its rows up to min_tokens forbid the same tokens.
    assert draft(made, sequence(7, prompt, ignore_eos=True, min_tokens=3)) == [8, EOS]


def test_the_expected_answer_is_drafted_from_its_beginning_on() -> None:
    made = free()
    expected = list(range(50, 90))
    one = sequence(1, [1, 2, 3], prediction=expected)
    assert draft(made, one) == expected[:MOST_DRAFT]
    one.tokens += expected[:4]
    assert draft(made, one) == expected[4 : 4 + MOST_DRAFT]
    one.tokens += [7, *expected[10:13]]  # other words, and back
    assert draft(made, one)[:3] == expected[13:16]
    wrong = sequence(2, [1, 2, 3], [9], prediction=expected)
    assert draft(made, wrong) == []


def test_earlier_answers_are_drafted_only_for_their_tenant_scope_and_adapter() -> None:
    made = free()
    ones, other = (
        AdapterSource(weights_digest=name, folder="", parameters=1, name=name) for name in "ab"
    )
    whose: dict[str, Any] = {"tenant": "t", "cache_scope": "s", "adapter": ones}
    made.ended(sequence(1, [1, 2, 3, 4], list(range(20, 40)), **whose), keep=True)

    def drafted(number: int, **fields: Any) -> list[int]:
        return draft(made, sequence(number, [9, 2, 3, 4], **{**whose, **fields}))

    assert drafted(2) == list(range(20, 35))
    assert drafted(3, tenant="u") == []
    assert drafted(4, cache_scope="r") == []
    assert drafted(5, adapter=other) == []
    assert drafted(6, adapter=None) == []
    assert drafted(7, use_prefix_cache=False) == []
    made.ended(sequence(8, [6, 6, 6], list(range(60, 70)), use_prefix_cache=False), keep=True)
    assert draft(made, sequence(9, [7, 6, 6, 6])) == []
    made.ended(sequence(10, [6, 6, 6], list(range(60, 70))), keep=False)  # was not finite
    assert draft(made, sequence(11, [7, 6, 6, 6])) == []


def test_answers_do_not_run_into_each_other() -> None:
    made = free()
    for number, output in ((1, list(range(20, 30))), (2, list(range(40, 50)))):
        made.ended(sequence(number, [1, 2, 3], output), keep=True)
    one = sequence(3, [8, 8], [27, 28, 29])
    assert draft(made, one) == []
    assert draft(made, sequence(4, [8, 8], [25, 26, 27])) == [28, 29]


def test_the_store_is_bounded_and_keeps_the_newest() -> None:
    store = SuffixStore()
    for number in range(STORE_TOKENS // 500):
        store.add(("t", "", None), [number] * 1000)
    assert STORE_TOKENS // 2 <= store.tokens <= STORE_TOKENS
    newest = STORE_TOKENS // 500 - 1
    assert any(text.find([newest] * 4)[0] for text in store.texts(("t", "", None)))
    assert not any(text.find([0] * 4)[0] for text in store.texts(("t", "", None)))
    for number in range(2 * ALL_STORED_TOKENS // STORE_TOKENS):
        for _ in range(20):
            store.add((str(number), "", None), [number] * 1000)
    assert store.tokens <= ALL_STORED_TOKENS
    assert store.texts(("t", "", None)) == ()
    assert store.texts((str(number), "", None))
    store.add(("long", "", None), list(range(10 * STORE_TOKENS)))
    assert sum(len(text.tokens) for text in store.texts(("long", "", None))) <= STORE_TOKENS


def test_drafts_are_as_long_as_they_pay() -> None:
    """Steps of up to 16 rows take the same time, longer ones in proportion to their rows."""
    made = Speculation([(1, 1.0), (16, 1.0), (32, 2.0), (64, 4.0)])
    copies = [sequence(n, [n, *range(20, 60), *range(20, 30)]) for n in range(1, 33)]
    assert len(made.choose(copies[:1], 1, 64, 1000)[1]) == MOST_DRAFT
    several = made.choose(copies[:4], 4, 64, 1000)
    assert sum(map(len, several.values())) == 12
    assert made.choose(copies, 32, 64, 1000) == {}  # a row each, and each adds its share
    assert made.choose(copies[:1], 1, 4, 1000)[1] == list(range(30, 33))  # the step's limit


def test_drafts_that_are_refused_stop_and_are_tried_again_later() -> None:
    made = Speculation([(1, 1.0), (16, 2.5)])
    draw = random.Random(SEED)
    one = sequence(1, [5, 6, 7] * 3, max_tokens=10_000)
    tried: list[int] = []
    for step in range(400):
        found = draft(made, one, 100_000)
        one.tokens += [draw.randrange(100, 1000), 5, 6, 7]
        if found:
            tried.append(step)
            made.judge(one, found, 0)
    early, late = (sum(first <= step < first + 100 for step in tried) for first in (0, 300))
    assert early > 0
    assert 0 < late <= 10
    # From then on they are right: it finds out.
    found = []
    for _ in range(60):
        one.tokens += [8, 9, 5, 6, 7]
        found = draft(made, one, 100_000)
        if found:
            made.judge(one, found, len(found))
    assert found[:2] == [8, 9]


def test_what_sequences_of_an_adapter_showed_is_assumed_of_the_next() -> None:
    made = Speculation([(1, 1.0), (16, 2.5)])
    prompt = [5, 6, 7, 8, 5, 6, 7]
    assert draft(made, sequence(1, prompt))
    for number in range(2, 40):
        one = sequence(number, prompt)
        if found := draft(made, one):
            one.tokens.append(99)
            made.judge(one, found, 0)
    assert not draft(made, sequence(50, prompt))
    assert draft(made, sequence(51, prompt, tenant="other")), "it showed nothing yet"


def test_step_times_follow_the_machine_and_forget_an_interruption() -> None:
    times = StepTimes([(1, 1.0), (2, 1.1), (16, 2.0)])
    assert times.seconds(16) / times.seconds(1) == pytest.approx(2.0)
    assert times.seconds(30) == pytest.approx(2.9)  # as the last rows
    times.observe(16, 100.0)
    assert times.seconds(16) / times.seconds(1) < 2.1
    for _ in range(300):  # rows cost more here than was measured, and all steps take longer
        times.observe(1, 3.0)
        times.observe(16, 9.0)
    assert times.seconds(1) == pytest.approx(3.0, rel=0.1)
    assert times.seconds(16) == pytest.approx(9.0, rel=0.1)
    for _ in range(2000):  # not seen any more: as was measured
        times.observe(1, 3.0)
    assert times.seconds(16) / times.seconds(1) == pytest.approx(2.0, rel=0.2)


def test_a_measurement_that_was_disturbed_does_not_make_rows_free() -> None:
    """One row cannot take longer than eight."""
    times = StepTimes([(1, 9.0), (8, 2.0), (16, 4.0)])
    assert times.seconds(1) == times.seconds(8) == pytest.approx(2.0)
    assert times.seconds(16) == pytest.approx(4.0)


def test_counts_after_a_draft_are_those_of_all_its_tokens() -> None:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    for _ in range(100):
        prompt, output, more = (
            [draw.randrange(8) for _ in range(draw.randrange(1, 9))] for _ in range(3)
        )
        counts, whole = TokenCounts(prompt), TokenCounts(prompt)
        counts.add(output)
        whole.add(output + more)
        one, other = counts.seen().after(more), whole.seen()
        pairs = (
            dict(zip(s.ids.tolist(), s.counts.tolist(), strict=True)) for s in (one, other)
        )
        assert next(pairs) == next(pairs)


def test_nothing_is_left_of_a_sequence_that_ended() -> None:
    made = free()
    one = sequence(1, [5, 6, 7, 8, 5, 6, 7])
    assert draft(made, one)
    with pytest.raises(AssertionError):
        made.check_unused()
    made.ended(one, keep=True)
    made.check_unused()
    assert made.take() == (0, 0)
    assert speculation.store_key(one) == ("", "", None)
