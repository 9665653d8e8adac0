"""Figures of a run, simulated or real: collected request by request, then put into a record."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from veneer_loadtest.quantiles import percentiles


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one run. Times are in seconds; in a simulation, all but ``cpu_s`` are virtual.

    Attributes:
        requests: measured requests: those with a first token, without those at the start.
        answered: requests that were answered, of all requests.
        failed: requests that failed, of all requests, by reason.
        hit_rate: share of the measured requests whose adapter was in memory when they reached
            the engine.
        prefix_rate: share of the measured requests' prompt tokens that the prefix cache had.
        ttft_p50_s, ttft_p99_s, ttft_mean_s: TTFT of the measured requests, from the ingress.
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
    loads: int
    loaded_bytes: int
    fetched_bytes: int
    balance: float
    fairness: float
    worst_tenant_p99_s: float
    everywhere_s: list[float | None]
    old_revision: int
    seconds: float
    cpu_s: float = 0.0


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
        self._hits = 0
        self._times: list[float] = []
        self._by_tenant: defaultdict[int, list[float]] = defaultdict(list)
        self._by_replica: Counter[str] = Counter()
        self._prompt = self._cached = 0

    def sent(self, number: int, replica: str) -> None:
        """Count a request that is sent to a replica."""
        if number >= self._first:
            self._by_replica[replica] += 1

    def first_token(
        self, number: int, tenant: int, seconds: float, *, hit: bool, prompt: int, cached: int
    ) -> None:
        """Record a first token, ``seconds`` after its request."""
        if number < self._first:
            return
        self._times.append(seconds)
        self._by_tenant[tenant].append(seconds)
        self._hits += hit
        self._prompt += prompt
        self._cached += cached

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
            hit_rate=self._hits / len(times),
            prefix_rate=self._cached / max(1, self._prompt),
            ttft_p50_s=p50,
            ttft_p99_s=p99,
            ttft_mean_s=sum(times) / len(times),
            balance=max(counts, default=0) * replicas / max(1, sum(counts)),
            fairness=jain(means),
            worst_tenant_p99_s=max((percentiles(e, [0.99])[0] for e in enough), default=0.0),
            old_revision=self.old_revision,
            **more,
        )


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
    "loads": lambda f: f"{f.loads}",
    "loaded MB": lambda f: f"{f.loaded_bytes / 1e6:.0f}",
    "fetched MB": lambda f: f"{f.fetched_bytes / 1e6:.0f}",
    "load max/mean": lambda f: f"{f.balance:.3f}",
    "fairness (Jain)": lambda f: f"{f.fairness:.3f}",
    "worst tenant p99 ms": lambda f: f"{f.worst_tenant_p99_s * 1e3:.1f}",
    "publication to all replicas ms": lambda f: _everywhere(f.everywhere_s),
    "answered by an old revision": lambda f: f"{f.old_revision}",
    "length s": lambda f: f"{f.seconds:.0f}",
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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
