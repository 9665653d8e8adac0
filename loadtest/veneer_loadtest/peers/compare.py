"""Run Veneer and its peers under the same load: same base, adapters, prompts and threads.

Rounds run in the order ABC, CBA, ABC ..., one system at a time, so that a temporary
slowdown of the machine affects all of them. The result is
`veneer_loadtest.results.CompareResult`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from veneer_loadtest.load.rounds import Round
from veneer_loadtest.load.spec import AdapterMix, Closed, Lengths, LoadSpec, Open
from veneer_loadtest.peers.gate import GateRequest, gate_requests
from veneer_loadtest.peers.systems import System
from veneer_loadtest.quantiles import median, percentile
from veneer_loadtest.results import (
    CompareLevel,
    Ends,
    FigureRange,
    Ratio,
    RoundFigures,
    SystemFigures,
)

OURS: Final = "veneer"
WARM_UP_TOKENS: Final = 16
WARM_UP_STREAMS: Final = 4
_WINDOW_S: Final = 0.2
_QUIET_WINDOWS: Final = 2
_QUIET_PERCENT: Final = 5.0


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """Options of `compare`.

    Attributes:
        levels: loads to run; a closed loop sends one request for each stream, all at once, and
            an open loop lasts ``duration_s``.
        settle_s: longest wait before each round for the machine to become idle.
        adapters: name -> folder; already published on the server.
        vocab: size of the base's vocabulary.
        tokens: new tokens of each stream.
        repeat: rounds of each system at each level.
    """

    adapters: Mapping[str, Path]
    vocab: int
    levels: tuple[Closed | Open, ...]
    prompt_tokens: Lengths
    tokens: int
    repeat: int
    seed: int
    popularity: AdapterMix
    duration_s: float = 0.0
    settle_s: float = 5.0

    def load(self, arrivals: Closed | Open, tokens: int) -> LoadSpec:
        """Build the load of one round."""
        streams = arrivals.streams if isinstance(arrivals, Closed) else 0
        return LoadSpec(
            adapters=tuple(self.adapters) or ("",),
            arrivals=arrivals,
            popularity=self.popularity,
            prompt_tokens=self.prompt_tokens,
            tokens=Lengths(tokens, tokens),
            duration_s=0.0 if streams else self.duration_s,
            warmup_s=0.0,
            requests=streams,
            cancel_share=0.0,
            seed=self.seed + streams,
            vocab=self.vocab,
        )

    def for_the_gate(self) -> tuple[GateRequest, ...]:
        """Build the gate's requests, one for each adapter."""
        names = tuple(self.adapters) or ("",)
        return gate_requests(
            names,
            count=len(names),
            prompt_tokens=(self.prompt_tokens.low, self.prompt_tokens.high),
            vocab=self.vocab,
            seed=self.seed + len(names),
        )


def back_and_forth(systems: Sequence[System], repeat: int) -> Iterator[System]:
    """Yield each system ``repeat`` times: first to last, then last to first, and so on."""
    for number in range(repeat):
        yield from systems if number % 2 == 0 else reversed(systems)


async def measure(
    systems: Sequence[System],
    options: CompareOptions,
    arrivals: Closed | Open,
    stopped: Callable[[], bool] = lambda: False,
) -> CompareLevel | None:
    """Warm up all systems, then run the rounds.

    Args:
        stopped: called before each round; True ends the rounds.

    Returns:
        None if it was stopped before every system had a round.
    """
    rounds: dict[str, list[Round]] = {system.name: [] for system in systems}
    warm_up = arrivals if isinstance(arrivals, Closed) else Closed(WARM_UP_STREAMS)
    for system in systems:
        if stopped():
            return None
        await _wait_until_idle(options.settle_s)
        await system.round(options.load(warm_up, WARM_UP_TOKENS))
    work = options.load(arrivals, options.tokens)
    disturbed = 0
    for system in back_and_forth(systems, options.repeat):
        if stopped():
            break
        disturbed += not await _wait_until_idle(options.settle_s)
        rounds[system.name].append(await system.round(work))
    return level_of(arrivals, rounds, disturbed) if all(rounds.values()) else None


async def _wait_until_idle(limit_s: float) -> bool:
    """Wait until the cores are idle; return False if they are not within ``limit_s``.

    Threads of the previous system keep spinning for a while (vLLM's for a second), and would
    slow down the next one.
    """
    end = time.monotonic() + limit_s
    quiet = 0
    psutil.cpu_percent()
    while quiet < _QUIET_WINDOWS:
        if time.monotonic() > end:
            return False
        await asyncio.sleep(_WINDOW_S)
        quiet = quiet + 1 if psutil.cpu_percent() <= _QUIET_PERCENT else 0
    return True


def level_of(
    arrivals: Closed | Open, rounds: Mapping[str, Sequence[Round]], disturbed: int = 0
) -> CompareLevel:
    """Compute all systems' figures; ``disturbed``: rounds that began on a busy machine."""
    closed = isinstance(arrivals, Closed)
    # Higher is better in both kinds of loop.
    better = {
        name: [r.tokens_per_s if closed else 1 / median(r.first_token_s) for r in own]
        for name, own in rounds.items()
    }
    ours = better[OURS]
    return CompareLevel(
        streams=arrivals.streams if isinstance(arrivals, Closed) else 0,
        rate=arrivals.rate if isinstance(arrivals, Open) else 0.0,
        disturbed=disturbed,
        systems={name: _figures(own) for name, own in rounds.items()},
        ratios={name: _ratio(ours, own) for name, own in better.items() if name != OURS},
    )


def _figures(rounds: Sequence[Round]) -> SystemFigures:
    rates = [r.tokens_per_s for r in rounds]
    first = [t for r in rounds for t in r.first_token_s]
    gaps = [t for r in rounds for t in r.gaps_s]
    return SystemFigures(
        tokens_per_s=FigureRange(median=median(rates), low=min(rates), high=max(rates)),
        first_token_ms=_ends(first),
        inter_token_ms=_ends(gaps),
        client_cpu_share=sum(r.client_cpu_s for r in rounds) / sum(r.wall_s for r in rounds),
        rounds=[RoundFigures(wall_s=r.wall_s, tokens=r.tokens) for r in rounds],
    )


def _ends(seconds: Sequence[float]) -> Ends:
    return Ends(p50=median(seconds) * 1e3, p99=percentile(seconds, 0.99) * 1e3)


def _ratio(own: Sequence[float], other: Sequence[float]) -> Ratio:
    pairs = [a / b for a, b in zip(own, other, strict=False)]
    return Ratio(
        ratio=median(own) / median(other),
        low=min(pairs),
        high=max(pairs),
        ranges_overlap=min(own) <= max(other) and min(other) <= max(own),
    )


def summary(levels: Sequence[CompareLevel]) -> dict[str, float]:
    """Return the summary; see `results.CompareResult`."""
    found = {}
    for level in levels:
        if not level.ratios:
            continue
        key = ratio_key(level.streams, level.rate)
        found[key] = min(each.ratio for each in level.ratios.values())
        if len(level.ratios) > 1:
            found |= {f"{key}_{name}": each.ratio for name, each in level.ratios.items()}
    return found


def ratio_key(streams: int, rate: float) -> str:
    """Return a level's key in the summary."""
    return f"ratio_{rate:g}rps" if rate else f"ratio_{streams}"
