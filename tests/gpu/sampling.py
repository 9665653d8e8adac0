"""Draws and log-probabilities, against the sampler that serves on CPUs."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Final
from unittest import mock

import msgspec
import torch
from veneer_server.backends.cuda.sampling import draw, logprobs
from veneer_server.engine.execution import sampler
from veneer_server.step.choice import TokenChoice
from veneer_server.wire.messages import SamplingParams

from tests.gpu.guarded import Guard, numbers
from tests.gpu.interpreter import order
from tests.gpu.subject import Bug, Subject, close


def _vocab(random: Random) -> int:
    if random.random() < 0.06:
        return random.randint(2000, 4200)
    return random.choice((1, 2, 7, 49, random.randint(1, 600)))


def _logits(random: Random, rows: int, vocab: int) -> torch.Tensor:
    """Some rows with many equal logits, some with forbidden tokens."""
    logits = numbers(random, rows, vocab, dtype=torch.float32) * random.choice((0.1, 2, 8))
    for row in range(rows):
        if random.random() < 0.4:
            logits[row] = (logits[row] * 2).round() / 2
        if random.random() < 0.2 and vocab > 1:
            logits[row, : vocab // 2] = -torch.inf
    return logits


def _choice(random: Random, vocab: int) -> TokenChoice:
    params = SamplingParams(
        temperature=random.choice((0.0, 0.2, 1.0, 1.7)),
        top_k=random.choice((0, 0, 1, 3, random.randint(1, vocab), vocab + 3)),
        top_p=random.choice((1.0, 0.9, 0.5, random.random())),
        min_p=random.choice((0.0, 0.0, 0.0, 0.05, random.random())),
        seed=random.getrandbits(40),
    )
    return TokenChoice(params, random.randrange(1000))


def _expected(logits: torch.Tensor, choice: TokenChoice) -> set[int]:
    """The reference's token, and those that rounding may make of it."""
    exact = sampler.uniform(choice.params.seed, choice.position)
    found = set()
    for share in (0.0, 1e-6, -1e-6):
        for part in (1.0, 1 + 1e-6, 1 - 1e-6):
            params = choice.params
            if params.top_p < 1:
                params = replace_top_p(params, min(params.top_p * part, 1 - 1e-9))
            moved = min(max(exact + share, 0.0), 1 - 2**-53)
            with mock.patch.object(sampler, "uniform", lambda *_, moved=moved: moved):
                (token,) = sampler.TorchDraws().tokens(
                    logits.unsqueeze(0), [TokenChoice(params, choice.position)]
                )
            found.add(-1 if token is None else token)
    return found


def replace_top_p(params: SamplingParams, top_p: float) -> SamplingParams:
    """The same with another top_p."""
    return msgspec.structs.replace(params, top_p=top_p)


def _check_draw(random: Random) -> str:
    vocab, rows = _vocab(random), random.choice((1, 1, 2))
    logits = _logits(random, rows, vocab)
    choices = [_choice(random, vocab) for _ in range(rows)]
    if random.random() < 0.2:
        spoiled = random.randrange(rows)
        logits[spoiled, random.randrange(vocab)] = torch.nan
        params = choices[spoiled].params
        choices[spoiled] = replace(
            choices[spoiled], params=msgspec.structs.replace(params, temperature=1.0)
        )
    told = f"{rows} x {vocab}, {[c.params for c in choices]}"

    def run(which: list[int]) -> torch.Tensor:
        of = [choices[i] for i in which]
        guard = Guard(random)
        tokens = guard.out("tokens", torch.full((len(which),), -7))
        settings = [[c.params.temperature, c.params.min_p] for c in of]
        shares = [[c.params.top_p, sampler.uniform(c.params.seed, c.position)] for c in of]
        with order(random):
            draw.draw(
                guard.given("logits", logits[which], gap=random.choice((0, 5))),
                guard.given("settings", torch.tensor(settings)),
                guard.given(
                    "top_k", torch.tensor([c.params.top_k for c in of], dtype=torch.int32)
                ),
                guard.given("shares", torch.tensor(shares, dtype=torch.float64)),
                tokens,
            )
        guard.check()
        return tokens.contiguous()

    got = run(list(range(rows)))
    for row, choice in enumerate(choices):
        right = _expected(logits[row], choice)
        assert int(got[row]) in right, f"{told}: row {row}: {int(got[row])} instead of {right}"
    which = random.choices(range(rows), k=random.randint(1, 2))
    assert torch.equal(run(which), got[which]), f"{told}: a token depends on the batch"
    return told


