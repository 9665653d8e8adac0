"""The sampler against a slow, plain, row-by-row oracle, and its independence of the batch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from veneer_server.engine.execution import sampler
from veneer_server.engine.execution.sampler import (
    sample,
    token_logprobs,
    token_ranks,
    top_tokens,
    uniform,
)
from veneer_server.step.choice import Draws, TokenChoice
from veneer_server.wire.messages import SamplingParams

from tests.unit.server.engine.test_history import as_dict, seen_in

VOCAB = 3000
"""More than the head that the sampler looks at first."""


def oracle(logits: torch.Tensor, choice: TokenChoice) -> int | None:
    """One row, in float64 and plain Python; None where rounding may decide."""
    params, vocab = choice.params, len(logits)
    values = [float(x) for x in logits]
    for token, bias in params.logit_bias.items():
        values[token] += bias
    for token, count in as_dict(choice.token_counts).items() if choice.token_counts else ():
        penalty = params.repetition_penalty
        values[token] = (
            values[token] / penalty if values[token] > 0 else values[token] * penalty
        )
        if count:
            values[token] -= params.presence_penalty + params.frequency_penalty * count
    if choice.allowed is not None:
        values = [v if ok else -math.inf for v, ok in zip(values, choice.allowed, strict=True)]
    for token in choice.forbidden:
        values[token] = -math.inf
    order = sorted(range(vocab), key=lambda token: (-values[token], token))
    if params.temperature == 0:
        close = values[order[0]] - values[order[1]] < 1e-4
        return None if close else order[0]
    top = max(values)
    weights = [math.exp((v - top) / params.temperature) for v in values]
    whole = sum(weights)
    shares = [w / whole for w in weights]
    kept = order[: params.top_k or vocab]
    edges: list[float] = []
    if params.top_p < 1:
        total = sum(shares[t] for t in kept)
        before, inside = 0.0, []
        for token in kept:
            edges.append(before / total - params.top_p)
            if before / total < params.top_p:
                inside.append(token)
            before += shares[token]
        kept = inside
    if params.min_p:
        edges += [shares[t] / shares[order[0]] - params.min_p for t in kept]
        kept = [t for t in kept if shares[t] >= params.min_p * shares[order[0]]]
    if not (params.top_k or params.top_p < 1 or params.min_p):
        kept = list(range(vocab))
    target = uniform(params.seed, choice.position) * sum(shares[t] for t in kept)
    running = 0.0
    chosen = kept[-1]
    for token in kept:
        running += shares[token]
        edges.append((running - target) / 10)
        if running > target:
            chosen = token
            break
    place = order.index(chosen)
    # Float32 may order neighbours differently, here and at the cut of top-k.
    for at in (place - 1, place, (params.top_k or vocab) - 1):
        if 0 <= at < vocab - 1:
            edges.append((values[order[at]] - values[order[at + 1]]) / params.temperature)
    return None if min(map(abs, edges)) < 2e-6 else chosen


def random_choice(rng: random.Random) -> TokenChoice:
    def maybe(value: float, off: float) -> float:
        return value if rng.random() < 0.5 else off

    history = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))] * rng.randint(1, 3)
    allowed = None
    if rng.random() < 0.3:
        allowed = np.zeros(VOCAB, dtype=np.bool_)
        allowed[rng.sample(range(VOCAB), rng.choice([1, 3, 700]))] = True
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 1.7, 30.0]),
        top_k=rng.choice([0, 0, 1, 5, 511, 512, 513, 2000, 1 << 31]),
        top_p=rng.choice([1.0, 1.0, 0.2, 0.9, 0.999]),
        min_p=maybe(rng.choice([0.05, 0.5, 1.0]), 0.0),
        seed=rng.getrandbits(64),
        repetition_penalty=maybe(rng.uniform(0.5, 2.0), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        logit_bias={rng.randrange(VOCAB): rng.uniform(-9, 9) for _ in range(rng.randint(0, 5))},
    )
    begin = rng.randint(0, len(history))
    text = seen_in(history[:begin], history[begin:])
    forbidden = rng.sample(range(VOCAB), 1000) if allowed is None and rng.random() < 0.3 else ()
    return TokenChoice(params, rng.randint(1, 5000), text, allowed, tuple(forbidden))


def random_logits(rng: random.Random, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    scale = torch.tensor([rng.choice([0.1, 2.0, 6.0]) for _ in range(rows)]).unsqueeze(1)
    return torch.randn(rows, VOCAB, generator=generator) * scale


def test_every_row_is_what_the_oracle_says(draws: Draws) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    compared = 0
    for _ in range(12):
        choices = [random_choice(rng) for _ in range(12)]
        logits = random_logits(rng, len(choices))
        chosen = sample(logits, choices, draws)
        for row, (token, choice) in enumerate(zip(chosen, choices, strict=True)):
            expected = oracle(logits[row], choice)
            assert expected in (None, token), (row, choice)
            compared += expected is not None
    assert compared > 72, "the oracle must decide most rows"


def test_a_rows_token_does_not_depend_on_the_other_rows(draws: Draws) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(20):
        choices = [random_choice(rng) for _ in range(rng.randint(2, 20))]
        # Coarse, as bfloat16 logits are: many tokens are exactly as likely as others.
        logits = random_logits(rng, len(choices)).bfloat16().float()
        together = sample(logits, choices, draws)
        alone = [sample(logits[i : i + 1], [c], draws)[0] for i, c in enumerate(choices)]
        assert together == alone
        order = list(range(len(choices)))
        rng.shuffle(order)
        shuffled = sample(logits[order], [choices[i] for i in order], draws)
        assert shuffled == [together[i] for i in order]


def test_equal_tokens_are_kept_by_id_wherever_the_cut_falls(draws: Draws) -> None:
    """All logits equal: top-k keeps the k lowest ids, in the head and past it."""
    logits = torch.zeros(1, VOCAB)
    for top_k in (1, 3, 511, 512, 513, 1500):
        params = [SamplingParams(top_k=top_k, seed=s) for s in range(200)]
        tokens = sample(logits.expand(200, -1), [TokenChoice(p, 1) for p in params], draws)
        assert max(tokens) < top_k
        expected = [int(uniform(s, 1) * top_k) for s in range(200)]
        assert tokens == pytest.approx(expected, abs=1)


def test_top_p_is_a_share_of_what_a_wide_top_k_leaves(draws: Draws) -> None:
    """15 % of the 800 likeliest are about 120 tokens, 15 % of all would be 450: the head
    that is looked at first holds both, but does not know the share of the 800."""
    params = [SamplingParams(top_k=800, top_p=0.15, seed=s) for s in range(400)]
    logits = torch.arange(VOCAB) * -1e-4
    tokens = sample(logits.expand(400, -1), [TokenChoice(p, 1) for p in params], draws)
    assert 100 < max(tokens) < 125


@pytest.mark.parametrize("cut", [{"top_k": 2000}, {"top_p": 0.9999}, {"min_p": 5e-6}])
def test_many_rare_tokens_are_drawn_as_often_as_they_should(
    draws: Draws, cut: dict[str, Any]
) -> None:
    """One likely token, and thousands below e^-10 of it that are 2.6 % together: a sampler
    that looks at the likeliest first must look again. Which token a random number falls on is
    known within a few, by sums in float64."""
    logits = -10.5 - torch.arange(VOCAB) * 1e-3
    logits[0] = 0
    weights = logits.double().exp()
    kept = cut.get("top_k", VOCAB)
    if "top_p" in cut:
        kept = int((weights.cumsum(0) < cut["top_p"] * weights.sum()).sum()) + 1
    if "min_p" in cut:
        kept = int((weights >= cut["min_p"]).sum())
    sums = weights[:kept].cumsum(0)
    positions = range(1, 401)
    choices = [
        TokenChoice(SamplingParams(temperature=1.0, seed=3, **cut), at) for at in positions
    ]
    rare = 0
    for token, at in zip(
        sample(logits.repeat(len(choices), 1), choices, draws), positions, strict=True
    ):
        assert token is not None
        right = int(torch.searchsorted(sums, sums[-1] * uniform(3, at), right=True))
        assert token == right if right == 0 else abs(token - right) <= 3
        rare += right > 0
    assert rare > 3, "else it says nothing"


def test_draws_follow_the_distribution(draws: Draws) -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    cases: list[tuple[SamplingParams, list[float]]] = [
        (SamplingParams(), [0.5, 0.3, 0.15, 0.05]),
        (SamplingParams(top_k=2), [0.625, 0.375, 0, 0]),
        (SamplingParams(top_p=0.81), [0.526, 0.316, 0.158, 0]),
        (SamplingParams(top_k=3, top_p=0.5), [1, 0, 0, 0]),
        (SamplingParams(min_p=0.29), [0.526, 0.316, 0.158, 0]),
        (SamplingParams(min_p=1.0), [1, 0, 0, 0]),
    ]
    for params, expected in cases:
        count = 4000
        tokens = sample(
            logits.expand(count, -1), [TokenChoice(params, p) for p in range(count)], draws
        )
        shares = np.bincount(tokens, minlength=4) / count
        assert shares == pytest.approx(expected, abs=0.04), params
        assert all(s == 0 for s, e in zip(shares, expected, strict=True) if e == 0)


def test_a_token_that_is_not_allowed_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by a random number that rounds to the whole."""
    allowed = np.zeros(VOCAB, dtype=np.bool_)
    allowed[[7, 1000]] = True
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    for last in (0.0, np.nextafter(1.0, 0.0)):
        monkeypatch.setattr(sampler, "uniform", lambda seed, position, last=last: last)
        for params in (SamplingParams(), SamplingParams(top_k=50), SamplingParams(top_p=0.99)):
            assert sample(logits, [TokenChoice(params, 1, allowed=allowed)])[0] in (7, 1000)


