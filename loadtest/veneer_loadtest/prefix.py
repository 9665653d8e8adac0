"""Measure the gain of the prefix cache: prompts with a long shared prefix, cache on and off.

Every adapter has its own prefix (K and V depend on the adapter, so adapters share nothing);
each round sends new endings after it. Rounds alternate off, on, on, off, so that a drift of the
machine's speed affects both alike.

A result file holds:

- ``kind``: ``"prefix"``
- ``conditions``, ``versions``, ``device``, ``commands``, ``workload``: as in `compare`
- ``levels``: for each number of streams ``off`` and ``on``: ``first_token_ms`` {p50, low,
  high} and ``tokens_per_s`` (the same, over rounds), and ``cached_share`` of prompt tokens
- ``summary``: ``first_token_gain_N`` and ``throughput_gain_N`` (ratios of medians; more
  than 1 is better with the cache)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from veneer_client import AsyncClient

from veneer_loadtest.load.rounds import Round, send_round
from veneer_loadtest.load.spec import AdapterMix, Closed, Lengths, LoadSpec
from veneer_loadtest.load.targets import VeneerSpec
from veneer_loadtest.quantiles import median


@dataclass(frozen=True, slots=True)
class PrefixOptions:
    """Options of `measure`.

    Attributes:
        adapters: names, or one empty name for the base model.
        shared, own: tokens of the shared prefix and of each request's own ending.
        repeat: number of pairs of rounds, with and without the cache.
    """

    adapters: tuple[str, ...]
    vocab: int
    shared: int
    own: int
    tokens: int
    repeat: int
    seed: int


@dataclass(frozen=True, slots=True)
class PrefixLevel:
    """Rounds at one number of streams; ``cached_share`` is a share of the prompt tokens."""

    streams: int
    off: tuple[Round, ...]
    on: tuple[Round, ...]
    cached_share: float

    @property
    def first_token_gain(self) -> float:
        """Median time to first token without the cache / with it."""
        return _first_token(self.off) / _first_token(self.on)

    @property
    def throughput_gain(self) -> float:
        """Tokens per second with the cache / without it."""
        return _speed(self.on) / _speed(self.off)

    def as_json(self) -> dict[str, object]:
        """Return one of the ``levels`` of a result file."""
        return {
            "streams": self.streams,
            "off": _numbers(self.off),
            "on": _numbers(self.on),
            "cached_share": self.cached_share,
        }


def _first_token(rounds: tuple[Round, ...]) -> float:
    return median([s for r in rounds for s in r.first_token_s])


def _speed(rounds: tuple[Round, ...]) -> float:
    return median([r.tokens_per_s for r in rounds])


def _numbers(rounds: tuple[Round, ...]) -> dict[str, dict[str, float]]:
    firsts = [s * 1e3 for r in rounds for s in r.first_token_s]
    speeds = [r.tokens_per_s for r in rounds]
    return {
        name: {"p50": median(values), "low": min(values), "high": max(values)}
        for name, values in (("first_token_ms", firsts), ("tokens_per_s", speeds))
    }


async def measure(
    client: AsyncClient,
    options: PrefixOptions,
    streams: int,
    on_round: Callable[[], None] = lambda: None,
) -> PrefixLevel:
    """Run rounds of ``streams`` requests at once, with the cache off, on, on, off, and so on.

    Raises:
        TargetFailed: a call failed.
    """
    prefixes = _prefixes(options)
    # This fills the cache, and warms up the server for both kinds of rounds.
    warm = _load(options, len(prefixes), own=0, tokens=1, seed=options.seed)
    await send_round("veneer", warm, VeneerSpec(client.address, True, prefixes))
    rounds: dict[bool, list[Round]] = {False: [], True: []}
    for number in range(2 * options.repeat):
        cached = number % 4 in (1, 2)
        seed = options.seed * 10_000 + 100 * streams + number
        load = _load(options, streams, own=options.own, tokens=options.tokens, seed=seed)
        spec = VeneerSpec(client.address, cached, prefixes)
        rounds[cached].append(await send_round("veneer", load, spec))
        on_round()
    hits = sum(r.cached_prompt_tokens for r in rounds[True])
    asked = options.repeat * streams * (options.shared + options.own)
    return PrefixLevel(streams, tuple(rounds[False]), tuple(rounds[True]), hits / asked)


def _prefixes(options: PrefixOptions) -> dict[str, tuple[int, ...]]:
    rng = np.random.default_rng(options.seed)
    first = min(1000, options.vocab // 2)
    return {
        name: tuple(int(t) for t in rng.integers(first, options.vocab, options.shared))
        for name in options.adapters
    }


def _load(
    options: PrefixOptions, streams: int, *, own: int, tokens: int, seed: int
) -> LoadSpec:
    """Build a load of one request per stream, all at once, with ``own`` tokens after the
    prefix."""
    return LoadSpec(
        adapters=options.adapters,
        arrivals=Closed(streams),
        popularity=AdapterMix("roundrobin"),
        prompt_tokens=Lengths(own, own),
        tokens=Lengths(tokens, tokens),
        duration_s=0.0,
        warmup_s=0.0,
        requests=streams,
        cancel_share=0.0,
        seed=seed,
        vocab=options.vocab,
    )
