"""Every option at the ends of its range, alone and combined: no request can make the step fail,
or sample a token that the model does not have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from veneer_proto.v1 import inference_pb2 as pb
from veneer_registry.errors import InvalidField
from veneer_server.engine.execution.sampler import sample
from veneer_server.rpc.convert import generate_call
from veneer_server.serving.limits import resolve_sampling
from veneer_server.serving.records import Sampling
from veneer_server.step.choice import Draws, TokenChoice
from veneer_server.text.defaults import RequestDefaults
from veneer_server.wire.messages import SamplingParams

from tests.refused import refused
from tests.unit.server.engine.test_history import seen_in

TINY = 5e-324
"""The smallest double; 0 as a float32."""
LARGEST = float(np.finfo(np.float32).max)


def doubles(*ends: float) -> st.SearchStrategy[float]:
    """The ends of a range, what is next to them on either side, and anything between."""
    near = [math.nextafter(e, way) for e in ends for way in (-math.inf, math.inf)]
    return st.one_of(
        st.sampled_from([*ends, *near]),
        st.sampled_from([TINY, 1e-300, 1e-45, 1e-39, 1e-38, 1e-5, 9e-6, 1 - 2**-53]),
        st.floats(min(ends), max(ends)),
    )


def checked(asked: pb.SamplingOptions) -> Sampling:
    """As a request's are. Raises InvalidField."""
    return generate_call(pb.GenerateRequest(prompt="x", sampling=asked)).sampling


def few(vocab: int) -> st.SearchStrategy[int]:
    """Tokens, so few that logits, history, bias and mask often speak of the same ones."""
    return st.sampled_from(sorted({0, 1, 2 % vocab, vocab // 2, vocab - 1}))


@st.composite
def options(draw: st.DrawFn, vocab: int) -> pb.SamplingOptions:
    """Often outside of what is admitted."""
    given: dict[str, Any] = {
        "temperature": doubles(0, 100),
        "top_k": st.sampled_from([0, 1, 2, 511, 512, 513, 2**31, 2**32 - 1]),
        "top_p": doubles(0, 1),
        "min_p": doubles(0, 1),
        "seed": st.sampled_from([0, 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1),
        "repetition_penalty": doubles(0, 0.01, 1, 100),
        "presence_penalty": doubles(-2, 2),
        "frequency_penalty": doubles(-2, 2),
        "logit_bias": st.dictionaries(
            few(vocab), st.sampled_from([-100.0, TINY, 100.0]), max_size=3
        ),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(given))))
    return pb.SamplingOptions(**{name: draw(given[name]) for name in sorted(chosen)})


@st.composite
def rows(draw: st.DrawFn, vocab: int) -> torch.Tensor:
    """Finite logits, flat, ordinary or huge, some of them far from the others."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1e-30, 3.0, 1e4, 1e36]))
    logits = torch.randn(vocab, generator=generator) * scale
    far = st.sampled_from([0.0, -1e30, 1e30, LARGEST, -LARGEST])
    for token, value in draw(st.dictionaries(few(vocab), far, max_size=4)).items():
        logits[token] = value
    return logits


@st.composite
def choices(draw: st.DrawFn, vocab: int) -> TokenChoice:
    try:
        asked = checked(draw(options(vocab)))
    except InvalidField:
        assume(False)
    token = few(vocab)
    history = draw(st.lists(token, min_size=1, max_size=8)) * draw(st.sampled_from([1, 4096]))
    begin = draw(st.integers(0, len(history)))
    allowed = None
    if draw(st.booleans()):
        allowed = np.zeros(vocab, dtype=np.bool_)
        allowed[draw(st.lists(token, min_size=1, max_size=4))] = True
    return TokenChoice(
        resolve_sampling(asked, RequestDefaults()),
        draw(st.sampled_from([0, 1, 2**31])),
        seen_in(history[:begin], history[begin:]),
        allowed,
    )


@pytest.mark.push
@settings(max_examples=300, print_blob=True)
@given(st.data(), st.sampled_from([2, 40, 600]))
def test_whatever_a_request_may_ask_for_gives_a_token_of_the_vocabulary(
    data: st.DataObject, vocab: int
) -> None:
    asked = data.draw(st.lists(choices(vocab), min_size=1, max_size=3))
    logits = torch.stack([data.draw(rows(vocab)) for _ in asked])
    for token, choice in zip(sample(logits, asked), asked, strict=True):
        assert token is not None
        assert 0 <= token < vocab
        assert choice.allowed is None or choice.allowed[token]


@pytest.mark.push
def test_a_top_p_that_rounds_to_nothing_keeps_the_likeliest_token(draws: Draws) -> None:
    logits = torch.randn(1, 600, generator=torch.Generator().manual_seed(3))
    for top_k in (0, 1, 5, 550):
        asked = pb.SamplingOptions(top_p=TINY, top_k=top_k, seed=1)
        choice = TokenChoice(resolve_sampling(checked(asked), RequestDefaults()), 1)
        assert sample(logits, [choice], draws) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("penalty", [TINY, 1e-300, 1e-39, 1e-3, math.nextafter(0.01, 0)])
def test_a_repetition_penalty_that_could_overflow_is_refused(penalty: float) -> None:
    with refused(InvalidField, field="sampling.repetition_penalty"):
        checked(pb.SamplingOptions(repetition_penalty=penalty))
    assert checked(pb.SamplingOptions(repetition_penalty=0.01)).given["repetition_penalty"]


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_penalty_that_overflows_all_the_same_harms_no_row(
    cut: dict[str, Any], draws: Draws
) -> None:
    """The sampler's own guard, behind the range that requests are held to."""
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(1))
    usual = TokenChoice(SamplingParams(seed=4, **cut), 1)
    params = SamplingParams(seed=4, repetition_penalty=1e-39, **cut)
    wild = TokenChoice(params, 1, seen_in(range(600), []))
    first, overflowed, last = sample(logits, [usual, wild, usual], draws)
    assert overflowed is not None
    assert logits[1, overflowed] > 0, "one of those that became infinitely likely"
    assert [first, last] == [sample(logits[i : i + 1], [usual], draws)[0] for i in (0, 2)]


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_row_without_any_probability_is_told_and_harms_no_other(
    cut: dict[str, Any], draws: Draws
) -> None:
    """An infinite temperature is no request's: minus infinity by infinity is NaN."""
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(2))
    usual = TokenChoice(SamplingParams(seed=4, **cut), 1)
    allowed = np.arange(600) > 300
    wild = TokenChoice(SamplingParams(temperature=math.inf, **cut), 1, allowed=allowed)
    first, none, last = sample(logits, [usual, wild, usual], draws)
    assert none is None
    assert [first, last] == [sample(logits[i : i + 1], [usual], draws)[0] for i in (0, 2)]
