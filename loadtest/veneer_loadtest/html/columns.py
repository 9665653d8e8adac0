"""Results as columns: side by side in a table, one colour each in a plot."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from veneer_loadtest.html.words import amount, ms, rate_words, share, shortened
from veneer_loadtest.load.spec import LoadSpec
from veneer_loadtest.results import (
    Distribution,
    FindMaxResult,
    Level,
    LoadResult,
    Result,
    RunResult,
)

MOST_DRAWN: Final = 8
"""Most columns in one plot: as many as can be told apart."""
_SHORT: Final = 28
"""Characters of a name that a plot has room for."""


@dataclass(frozen=True, slots=True)
class ReportColumn:
    """One load of one result.

    Attributes:
        result: its number, from 0.
        title: heading of a table's column; ``short``: label of a plot's line.
        rate: rate of a find-max probe, requests/s; ``kept``: whether the probe kept the limits.
    """

    result: int
    title: str
    short: str
    level: Level
    load: LoadSpec
    rate: float | None = None
    kept: bool = True


def letter(number: int) -> str:
    """Return A, B ... Z, A1 ... for 0, 1 ..."""
    letters = string.ascii_uppercase
    again = number // len(letters)
    return letters[number % len(letters)] + (str(again) if again else "")


def name_of(results: Sequence[Result], number: int, names: Sequence[str] = ()) -> str:
    """Return a result's label or file name, after its letter if there are several results."""
    label = results[number].label or (names[number] if number < len(names) else "")
    if len(results) == 1:
        return label
    return f"{letter(number)}: {label}" if label else letter(number)


def columns_of(results: Sequence[LoadResult], names: Sequence[str] = ()) -> list[ReportColumn]:
    """Return the columns of the results. A run has one for each level. A find-max alone has one
    for each probe, by rate; next to other results it has one, for the highest probe that kept
    the limits, or else the lowest."""
    columns: list[ReportColumn] = []
    for number, result in enumerate(results):
        name = name_of(results, number, names)
        if isinstance(result, RunResult):
            columns += _levels(result, number, name, alone=len(results) == 1)
        else:
            columns += _probes(result, number, name, alone=len(results) == 1)
    return columns


def _levels(result: RunResult, number: int, name: str, *, alone: bool) -> list[ReportColumn]:
    columns = []
    several = len(result.levels) > 1
    for level in result.levels:
        adapters = f"{level.adapters:,} adapter" + ("s" if level.adapters != 1 else "")
        if several:
            # The letter stands for the name: a table of many columns has no room for it.
            title = short = adapters if alone else f"{letter(number)}, {adapters}"
        else:
            title = name or adapters
            short = shortened(title, _SHORT)
        columns.append(ReportColumn(number, title, short, level, result.load))
    return columns


def _probes(
    result: FindMaxResult, number: int, name: str, *, alone: bool
) -> list[ReportColumn]:
    probes = sorted(result.probes, key=lambda probe: probe.rate)
    if not alone:
        kept = [probe for probe in probes if probe.kept and probe.rate == result.max_rate]
        probes = (kept or probes)[:1]
    columns = []
    for probe in probes:
        rate = rate_words(probe.rate)
        title = rate if alone else f"{name}, {rate}"
        short = rate if alone else shortened(name, _SHORT)
        level = probe.level
        columns.append(
            ReportColumn(number, title, short, level, result.load, probe.rate, probe.kept)
        )
    return columns


def drawn(columns: Sequence[ReportColumn]) -> list[ReportColumn]:
    """Select the columns for plots over time or of distributions. For a find-max, these are the
    highest probe that kept the limits and the lowest above it that broke them. If there are
    more columns than can be told apart, they are an evenly spaced selection."""
    if columns and all(column.rate is not None and column.result == 0 for column in columns):
        kept = [column for column in columns if column.kept][-1:]
        least = kept[0].rate or 0.0 if kept else 0.0
        broke = [c for c in columns if not c.kept and (c.rate or 0.0) > least][:1]
        return kept + broke
    if len(columns) <= MOST_DRAWN:
        return list(columns)
    step = (len(columns) - 1) / (MOST_DRAWN - 1)
    return [columns[round(place * step)] for place in range(MOST_DRAWN)]