def test_extreme_temperatures_are_finite(draws: Draws) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2)) * 20
    best = logits.argmax(dim=-1).tolist()
    for temperature in (1e-300, 1e-7, 1e-5, 2e-5):
        params = SamplingParams(temperature=temperature)
        assert sample(logits, [TokenChoice(params, 1)] * 3, draws) == best
    huge = logits * 1e35
    huge[:, 5] = 3e38
    for params in (SamplingParams(temperature=1e-5), SamplingParams(temperature=0.7, top_k=9)):
        assert sample(huge, [TokenChoice(params, 1)] * 3, draws) == [5] * 3
    hot = SamplingParams(temperature=100.0)
    assert all(0 <= token < VOCAB for token in sample(logits, [TokenChoice(hot, 1)] * 3))


def test_greedy_rows_cost_one_argmax_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler, "draw", None)
    logits = torch.randn(4, VOCAB)
    before = logits.clone()
    greedy = TokenChoice(SamplingParams(temperature=0), 1, seen_in([1], [2]))
    monkeypatch.setattr(sampler, "penalized", None)
    assert sample(logits, [greedy] * 4) == before.argmax(dim=-1).tolist()
    assert torch.equal(logits, before)


def test_the_models_logits_are_left_as_they_are(draws: Draws) -> None:
    rng = random.Random(5)
    logits = random_logits(rng, 8)
    before = logits.clone()
    sample(logits, [random_choice(rng) for _ in range(8)], draws)
    assert torch.equal(logits, before)


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    history = [3, 3, 9, 2000, 17]
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([history]), logits.clone())
    choice = TokenChoice(
        SamplingParams(repetition_penalty=1.3), 5, seen_in(history[:3], history[3:])
    )
    assert torch.equal(sampler.penalized(logits, [choice]), theirs)


