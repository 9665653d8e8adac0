"""Veneer beside peers: the same base, adapters, prompts and threads, in one run.

Rounds run in the order ABC, CBA, ABC ..., one system at a time, so that what slows the
machine for a while slows all of them. The result is `results.CompareResult`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_loadtest.load.spec import Closed, Lengths, LoadSpec, Popularity
from veneer_loadtest.report import median, percentile
from veneer_loadtest.results import (
    CompareLevel,
    Ends,
    Range,
    Ratio,
    RoundFigures,
    SystemFigures,
)
from veneer_loadtest.runner import Round
from veneer_loadtest.systems import System
from veneer_loadtest.workload import Stream, make_streams

__all__ = ["OURS", "CompareOptions", "back_and_forth", "level_of", "measure", "summary"]

OURS: Final = "veneer"
WARM_UP_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What `compare` measures.

    Attributes:
        adapters: name -> folder; published on the server before.
        vocab: tokens of the base's vocabulary.
        tokens: new tokens of each stream.
        repeat: rounds of each system at each number of streams.
    """

    adapters: Mapping[str, Path]
    vocab: int
    streams: tuple[int, ...]
    prompt_tokens: Lengths
    tokens: int
    repeat: int
    seed: int
    popularity: Popularity

    def load(self, streams: int, tokens: int) -> LoadSpec:
        """One round: one request for each stream, all at once."""
        return LoadSpec(
            adapters=tuple(self.adapters) or ("",),
            arrivals=Closed(streams),
            popularity=self.popularity,
            prompt_tokens=self.prompt_tokens,
            tokens=Lengths(tokens, tokens),
            duration_s=0.0,
            warmup_s=0.0,
            requests=streams,
            cancel_share=0.0,
            seed=self.seed + streams,
            vocab=self.vocab,
        )

    def for_the_gate(self) -> tuple[Stream, ...]:
        """One stream for each adapter."""
        names = tuple(self.adapters) or ("",)
        return make_streams(
            names,
            count=len(names),
            prompt_tokens=(self.prompt_tokens.low, self.prompt_tokens.high),
            vocab=self.vocab,
            seed=self.seed + len(names),
        )


def back_and_forth(systems: Sequence[System], repeat: int) -> Iterator[System]:
    """Each ``repeat`` times: first to last, last to first, ..."""
    for number in range(repeat):
        yield from systems if number % 2 == 0 else reversed(systems)


async def measure(
    systems: Sequence[System],
    options: CompareOptions,
    streams: int,
    stopped: Callable[[], bool] = lambda: False,
) -> CompareLevel | None:
    """Warm all of them up, then run the rounds.

    Args:
        stopped: asked before each round; ends them.

    Returns:
        None where it was stopped before each system had a round.
    """
    rounds: dict[str, list[Round]] = {system.name: [] for system in systems}
    for system in systems:
        if stopped():
            return None
        await system.round(options.load(streams, WARM_UP_TOKENS))
    work = options.load(streams, options.tokens)
    for system in back_and_forth(systems, options.repeat):
        if stopped():
            break
        rounds[system.name].append(await system.round(work))
    return level_of(streams, rounds) if all(rounds.values()) else None


def level_of(streams: int, rounds: Mapping[str, Sequence[Round]]) -> CompareLevel:
    """The figures of all systems' rounds."""
    ours = rounds[OURS]
    return CompareLevel(
        streams=streams,
        systems={name: _figures(own) for name, own in rounds.items()},
        ratios={name: _ratio(ours, own) for name, own in rounds.items() if name != OURS},
    )


def _figures(rounds: Sequence[Round]) -> SystemFigures:
    rates = [r.tokens_per_s for r in rounds]
    first = [t for r in rounds for t in r.first_token_s]
    gaps = [t for r in rounds for t in r.gaps_s]
    return SystemFigures(
        tokens_per_s=Range(median=median(rates), low=min(rates), high=max(rates)),
        first_token_ms=_ends(first),
        inter_token_ms=_ends(gaps),
        client_cpu_share=sum(r.client_cpu_s for r in rounds) / sum(r.wall_s for r in rounds),
        rounds=[RoundFigures(wall_s=r.wall_s, tokens=r.tokens) for r in rounds],
    )


def _ends(seconds: Sequence[float]) -> Ends:
    return Ends(p50=median(seconds) * 1e3, p99=percentile(seconds, 0.99) * 1e3)


def _ratio(ours: Sequence[Round], theirs: Sequence[Round]) -> Ratio:
    own, other = [r.tokens_per_s for r in ours], [r.tokens_per_s for r in theirs]
    pairs = [a / b for a, b in zip(own, other, strict=False)]
    return Ratio(
        ratio=median(own) / median(other),
        low=min(pairs),
        high=max(pairs),
        ranges_overlap=min(own) <= max(other) and min(other) <= max(own),
    )


def summary(levels: Sequence[CompareLevel]) -> dict[str, float]:
    """See `results.CompareResult`."""
    found = {}
    for level in levels:
        if not level.ratios:
            continue
        found[f"ratio_{level.streams}"] = min(each.ratio for each in level.ratios.values())
        if len(level.ratios) > 1:
            for name, each in level.ratios.items():
                found[f"ratio_{level.streams}_{name}"] = each.ratio
    return found
