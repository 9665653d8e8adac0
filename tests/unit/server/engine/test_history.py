"""Token counts for penalties: updated step by step, they equal those of the whole text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Tokens

import torch
from hypothesis import given
from hypothesis import strategies as st
from veneer_server.engine.execution import sampler
from veneer_server.engine.scheduling.sequence import Sequence, plan_sequence
from veneer_server.step.choice import TokenChoice
from veneer_server.step.token_counts import Seen, TokenCounts
from veneer_server.wire.messages import SamplingParams, SequenceRequest

VOCAB = 7
PENALTIES = SamplingParams(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=-0.1)

texts = st.lists(st.integers(0, VOCAB - 1), max_size=30)


def seen_in(prompt: Tokens[int], output: Tokens[int]) -> Seen:
    history = TokenCounts(prompt)
    history.add(output)
    return history.seen()


def as_dict(seen: Seen) -> dict[int, int]:
    found = dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True))
    assert len(found) == len(seen.ids), "a token twice"
    return found


def expected(prompt: Tokens[int], output: Tokens[int]) -> dict[int, int]:
    counts = Counter(output)
    return {token: counts[token] for token in {*prompt, *output}}


def sequence(prompt: list[int], sampling: SamplingParams = PENALTIES) -> Sequence:
    return Sequence(1, SequenceRequest(prompt, 100, sampling), 0.0, None)


@given(texts.filter(bool), st.lists(texts))
def test_each_step_sees_what_the_whole_text_says(
    prompt: list[int], outputs: list[list[int]]
) -> None:
    """A sequence that was preempted or joined late asks after several tokens at once."""
    asked = sequence(prompt)
    before: list[tuple[Seen, dict[int, int]]] = []
    for output in [[], *outputs]:
        asked.tokens.extend(output)
        seen, right = asked.seen(), expected(prompt, asked.tokens[len(prompt) :])
        assert as_dict(seen) == right
        before.append((seen, right))
    assert all(as_dict(seen) == right for seen, right in before), "a plan has changed"


@given(
    st.lists(
        st.tuples(
            texts,
            texts,
            st.sampled_from([0.5, 1.0, 1.3]),
            st.sampled_from([-0.7, 0.0, 0.3]),
            st.sampled_from([-0.1, 0.0, 1.1]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 1 << 20),
)
def test_penalties_change_logits_as_the_text_says_to_the_bit(
    rows: list[tuple[list[int], list[int], float, float, float]], seed: int
) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed))
    choices, right = [], logits.clone()
    for row, (prompt, output, repetition, presence, frequency) in zip(right, rows, strict=True):
        params = SamplingParams(
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        choices.append(TokenChoice(params, 1, seen_in(prompt, output)))
        for token in {*prompt, *output}:
            value = row[token].clone()
            row[token] = value / repetition if value > 0 else value * repetition
        for token, count in Counter(output).items():
            row[token] -= torch.tensor(presence) + torch.tensor(frequency) * count
    assert torch.equal(sampler.penalized(logits, choices), right)


def test_only_rows_that_sample_with_penalties_have_it() -> None:
    asked = sequence([1, 2, 2, 3, 4])
    assert plan_sequence(asked, 3).token_counts is None, "a chunk that samples nothing"
    asked.computed = 3
    last = plan_sequence(asked, 2)
    assert last.samples
    assert last.token_counts is not None
    assert as_dict(last.token_counts) == {1: 0, 2: 0, 3: 0, 4: 0}
    greedy = sequence([1, 2], SamplingParams(temperature=0, logit_bias={1: 2.0}))
    assert plan_sequence(greedy, 2).token_counts is None
