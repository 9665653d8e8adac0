"""Steps that are enqueued before the last one's tokens are known to the host."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, Final

from veneer_server.backends.cuda.draws import CudaDraws
from veneer_server.step.choice import Choice
from veneer_server.wire.messages import SamplingParams

from tests.gpu.engine.kit import BLOCK_SIZE, Card, Part, card, make_run, step_of

__all__ = ["check"]

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


def _choices(number: int) -> list[Choice]:
    params = (
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, seed=2, top_k=30),
        SamplingParams(temperature=1.3, seed=3, top_p=0.8, min_p=0.01),
    )
    return [Choice(each, number) for each in params]
