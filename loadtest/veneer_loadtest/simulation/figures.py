"""Figures of a run, simulated or real: collected request by request, then put into a record."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from veneer_loadtest.quantiles import percentiles

NEW_S: Final = 60.0
"""A replica counts as new for this many seconds: its adapters are being loaded."""
_GAP_S: Final = 1e-5


class KindFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind of replicas did in a run.

    Attributes:
        requests, ttft_p99_s: of the measured requests that these replicas got.
        tokens: prompt and answer tokens of all requests that they answered.
        hours: time that they were paid for, summed over the replicas.
        cost: hours times price.
    """

    name: str
    requests: int
    ttft_p99_s: float
    tokens: int
    hours: float
    cost: float

    @property
    def cost_per_million(self) -> float:
        """Cost per million of `tokens`."""
        return self.cost / max(1, self.tokens) * 1e6


class FleetSize(msgspec.Struct, frozen=True):
    """Numbers of replicas from ``at_s`` on: ready, not ready yet, and without new requests."""

    at_s: float
    ready: int
    starting: int
    draining: int


class ScalingFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What autoscaling did.

    Attributes:
        sizes: the number of replicas at the start, and whenever it changed.
        broken: measured requests that broke the SLO.
        broken_starting: those of them that came while a replica was starting.
        broken_new: those of them that went to a replica in its first `NEW_S` seconds.
    """

    sizes: list[FleetSize]
    broken: int
    broken_starting: int
    broken_new: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one run. Times are in seconds; in a simulation, all but ``cpu_s`` are virtual.

    Attributes:
        requests: measured requests: those with a first token, without those at the start.
        answered: requests that were answered, of all requests.
        failed: requests that were not, of all requests, by reason.
        hit_rate: share of the measured requests with an adapter whose adapter was in memory
            when they reached the engine.
        prefix_rate: share of the measured requests' prompt tokens that the prefix cache had.
        ttft_p50_s, ttft_p99_s, ttft_mean_s: TTFT of the measured requests, from the ingress.
        itl_p50_s, itl_p99_s: time between two tokens of the same measured request, to 10 us; 0
            if none had two.
        loads, loaded_bytes: loads from disk into memory in the whole run, and their bytes.
        fetched_bytes: bytes fetched from the registry in the whole run.
        balance: requests at the busiest replica / mean over all replicas.
        fairness: Jain's index of the tenants' mean TTFT: 1 if all tenants wait equally long.
        worst_tenant_p99_s: the largest p99 TTFT of a tenant with 100 requests or more; 0 if
            there is no such tenant.
        everywhere_s: for each publication, time until every replica answers with it; None if
            the run ended before that.
        old_revision: requests that were answered with a revision that had been replaced.
        seconds: length of the run.
        kinds: by kind of replica; empty in a real run.
        scaling: None without autoscaling.
        cpu_s: CPU time of the simulation.
    """

    routing: str
    requests: int
    answered: int
    failed: dict[str, int]
    hit_rate: float
    prefix_rate: float
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_mean_s: float
    itl_p50_s: float
    itl_p99_s: float
    loads: int
    loaded_bytes: int
    fetched_bytes: int
    balance: float
    fairness: float
    worst_tenant_p99_s: float
    everywhere_s: list[float | None]
    old_revision: int
    seconds: float
    kinds: list[KindFigures] = []
    scaling: ScalingFigures | None = None
    cpu_s: float = 0.0

    @property
    def refused(self) -> float:
        """Share of all requests that were not answered."""
        failed = sum(self.failed.values())
        return failed / max(1, failed + self.answered)

    @property
    def cost(self) -> float:
        """Cost of the run."""
        return sum(kind.cost for kind in self.kinds)

    @property
    def cost_per_million(self) -> float:
        """Cost per million prompt and answer tokens of answered requests."""
        return self.cost / max(1, sum(kind.tokens for kind in self.kinds)) * 1e6


class _OfKind:
    """Counts of one kind of replicas; see `KindFigures`."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens = 0


class EndedRequests:
    """Counts requests as they end.

    Args:
        first: number of the first request that is measured.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self.failed: Counter[str] = Counter()
        self.answered = 0
        self.old_revision = 0
        self._with_adapter = self._hits = 0
        self._gaps: Counter[int] = Counter()
        """Times between tokens, in units of `_GAP_S`."""
        self._kinds: defaultdict[str, _OfKind] = defaultdict(_OfKind)
        self._times: list[float] = []
        self._by_tenant: defaultdict[int, list[float]] = defaultdict(list)
        self._by_replica: Counter[str] = Counter()
        self._prompt = self._cached = 0

    def sent(self, number: int, replica: str) -> None:
        """Count a request that is sent to a replica."""
        if number >= self._first:
            self._by_replica[replica] += 1

    def first_token(
        self,
        number: int,
        tenant: int,
        seconds: float,
        *,
        hit: bool | None,
        prompt: int,
        cached: int,
        kind: str = "",
    ) -> None:
        """Record a first token, ``seconds`` after its request.

        Args:
            hit: whether its adapter was in memory; None for a request to the base.
            kind: the replica's kind.
        """
        if number < self._first:
            return
        self._times.append(seconds)
        self._by_tenant[tenant].append(seconds)
        self._kinds[kind].times.append(seconds)
        self._with_adapter += hit is not None
        self._hits += bool(hit)
        self._prompt += prompt
        self._cached += cached

    def next_token(self, number: int, seconds: float) -> None:
        """Record a further token, ``seconds`` after the one before."""
        if number >= self._first:
            self._gaps[round(seconds / _GAP_S)] += 1

    def measures(self, number: int) -> bool:
        """Whether a request is measured."""
        return number >= self._first

    def has_answered(self, tokens: int, kind: str = "") -> None:
        """Count an answer.

        Args:
            tokens: prompt and answer tokens.
        """
        self.answered += 1
        self._kinds[kind].tokens += tokens

    def of_kind(self, kind: str, hours: float, price: float) -> KindFigures:
        """Return the figures of one kind of replicas."""
        found = self._kinds[kind]
        return KindFigures(
            name=kind,
            requests=len(found.times),
            ttft_p99_s=percentiles(found.times or [0.0], [0.99])[0],
            tokens=found.tokens,
            hours=hours,
            cost=hours * price,
        )

    def figures(self, replicas: int, **more: Any) -> Figures:
        """Return the figures.

        Args:
            replicas: number of replicas that could have been sent requests.
            more: fields of `Figures` that are not counted here.
        """
        times = self._times or [0.0]
        p50, p99 = percentiles(times, [0.5, 0.99])
        counts = self._by_replica.values()
        means = [sum(each) / len(each) for each in self._by_tenant.values()]
        enough = [each for each in self._by_tenant.values() if len(each) >= 100]
        return Figures(
            requests=len(self._times),
            answered=self.answered,
            failed=dict(sorted(self.failed.items())),
            hit_rate=self._hits / max(1, self._with_adapter),
            prefix_rate=self._cached / max(1, self._prompt),
            ttft_p50_s=p50,
            ttft_p99_s=p99,
            ttft_mean_s=sum(times) / len(times),
            itl_p50_s=_share_below(self._gaps, 0.5) * _GAP_S,
            itl_p99_s=_share_below(self._gaps, 0.99) * _GAP_S,
            balance=max(counts, default=0) * replicas / max(1, sum(counts)),
            fairness=jain(means),
            worst_tenant_p99_s=max((percentiles(e, [0.99])[0] for e in enough), default=0.0),
            old_revision=self.old_revision,
            **more,
        )


