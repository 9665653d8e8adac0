"""Compute the figures of a load from its records; `results` documents them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from veneer_loadtest.load.generator import LoadOutcome
from veneer_loadtest.load.records import Record
from veneer_loadtest.load.spec import LoadSpec
from veneer_loadtest.quantiles import Samples, median, percentiles
from veneer_loadtest.results import (
    AdapterLoad,
    Distribution,
    GeneratorFigures,
    Level,
    Requests,
    RequestSplit,
    ServerCounts,
    SloFigures,
    SloLimits,
    TierShares,
    Timeline,
    Totals,
)

OTHER: Final = "_other"
_MOST_ADAPTERS: Final = 200
_MOST_LOADS: Final = 2000
_BUCKETS: Final = 300
"""Most buckets of a timeline: as many as a plot can show."""
_LOADED_MS: Final = 0.1
"""Shorter waits for an adapter are not counted."""

_ROUNDING_S: Final = 1e-3
"""Larger than the error of a sum of 32-bit gaps."""

Floats = npt.NDArray[np.float64]

_SHARES: Final = np.unique(
    np.concatenate([np.linspace(0, 1, 101), np.linspace(0.99, 1, 11), [0.9995, 0.9999]])
)


def level(
    load: LoadSpec,
    loaded: LoadOutcome,
    *,
    workers: int,
    limits: SloLimits | None,
    residency: TierShares | None = None,
    server: ServerCounts | None = None,
) -> Level:
    """Compute all figures of one load."""
    whole = loaded.wall_s
    end = min(load.duration_s or math.inf, whole)
    window = max(end - load.warmup_s, 1e-9)
    due = [r for r in loaded.records if r.due_s >= load.warmup_s]
    told = [r for r in due if r.outcome != "stopped"]
    ok = [r for r in told if r.outcome == "ok"]
    arrived, weights = _arrivals(loaded.records)
    in_window = float(
        weights[(arrived >= load.warmup_s) & (arrived <= end + _ROUNDING_S)].sum()
    )
    begun = [
        r for r in loaded.records if r.first_s is not None and load.warmup_s <= r.first_s <= end
    ]
    counts = Counter(r.outcome for r in due)
    loads = _loads(loaded.records)
    return Level(
        adapters=len(load.adapters),
        window_s=window,
        requests=Requests(
            ok=counts["ok"],
            left=counts["left"],
            failed=counts["failed"],
            stopped=counts["stopped"],
        ),
        requests_per_s=_ended_within(loaded.records, load.warmup_s, end) / window,
        tokens_per_s=in_window / window,
        prompt_tokens_per_s=sum(r.prompt_tokens for r in begun) / window,
        errors=dict(Counter(r.reason for r in due if r.outcome == "failed").most_common()),
        first_token_ms=_first_tokens(told),
        inter_token_ms=distribution(_gaps(told) * 1e3),
        end_to_end_ms=distribution([r.whole_s * 1e3 for r in ok]),
        queue_ms=distribution([r.queue_s * 1e3 for r in ok if r.queue_s is not None]),
        adapter_load_ms=distribution([r.load_s * 1e3 for r in ok if r.load_s is not None]),
        by_tier=_splits(told, {r.index: r.tier or "none" for r in told}),
        by_adapter=_splits(told, _adapter_keys(told)),
        slo=_slo(told, limits, end, window) if limits else None,
        generator=_generator(loaded, workers),
        timeline=_timeline(loaded.records, whole, arrived, weights),
        loads=loads[:_MOST_LOADS],
        loads_left_out=max(0, len(loads) - _MOST_LOADS),
        residency=residency,
        server=server,
        totals=totals(loaded.records),
    )


def totals(records: Iterable[Record]) -> Totals:
    """The totals of all requests, warm-up included."""
    requests = prompt = new = 0
    for record in records:
        requests += 1
        prompt += record.prompt_tokens
        new += record.tokens
    return Totals(requests=requests, prompt_tokens=prompt, tokens=new)


def distribution(milliseconds: Samples) -> Distribution | None:
    """Return the distribution of the values, or None if there are none."""
    if not len(milliseconds):
        return None
    values = np.sort(np.asarray(milliseconds, dtype=np.float64))
    p50, p90, p95, p99, p999 = percentiles(values, [0.5, 0.9, 0.95, 0.99, 0.999])
    return Distribution(
        count=len(values),
        mean=float(values.mean()),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        p999=p999,
        max=float(values[-1]),
        cdf=[
            (round(value, 4), round(float(share), 4))
            for value, share in zip(percentiles(values, _SHARES), _SHARES, strict=True)
        ],
    )


def _first_tokens(records: Iterable[Record]) -> Distribution | None:
    return distribution([r.first_token_s * 1e3 for r in records if r.first_token_s is not None])


def _gaps(records: Iterable[Record]) -> Floats:
    joined = b"".join(r.gaps for r in records)
    return np.frombuffer(joined, dtype=np.float32).astype(np.float64)


def _arrivals(records: Iterable[Record]) -> tuple[Floats, Floats]:
    """Return when each message with tokens arrived, for all requests and in no order, and how
    many tokens it counts for: 1, unless the server says that its messages held more."""
    times, weights = [np.zeros(0)], [np.zeros(0)]
    for r in records:
        if r.first_s is None:
            continue
        gaps = np.frombuffer(r.gaps, dtype=np.float32)
        times.append(r.first_s + np.concatenate([[0.0], np.cumsum(gaps)]))
        weights.append(np.full(len(gaps) + 1, r.tokens / (len(gaps) + 1)))
    return np.concatenate(times), np.concatenate(weights)


def _adapter_keys(records: Sequence[Record]) -> dict[int, str]:
    often = Counter(r.adapter for r in records).most_common(_MOST_ADAPTERS)
    named = {adapter for adapter, _ in often}
    return {r.index: r.adapter if r.adapter in named else OTHER for r in records}


def _splits(records: Sequence[Record], keys: dict[int, str]) -> dict[str, RequestSplit]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[keys[record.index]].append(record)
    often = sorted(groups.items(), key=lambda item: (item[0] == OTHER, -len(item[1])))
    return {key: _split(group) for key, group in often}


def _split(records: Sequence[Record]) -> RequestSplit:
    first = _quantiles([r.first_token_s for r in records if r.first_token_s is not None])
    gaps = _quantiles(_gaps(records))
    loads = [r.load_s for r in records if r.load_s is not None]
    return RequestSplit(
        requests=len(records),
        failed=sum(r.outcome == "failed" for r in records),
        tokens=sum(r.tokens for r in records),
        first_token_p50_ms=first[0],
        first_token_p99_ms=first[1],
        inter_token_p50_ms=gaps[0],
        inter_token_p99_ms=gaps[1],
        load_p50_ms=_quantiles(loads)[0],
    )


def _quantiles(seconds: Samples) -> tuple[float | None, float | None]:
    if not len(seconds):
        return None, None
    p50, p99 = percentiles(seconds, [0.5, 0.99])
    return p50 * 1e3, p99 * 1e3


def _slo(records: Sequence[Record], limits: SloLimits, end: float, window: float) -> SloFigures:
    judged = [r for r in records if r.outcome in ("ok", "failed")]
    kept = [r for r in judged if r.outcome == "ok" and _keeps(r, limits)]
    good = len(kept)
    return SloFigures(
        limits=limits,
        good=good,
        share=good / len(judged) if judged else 0.0,
        goodput_per_s=sum(r.end_s <= end for r in kept) / window,
    )


def _keeps(record: Record, limits: SloLimits) -> bool:
    after_first = sum(record.gap_values())
    measured = (
        (limits.ttft_ms, record.first_token_s),
        (limits.tpot_ms, after_first / max(record.tokens - 1, 1)),
        (limits.e2e_ms, record.whole_s),
    )
    return all(
        limit is None or (value is not None and value * 1e3 <= limit)
        for limit, value in measured
    )


def _generator(loaded: LoadOutcome, workers: int) -> GeneratorFigures:
    late = np.array([(r.sent_s - r.due_s) * 1e3 for r in loaded.records] or [0.0])
    p50, p99, longest = percentiles(late, [0.5, 0.99, 1.0])
    return GeneratorFigures(
        workers=workers,
        cpu_share=loaded.cpu_s / loaded.wall_s if loaded.wall_s else 0.0,
        late_p50_ms=p50,
        late_p99_ms=p99,
        late_max_ms=longest,
        lost=loaded.lost,
    )


def _loads(records: Iterable[Record]) -> list[AdapterLoad]:
    found = [
        AdapterLoad(r.due_s, r.adapter, r.tier, r.load_s * 1e3)
        for r in records
        if r.load_s is not None and r.load_s * 1e3 > _LOADED_MS
    ]
    return sorted(found, key=lambda each: each.at_s)


def _timeline(
    records: Sequence[Record], whole: float, arrived: Floats, weights: Floats
) -> Timeline:
    step = next((s for s in (0.25, 0.5, 1, 2, 5, 10, 30, 60) if whole / s <= _BUCKETS), 300)
    buckets = max(1, math.ceil(whole / step))

    def tally(times: Iterable[float] | Floats, weights: Floats | None = None) -> list[int]:
        places = (np.asarray(list(times), dtype=np.float64) / step).astype(int)
        counts = np.bincount(places.clip(0, buckets - 1), weights, minlength=buckets)
        return [round(float(count)) for count in counts]

    due, ended = tally(r.due_s for r in records), tally(r.end_s for r in records)
    first: dict[int, list[float]] = defaultdict(list)
    for record in records:
        if record.first_s is not None and record.first_token_s is not None:
            place = min(int(record.first_s / step), buckets - 1)
            first[place].append(record.first_token_s * 1e3)
    return Timeline(
        bucket_s=step,
        due=due,
        ended=ended,
        failed=tally(r.end_s for r in records if r.outcome == "failed"),
        tokens=tally(arrived, weights),
        running=[int(n) for n in np.cumsum(due) - np.cumsum(ended)],
        first_token_p50_ms=[
            median(first[place]) if place in first else None for place in range(buckets)
        ],
        first_token_max_ms=[
            max(first[place]) if place in first else None for place in range(buckets)
        ],
    )


def _ended_within(records: Iterable[Record], begin: float, end: float) -> int:
    return sum(r.outcome == "ok" and begin <= r.end_s <= end for r in records)
