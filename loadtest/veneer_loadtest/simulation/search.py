"""Search for the smallest number of replicas that keeps an SLO.

The number is doubled until the SLO is kept, then bisected. So it is assumed that more replicas
are no worse, which chance may belie near the edge. A number keeps the SLO if it does with every
seed; each number is tried with the same seeds, so with the same requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from veneer_loadtest.errors import SloMissed
from veneer_loadtest.simulation.cluster import simulate
from veneer_loadtest.simulation.costs import Costs
from veneer_loadtest.simulation.figures import Figures
from veneer_loadtest.simulation.scenario import ReplicaKind, Routing, Scenario, Slo

_FAR: Final = 2.0
"""If a figure is more than this many times its limit with one seed, others are not tried."""
_NEAR: Final = 0.9
"""A figure above this share of its limit is near the edge."""
_WIDTH: Final = 14
_FEW: Final = 1000
"""A 99th percentile of fewer requests than this is that of a handful."""


@dataclass(frozen=True, slots=True)
class Limited:
    """A figure of a run and its limit.

    Attributes:
        unit: what ``scale`` times the values are shown in.
    """

    name: str
    value: float
    limit: float
    scale: float
    unit: str

    @property
    def kept(self) -> bool:
        return self.value <= self.limit

    @property
    def used(self) -> float:
        """The value as a multiple of its limit."""
        if self.value <= 0:
            return 0.0
        return self.value / self.limit if self.limit else float("inf")


def limited(slo: Slo, run: Figures) -> list[Limited]:
    """Return the figures of a run that the SLO limits."""
    found = []
    if slo.ttft_s is not None:
        found.append(Limited("TTFT p99", run.ttft_p99_s, slo.ttft_s, 1e3, "ms"))
    if slo.itl_s is not None:
        found.append(Limited("ITL p99", run.itl_p99_s, slo.itl_s, 1e3, "ms"))
    return [*found, Limited("refused", run.refused, slo.refused, 1e2, "%")]


class Trial(msgspec.Struct, frozen=True):
    """One number of replicas, with one run for each seed that was tried.

    Attributes:
        kept: number of runs that kept the SLO.
    """

    replicas: int
    runs: list[Figures]
    kept: int

    @property
    def keeps(self) -> bool:
        """Whether it keeps the SLO with every seed."""
        return self.kept == len(self.runs)


class SearchResult(msgspec.Struct, frozen=True):
    """Result of a search.

    Attributes:
        trials: in the order in which they were tried.
        best: the smallest number that keeps the SLO.
        edge: why another seed may need more or fewer; "" if nothing is near the edge.
    """

    kind: str
    price: float
    trials: list[Trial]
    best: Trial
    edge: str


def search(
    scenario: Scenario,
    kind: ReplicaKind,
    routing: Routing,
    costs: Costs,
    slo: Slo,
    *,
    most: int,
    seeds: int,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> SearchResult:
    """Find the smallest number of replicas of a kind, from 1 to ``most``, that keeps an SLO.

    Args:
        scenario: its kinds of replicas are ignored.
        seeds: number of seeds to try each number with, from the scenario's on.
        tell: called with each trial as it ends.

    Raises:
        SloMissed: no number up to ``most`` keeps it.
    """
    trials: dict[int, Trial] = {}

    def keeps(replicas: int) -> bool:
        runs: list[Figures] = []
        for seed in range(scenario.seed, scenario.seed + seeds):
            of_kind = replace(kind, replicas=replicas)
            tried = replace(scenario, kinds=(of_kind,), seed=seed)
            runs.append(simulate(tried, routing, costs))
            if any(each.used > _FAR for each in limited(slo, runs[-1])):
                break
        kept = sum(all(each.kept for each in limited(slo, run)) for run in runs)
        trials[replicas] = Trial(replicas, runs, kept)
        tell(trials[replicas])
        return trials[replicas].keeps

    low, high = 0, 1
    while not keeps(high):
        if high == most:
            raise _missed(slo, trials[most])
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if keeps(middle):
            high = middle
        else:
            low = middle
    best = trials[high]
    return SearchResult(
        kind.name, kind.price, list(trials.values()), best, _edge(slo, best, trials.get(low))
    )


def _edge(slo: Slo, best: Trial, below: Trial | None) -> str:
    """Say what is near the edge: the number found, or the one below it."""
    if below is not None and below.kept:
        return (
            f"{below.replicas} keeps the SLO with {below.kept} of {len(below.runs)} seeds "
            f"({spread(slo, below.runs)})"
        )
    if any(each.used > _NEAR for run in best.runs for each in limited(slo, run)):
        return (
            f"{best.replicas} keeps it with little to spare ({spread(slo, best.runs)}): "
            "another seed may need one more"
        )
    return ""


def _missed(slo: Slo, trial: Trial) -> SloMissed:
    missed = [each for run in trial.runs for each in limited(slo, run) if not each.kept]
    names = dict.fromkeys(each.name for each in missed)
    limits = ", ".join(
        f"{each.name} {each.limit * each.scale:g} {each.unit}"
        for each in limited(slo, trial.runs[0])
    )
    return SloMissed(
        f"no number of replicas up to {trial.replicas} keeps {limits}: with {trial.replicas}, "
        f"{spread(slo, trial.runs)}. Give a larger --most, or limits that a request which "
        "waits for nobody can keep: its adapter's load and its prompt take time, too",
        metadata={"limit": ", ".join(names)},
    )


def spread(slo: Slo, runs: Sequence[Figures]) -> str:
    """Give the smallest and the largest of each limited figure over the runs."""
    return ", ".join(
        f"{same[0].name} {_between([each.value * each.scale for each in same])} {same[0].unit}"
        for same in zip(*(limited(slo, run) for run in runs), strict=True)
    )


def words(slo: Slo, found: SearchResult) -> str:
    """Say what was found."""
    best = found.best
    told = f"{best.replicas} keep the SLO with every seed: {spread(slo, best.runs)}"
    if found.price:
        told += f"; {best.replicas * found.price:.4g} per hour"
    if found.edge:
        told += f"\nnear the edge: {found.edge}"
    if (least := min(run.requests for run in best.runs)) < _FEW:
        told += f"\nfew requests: p99 of {least} says little, give {_FEW} or more"
    return told


def heading(slo: Slo, price: float) -> str:
    """Format the heading of a table of `row`."""
    names = ["seeds kept"]
    if slo.ttft_s is not None:
        names.append("TTFT p99 ms")
    if slo.itl_s is not None:
        names.append("ITL p99 ms")
    names += ["refused %", "hit rate"]
    if price:
        names += ["cost per hour", "per million tokens"]
    return "replicas" + "".join(f"  {name:>{_WIDTH}}" for name in names)


def row(slo: Slo, price: float, trial: Trial) -> str:
    """Format a trial: the smallest and the largest of each figure over the seeds."""
    cells = [f"{trial.kept} of {len(trial.runs)}"]
    for same in zip(*(limited(slo, run) for run in trial.runs), strict=True):
        cells.append(_between([each.value * each.scale for each in same]))
    cells.append(_between([run.hit_rate for run in trial.runs]))
    if price:
        cells.append(f"{trial.replicas * price:.4g}")
        cells.append(_between([run.cost_per_million for run in trial.runs]))
    return f"{trial.replicas:>8}" + "".join(f"  {cell:>{_WIDTH}}" for cell in cells)


def _between(values: Sequence[float]) -> str:
    first, last = (
        f"{value:.0f}" if max(values) >= 1000 else f"{value:.3g}"
        for value in (min(values), max(values))
    )
    return first if first == last else f"{first} to {last}"