def _check_logprobs(random: Random) -> str:
    vocab, rows = _vocab(random), random.randint(1, 3)
    logits = numbers(random, rows, vocab, dtype=torch.float32) * random.choice((0.1, 2, 8))
    if random.random() < 0.4:
        logits = (logits * 2).round() / 2
    tokens = torch.tensor([random.randrange(vocab) for _ in range(rows)])
    counts = [random.choice((0, 1, 5, 20)) for _ in range(rows)]
    told = f"{rows} x {vocab}, the likeliest {counts}"

    def run(which: list[int]) -> tuple[torch.Tensor, ...]:
        guard = Guard(random)
        own = guard.out("own", torch.zeros(len(which)))
        tops = guard.out("tops", torch.full((len(which), logprobs.TOPS), -7, dtype=torch.int32))
        top_own = guard.out("top_own", torch.full((len(which), logprobs.TOPS), -7.0))
        with order(random):
            logprobs.logprobs(
                guard.given("logits", logits[which], gap=random.choice((0, 5))),
                guard.given("tokens", tokens[which]),
                guard.given(
                    "counts", torch.tensor([counts[i] for i in which], dtype=torch.int32)
                ),
                own,
                tops,
                top_own,
            )
        guard.check()
        return own.contiguous(), tops.contiguous(), top_own.contiguous()

    own, tops, top_own = run(list(range(rows)))
    close(told, own, sampler.token_logprobs(logits.double(), tokens), 1e-4)
    # The sampler's own order of equals that are last among the 20 is arbitrary; ours is by id.
    ordered = logits.sort(dim=-1, descending=True, stable=True).indices
    for row, right in enumerate(sampler.top_tokens(logits, counts)):
        ids = ordered[row, : len(right)].tolist()
        assert tops[row, : len(ids)].tolist() == ids, (
            f"{told}: row {row}: {tops[row]}, not {ids}"
        )
        values = torch.tensor([value for _, value in right])
        close(told, top_own[row, : len(ids)], values, 1e-4)
        assert (tops[row, len(ids) :] == -7).all(), f"{told}: more than were asked for"
    which = random.choices(range(rows), k=2)
    for again, before in zip(run(which), (own, tops, top_own), strict=True):
        assert torch.equal(again, before[which]), f"{told}: bits depend on the batch"
    return told


SUBJECTS: Final = (
    Subject(
        "draw",
        _check_draw,
        (
            Bug("top-k keeps one more", draw, "ties = k - count\n", "ties = k - count + 1\n"),
            Bug("top-p of all, not of top-k", draw, "bound = top_p * mass", "bound = top_p"),
            Bug(
                "all equals of the last are kept", draw, "ties = k - count\n", "ties = vocab\n"
            ),
            Bug("min-p of 1", draw, "(min_p * highest)", "(min_p * 1.0)"),
            Bug(
                "no mask of the vocabulary",
                draw,
                'mask=known, other=float("-inf"))',
                "mask=known, other=0.0)",
            ),
            Bug("equal tokens in another order", draw, "== place)", "== equal - 1 - place)"),
            Bug(
                "the last of equals is the likeliest",
                draw,
                "likeliest = tl.min(tl.where(peaks == peak, places, vocab), axis=0)",
                "likeliest = tl.max(tl.where(peaks == peak, places, 0), axis=0)",
            ),
            Bug(
                "settings of another row",
                draw,
                "tl.load(shares + number * 2)",
                "tl.load(shares)",
            ),
        ),
    ),
    Subject(
        "logprobs",
        _check_logprobs,
        (
            Bug(
                "equal ones by higher id", logprobs, "token > last_token", "token < last_token"
            ),
            Bug(
                "stride of rows",
                logprobs,
                "number.to(tl.int64) * stride",
                "number.to(tl.int64) * vocab",
            ),
            Bug(
                "no mask",
                logprobs,
                "better = left & (token < vocab) & (each > peaks)",
                "better = left & (each >= peaks)",
            ),
            Bug(
                "one too many",
                logprobs,
                "tl.minimum(tl.load(counts + number),",
                "tl.minimum(tl.load(counts + number) + 1,",
            ),
            Bug("peak left out", logprobs, "log_sum = peak + tl.log", "log_sum = tl.log"),
        ),
    ),
)
