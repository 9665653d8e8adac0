"""Steps that are enqueued before the last one's tokens are known to the host: by the decoder
alone, and by the engine's loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
from veneer_server.backends.cuda import sampled
from veneer_server.backends.cuda.draws import CudaDraws
from veneer_server.engine import loop
from veneer_server.engine.execution import ahead
from veneer_server.step.choice import TokenChoice
from veneer_server.wire.messages import EngineConfig, SamplingParams

from tests.engine_harness import engine, source
from tests.gpu.engine.kit import BLOCK_SIZE, Card, Part, card, make_run, step_of
from tests.gpu.engine.simulated import SimulatedDevice
from tests.planted import planted
from tests.tiny_llama import make_lora

SEQUENCES: Final = 4


def check(base: Path, seed: str, instead: Any, *, steps: int) -> str:
    """Decode with one step of lookahead, and without; in words what was done.

    Raises:
        AssertionError: tokens differ, or the host waited while it submitted a step.
    """
    ahead, behind = (_Run(base, seed, instead) for _ in range(2))
    expected = [behind.plain(number) for number in range(steps)]
    tokens: list[list[int | None]] = []
    submitted = ahead.submit(0)
    for number in range(1, steps):
        before = ahead.one.device.syncs.copy()
        following = ahead.submit(number)
        assert ahead.one.device.syncs == before, "the host waited while it submitted a step"
        tokens.append(ahead.read(submitted, number - 1))
        submitted = following
    tokens.append(ahead.read(submitted, steps - 1))
    assert tokens == expected, f"{tokens} instead of {expected}"
    return f"{steps} steps of {SEQUENCES} sequences, one ahead: 0 waits to submit a step"


def steady(config: EngineConfig, folder: Path, *, tokens: int) -> str:
    """Unconstrained requests through the engine's loop, after a first round that has compiled,
    captured and loaded all; in words what was done. In the first round a bias of 0 makes the
    host sample every token before the next step.

    Raises:
        AssertionError: the host waited for more than one step's tokens a step, or waited while
            the device had nothing else to do before the last step.
    """
    adapters = [source(make_lora(folder / f"steady-{at}", seed=at)) for at in range(3)]
    asked: list[dict[str, Any]] = [
        {
            "prompt": [5 + at, 7, 11],
            "adapter": adapter,
            "sampling": choice.params,
            "max_tokens": tokens,
            "ignore_eos": True,
            "logprobs": True,
        }
        for at, (adapter, choice) in enumerate(zip((None, *adapters), _choices(0), strict=True))
    ]
    behind = [
        {**one, "sampling": msgspec.structs.replace(one["sampling"], logit_bias={1: 0.0})}
        for one in asked
    ]
    with engine(config) as harness:
        first = harness.run(behind)
        harness.settle()
        device, steps = SimulatedDevice.current, harness.loop.steps
        before, stalls = device.syncs.copy(), device.stalls
        second = harness.run(asked)
        harness.settle()
        steps = harness.loop.steps - steps
        stalls = device.stalls - stalls
        waits = device.syncs - before
    assert [a.tokens for a in second] == [a.tokens for a in first], "other tokens"
    assert all(len(a.tokens) == tokens for a in second)
    assert waits.total() <= steps, f"{dict(waits)} in {steps} steps"
    assert stalls <= 1, f"the device ran out of work {stalls} times in {steps} steps"
    return f"{steps} steps of the engine, {waits.total()} waits, {stalls} without work behind"


class _Run:
    """Sequences of one card, each with an adapter or none, all decoding."""

    def __init__(self, base: Path, seed: str, instead: Any) -> None:
        random = Random(seed)
        self.one: Card = card(base, seed, instead)
        decoder = self.one.decoder
        self.tables = [
            None,
            *(
                decoder.adapters.place(*make_run(decoder.weights.config, random))
                for _ in range(SEQUENCES - 1)
            ),
        ]
        vocab = decoder.weights.config.vocab_size
        self.first = [random.randrange(vocab) for _ in range(SEQUENCES)]
        self.last: list[int | None] = [*self.first]
        self.draws = CudaDraws(self.one.device, SEQUENCES, vocab)
        # The first adapters' slots are assigned, and the bucket's graph is captured.
        self.read(self.submit(0), 0)

    def plain(self, number: int) -> list[int | None]:
        """A step whose tokens are read before the next."""
        self.one.device.enter()
        logits = self.one.decoder.execute(
            self.step(number, self.last if number else self.first)
        )
        assert all(self.one.decoder.finite(logits))
        self.last = self.draws.tokens(logits, _choices(number))
        return self.last

    def submit(self, number: int) -> Any:
        self.one.device.enter()
        carried = range(SEQUENCES) if number else ()
        tokens = [0] * SEQUENCES if number else self.first
        step = self.step(number, tokens)
        tops = [0, 2, 0, 20]
        return self.one.decoder.submit(step, _choices(number), tops, carried)

    def read(self, submitted: Any, number: int) -> list[int | None]:
        self.one.device.enter()
        found = self.one.decoder.read(submitted)
        assert all(found.finite), f"step {number} is not finite"
        assert [len(tops) for tops in found.tops] == [0, 2, 0, 20]
        token, logprob = found.tokens[3], found.logprobs[3]
        told = dict(found.tops[3])
        assert token not in told or abs(told[token] - logprob) < 1e-5
        return found.tokens

    def step(self, number: int, tokens: Any) -> Any:
        assert number < BLOCK_SIZE
        return step_of(
            [
                Part([token or 0], number, [1 + at], table)
                for at, (token, table) in enumerate(zip(tokens, self.tables, strict=True))
            ]
        )


def _choices(number: int) -> list[TokenChoice]:
    params = (
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, seed=2, top_k=30),
        SamplingParams(temperature=1.3, seed=3, top_p=0.8, min_p=0.01),
    )
    return [TokenChoice(each, number) for each in params]


PLANTED: Final[dict[str, Callable[[], AbstractContextManager[None]]]] = {
    "each step is read before the next is submitted": partial(
        planted, loop, "if plan is not None and plan.scores:", "if plan is not None:"
    ),
    "rows take the token of the row before theirs": partial(
        planted,
        ahead,
        "= self._rows[planned.sequence]",
        "= max(0, self._rows[planned.sequence] - 1)",
    ),
    "tokens are taken from the step before the last": partial(
        planted, sampled, "known = self._known[:count]", "known = self._known[:count].clone()"
    ),
    "a token is brought to the host to be passed on": partial(
        planted,
        sampled,
        "for name in self._results:",
        "known.tolist()\n        for name in self._results:",
    ),
}