def test_top_tokens_are_sorted_and_raw(draws: Draws) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    counts: Sequence[int] = (0, 3, 20)
    tops = top_tokens(logits, counts, draws.log_sums(logits))
    assert [len(t) for t in tops] == list(counts)
    for row, entries in enumerate(tops):
        tokens = [token for token, _ in entries]
        order = logits[row].argsort(descending=True)[: len(tokens)].tolist()
        assert tokens == order
        if tokens:
            raw = token_logprobs(logits[row].expand(len(tokens), -1), torch.tensor(tokens))
            assert [value for _, value in entries] == pytest.approx(raw.tolist())


def test_ranks_count_the_tokens_that_are_at_least_as_likely() -> None:
    """As vLLM does, so that all of a tie have the last one's place."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(5))
    logits[3] = torch.tensor([2.0, 1.0, 1.0]).repeat(VOCAB // 3)
    order = logits.argsort(dim=1, descending=True)
    places = [0, 17, VOCAB - 1]
    tokens = torch.tensor([*(int(order[row, at]) for row, at in enumerate(places)), 1])
    assert token_ranks(logits, tokens) == [1, 18, VOCAB, VOCAB]


def test_thousands_of_impossible_tokens_weigh_nothing(draws: Draws) -> None:
    """e^-40 each: 1e-14 in all. One in float32 is exact to 1e-7."""
    logits = torch.full((1, VOCAB), -40.0)
    logits[0, 5] = 0
    (sure,) = token_logprobs(logits, torch.tensor([5]), draws.log_sums(logits)).tolist()
    assert sure == pytest.approx(0, abs=2e-7)
    (rare,) = token_logprobs(logits, torch.tensor([6]), draws.log_sums(logits)).tolist()
    assert rare == pytest.approx(-40, abs=1e-5)