def pairs(
    columns: Sequence[ReportColumn], results: int
) -> list[tuple[ReportColumn, ReportColumn]]:
    """Pair the columns of two results; return no pairs if the results do not match."""
    if results != 2:
        return []
    first = [column for column in columns if column.result == 0]
    second = [column for column in columns if column.result == 1]
    if len(first) != len(second):
        return []
    if len(first) > 1 and [c.level.adapters for c in first] != [
        c.level.adapters for c in second
    ]:
        return []
    return list(zip(first, second, strict=True))


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the key figures: ``group`` is a heading above it.

    ``compared``: whether a ratio of two values says something about the target.
    """

    group: str
    name: str
    get: Callable[[Level], float | None]
    text: Callable[[float], str]
    compared: bool = True


def ratio(figure: Figure, first: ReportColumn, second: ReportColumn) -> float | None:
    """Return second / first, or None if that is meaningless."""
    before, after = figure.get(first.level), figure.get(second.level)
    if not figure.compared or not before or after is None:
        return None
    return after / before


def _of(field: str, part: str) -> Callable[[Level], float | None]:
    def get(level: Level) -> float | None:
        values: Distribution | None = getattr(level, field)
        return None if values is None else float(getattr(values, part))

    return get


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _failed_share(level: Level) -> float | None:
    told = level.requests.ok + level.requests.failed
    return level.requests.failed / told if told else None


def _device_share(level: Level) -> float | None:
    tiers = {tier: split.requests for tier, split in level.by_tier.items() if tier != "none"}
    told = sum(tiers.values())
    return tiers.get("device", 0) / told if told else None


def _evictions(level: Level) -> float | None:
    return None if level.server is None else sum(level.server.evictions.values())


def _latency(group: str, field: str, *parts: str) -> list[Figure]:
    names = {"p50": "p50", "p90": "p90", "p99": "p99", "max": "longest"}
    return [Figure(group, names[part], _of(field, part), ms) for part in parts]


FIGURES: Final[tuple[Figure, ...]] = (
    Figure("Requests", "adapters", lambda level: level.adapters, _whole, compared=False),
    Figure("Requests", "succeeded", lambda level: level.requests.ok, _whole),
    Figure("Requests", "failed", lambda level: level.requests.failed, _whole),
    Figure("Requests", "failed, share", _failed_share, share),
    Figure("Requests", "canceled by client", lambda level: level.requests.left, _whole),
    Figure("Throughput", "requests/s", lambda level: level.requests_per_s, amount),
    Figure("Throughput", "new tokens/s", lambda level: level.tokens_per_s, amount),
    Figure("Throughput", "prompt tokens/s", lambda level: level.prompt_tokens_per_s, amount),
    Figure("Goodput", "within limits, share", lambda v: v.slo.share if v.slo else None, share),
    Figure("Goodput", "good/s", lambda v: v.slo.goodput_per_s if v.slo else None, amount),
    *_latency("First token", "first_token_ms", "p50", "p90", "p99", "max"),
    *_latency("Between tokens", "inter_token_ms", "p50", "p90", "p99", "max"),
    *_latency("Whole request", "end_to_end_ms", "p50", "p90", "p99", "max"),
    *_latency("Wait in the queue", "queue_ms", "p50", "p99"),
    *_latency("Wait for the adapter", "adapter_load_ms", "p50", "p99"),
    Figure("Adapters", "found in DEVICE", _device_share, share),
    Figure("Adapters", "waits", lambda v: len(v.loads) + v.loads_left_out, _whole),
    Figure("Adapters", "evictions", _evictions, _whole),
    Figure(
        "Generator", "send delay, p99", lambda v: v.generator.late_p99_ms, ms, compared=False
    ),
    Figure("Generator", "CPU, cores", lambda v: v.generator.cpu_share, amount, compared=False),
    Figure("Generator", "lost", lambda v: v.generator.lost, _whole, compared=False),
)
"""The rows of key figures. A row without a value in any column is left out."""