def _share_below(counts: Mapping[int, int], share: float) -> int:
    """Return the smallest value such that ``share`` of the counted values are at most that; 0
    if none are counted."""
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return 0


def jain(values: Iterable[float]) -> float:
    """Return Jain's fairness index: 1 if all values are equal, 1/n if one has everything; 1 if
    there are no values."""
    found = list(values)
    squares = sum(value * value for value in found)
    return sum(found) ** 2 / (len(found) * squares) if squares else 1.0


_ROWS: Mapping[str, Any] = {
    "requests measured": lambda f: f"{f.requests}",
    "failed": lambda f: f"{sum(f.failed.values())}",
    "hit rate": lambda f: f"{f.hit_rate:.3f}",
    "prefix tokens cached": lambda f: f"{f.prefix_rate:.3f}",
    "TTFT p50 ms": lambda f: f"{f.ttft_p50_s * 1e3:.1f}",
    "TTFT p99 ms": lambda f: f"{f.ttft_p99_s * 1e3:.1f}",
    "ITL p50 ms": lambda f: f"{f.itl_p50_s * 1e3:.1f}",
    "ITL p99 ms": lambda f: f"{f.itl_p99_s * 1e3:.1f}",
    "loads": lambda f: f"{f.loads}",
    "loaded MB": lambda f: f"{f.loaded_bytes / 1e6:.0f}",
    "fetched MB": lambda f: f"{f.fetched_bytes / 1e6:.0f}",
    "load max/mean": lambda f: f"{f.balance:.3f}",
    "fairness (Jain)": lambda f: f"{f.fairness:.3f}",
    "worst tenant p99 ms": lambda f: f"{f.worst_tenant_p99_s * 1e3:.1f}",
    "publication to all replicas ms": lambda f: _everywhere(f.everywhere_s),
    "answered by an old revision": lambda f: f"{f.old_revision}",
    "length s": lambda f: f"{f.seconds:.0f}",
    "replica hours": lambda f: f"{sum(kind.hours for kind in f.kinds):.3f}" if f.kinds else "-",
    "cost": lambda f: f"{f.cost:.4g}" if f.cost else "-",
    "cost per million tokens": lambda f: f"{f.cost_per_million:.4g}" if f.cost else "-",
    "CPU s": lambda f: f"{f.cpu_s:.1f}",
}


def _everywhere(times: list[float | None]) -> str:
    if not times:
        return "-"
    return " ".join("never" if each is None else f"{each * 1e3:.0f}" for each in times)


def table(runs: Iterable[Figures]) -> str:
    """Format runs side by side."""
    found = list(runs)
    lines = [["", *(each.routing for each in found)]]
    lines += [[name, *(shown(each) for each in found)] for name, shown in _ROWS.items()]
    return aligned(lines)


def kinds_table(run: Figures) -> str:
    """Format the kinds of replicas of a run."""
    lines = [["kind", "requests", "TTFT p99 ms", "hours", "cost", "cost per million tokens"]]
    lines += [
        [
            kind.name,
            f"{kind.requests}",
            f"{kind.ttft_p99_s * 1e3:.1f}",
            f"{kind.hours:.3f}",
            f"{kind.cost:.4g}",
            f"{kind.cost_per_million:.4g}",
        ]
        for kind in run.kinds
    ]
    return aligned(lines)


def scaling_table(run: ScalingFigures) -> str:
    """Format the number of replicas over time, and the requests that broke the SLO."""
    lines = [["at s", "ready", "starting", "draining"]]
    lines += [
        [f"{s.at_s:.1f}", f"{s.ready}", f"{s.starting}", f"{s.draining}"] for s in run.sizes
    ]
    return (
        f"{aligned(lines)}\n{run.broken} requests broke the SLO; {run.broken_starting} of them "
        f"came while a replica was starting, {run.broken_new} went to a replica in its first "
        f"{NEW_S:.0f} s"
    )


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Format rows of cells in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
