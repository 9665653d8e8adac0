"""Turn a `LoadSpec` into a finite or endless sequence of requests, each with its due time.

Each quantity is sampled in blocks from its own random generator, so that request number i is
the same however many workers share the load and however many requests are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from veneer_loadtest.load.spec import AdapterMix, Closed, Lengths, LoadSpec, Open, Traced
from veneer_loadtest.load.trace import read_trace

_BLOCK: Final = 512

_TEXT: Final = """
the of and to in is you that it he was for on are as with his they at be this have
from or one had by word but not what all were we when your can said there use an each
which she do how their if will up other about out many then them these so some her
would make like him into time has look two more write go see number no way could people
my than first water been call who oil its now find long down day did get come made may
part
"""
_WORDS: Final = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to send.

    Attributes:
        index: its number in the load, from 0.
        at_s: when it is due, seconds after the start; 0 in a closed loop.
        prompt: its text, from a trace; "" if tokens are sampled.
        leave_after: number of tokens after which its caller cancels (0: at once); None: never.
    """

    index: int
    at_s: float
    adapter: str
    prompt_tokens: int
    tokens: int
    leave_after: int | None = None
    prompt: str = ""


def plan(spec: LoadSpec) -> Iterator[Planned]:
    """Yield the requests in order; endless for a closed loop without a request limit.

    Raises:
        BadTrace: at the first request, if the trace cannot be read.
    """
    limit = spec.requests or math.inf
    source = _traced(spec, spec.arrivals) if isinstance(spec.arrivals, Traced) else _drawn(spec)
    for request in source:
        if request.index >= limit or (spec.duration_s and request.at_s >= spec.duration_s):
            return
        yield request


def _traced(spec: LoadSpec, arrivals: Traced) -> Iterator[Planned]:
    leaves = _blocks(spec.seed, "leave", _leave_draws(spec))
    for index, line in enumerate(read_trace(Path(arrivals.path))):
        share, place = next(leaves)
        yield Planned(
            index=index,
            at_s=line.at_s / arrivals.speed,
            adapter=line.adapter,
            prompt_tokens=line.prompt_tokens,
            tokens=line.tokens,
            leave_after=_leave(spec, share, place, line.tokens),
            prompt=line.prompt,
        )


def _drawn(spec: LoadSpec) -> Iterator[Planned]:
    gaps = _blocks(spec.seed, "arrive", _gap_draws(spec.arrivals))
    which = _which(spec.popularity, len(spec.adapters), spec.seed)
    prompts = _blocks(spec.seed, "prompt", _length_draws(spec.prompt_tokens))
    lengths = _blocks(spec.seed, "length", _length_draws(spec.tokens))
    leaves = _blocks(spec.seed, "leave", _leave_draws(spec))
    at = 0.0
    for index in count():
        at += float(next(gaps))
        tokens = int(next(lengths))
        share, place = next(leaves)
        yield Planned(
            index=index,
            at_s=at,
            adapter=spec.adapters[next(which)],
            prompt_tokens=int(next(prompts)),
            tokens=tokens,
            leave_after=_leave(spec, share, place, tokens),
        )


def _leave(spec: LoadSpec, share: float, place: float, tokens: int) -> int | None:
    return int(place * tokens) if share < spec.cancel_share else None


def _blocks(
    seed: int, name: str, draw: Callable[[np.random.Generator], npt.NDArray[np.generic]]
) -> Iterator[npt.NDArray[np.generic]]:
    """Yield values of one quantity, from a random generator that no other quantity uses."""
    random = np.random.default_rng([seed, *name.encode()])
    while True:
        yield from draw(random)


def _gap_draws(
    arrivals: Closed | Open | Traced,
) -> Callable[[np.random.Generator], npt.NDArray[np.generic]]:
    if not isinstance(arrivals, Open):
        return lambda random: np.zeros(_BLOCK)
    mean, cv = 1 / arrivals.rate, arrivals.cv
    if cv == 0:
        return lambda random: np.full(_BLOCK, mean)
    shape = 1 / cv**2
    return lambda random: random.gamma(shape, mean / shape, _BLOCK)


def _length_draws(
    lengths: Lengths,
) -> Callable[[np.random.Generator], npt.NDArray[np.generic]]:
    if not lengths.mean:
        return lambda random: random.integers(lengths.low, lengths.high, _BLOCK, endpoint=True)
    variance = math.log(1 + lengths.cv**2)
    centre = math.log(lengths.mean) - variance / 2

    def draw(random: np.random.Generator) -> npt.NDArray[np.generic]:
        raw = random.lognormal(centre, math.sqrt(variance), _BLOCK)
        return raw.round().clip(lengths.low, lengths.high).astype(int)

    return draw


def _leave_draws(
    spec: LoadSpec,
) -> Callable[[np.random.Generator], npt.NDArray[np.generic]]:
    return lambda random: random.random((_BLOCK, 2))  # nosec B311 # not for secrets


def _which(popularity: AdapterMix, adapters: int, seed: int) -> Iterator[int]:
    """Yield indices into the list of adapters; see `AdapterMix`."""
    random = np.random.default_rng([seed, *b"which"])
    parameter = popularity.parameter
    match popularity.kind:
        case "identical":
            while True:
                yield 0
        case "roundrobin":
            for number in count():
                yield number % adapters
        case "distinct":
            while True:
                yield from (int(place) for place in random.permutation(adapters))
        case "uniform":
            while True:
                yield from (int(place) for place in random.integers(0, adapters, _BLOCK))
        case "zipf":
            weights = 1.0 / np.arange(1, adapters + 1) ** parameter
            shares = weights / weights.sum()
            while True:
                yield from (int(p) for p in random.choice(adapters, _BLOCK, p=shares))  # nosec B311 # not for secrets
        case "powerlaw":
            while True:
                drawn = random.power(parameter, _BLOCK) * adapters
                yield from (min(int(place), adapters - 1) for place in drawn)


def prompt_ids(spec: LoadSpec, request: Planned) -> tuple[int, ...]:
    """Return random ordinary tokens, so that no two prompts share a prefix."""
    random = np.random.default_rng([spec.seed, request.index])
    # The first few hundred ids of most vocabularies are control and byte tokens.
    first = min(1000, spec.vocab // 2)
    return tuple(random.integers(first, spec.vocab, request.prompt_tokens).tolist())


def prompt_text(spec: LoadSpec, request: Planned) -> str:
    """Return the trace's text, or else common words of about one token each."""
    if request.prompt:
        return request.prompt
    random = np.random.default_rng([spec.seed, request.index])
    places = random.integers(0, len(_WORDS), request.prompt_tokens)
    return " ".join(_WORDS[place] for place in places)
