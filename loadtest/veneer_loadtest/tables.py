"""Results as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from veneer_loadtest import prefix
from veneer_loadtest.results import (
    CaseFigures,
    ChurnFigures,
    CompareLevel,
    Distribution,
    Level,
    Probe,
    Ratio,
)


def compare_table(levels: Sequence[CompareLevel]) -> Table:
    """Tabulate all systems under each load."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("load", justify="right", no_wrap=True)
    table.add_column("system", no_wrap=True)
    columns = ["tokens/s", "range", "TTFT p50", "ITL p50", "ITL p99", "client CPU"]
    columns.append("veneer / it")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for level in levels:
        for name, own in level.systems.items():
            rate, ratio = own.tokens_per_s, level.ratios.get(name)
            table.add_row(
                level.title,
                name,
                f"{rate.median:.1f}",
                f"{rate.low:.1f}-{rate.high:.1f}",
                f"{own.first_token_ms.p50:.0f} ms",
                f"{own.inter_token_ms.p50:.1f} ms",
                f"{own.inter_token_ms.p99:.1f} ms",
                f"{own.client_cpu_share:.0%}" if own.client_cpu_share else "",
                _ratio(ratio) if ratio else "",
            )
    return table


def _ratio(ratio: Ratio) -> str:
    overlap = ", ranges overlap" if ratio.ranges_overlap else ""
    return f"{ratio.ratio:.2f} ({ratio.low:.2f}-{ratio.high:.2f}{overlap})"


def prefix_table(levels: Sequence[prefix.PrefixLevel]) -> Table:
    """Tabulate figures without and with the prefix cache at each number of streams."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("streams", justify="right")
    table.add_column("prefix cache")
    for column in ("cached", "TTFT p50", "range", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for level in levels:
        figures: Any = level.as_json()
        for key in ("off", "on"):
            first, rate = figures[key]["first_token_ms"], figures[key]["tokens_per_s"]
            table.add_row(
                str(level.streams),
                key,
                f"{level.cached_share:.0%}" if key == "on" else "0%",
                f"{first['p50']:.0f} ms",
                f"{first['low']:.0f}-{first['high']:.0f}",
                f"{rate['p50']:.1f}",
            )
    return table


def swap_table(cases: Mapping[str, CaseFigures]) -> Table:
    """Tabulate first tokens by the tier that held the adapter."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("first token of")
    for column in ("p50", "p99", "range", "added p50", "load p50"):
        table.add_column(column, justify="right", no_wrap=True)
    names = {
        "same": "the same adapter again",
        "device": "another one, in DEVICE",
        "host": "another one, in HOST",
        "disk": "another one, on DISK (page cache)",
        "disk_cold": "another one, on DISK",
        "publish": "a new one, after its upload",
    }
    for case, own in cases.items():
        first = own.first_token_ms
        table.add_row(
            names[case],
            f"{first.p50:.1f} ms",
            f"{first.p99:.1f} ms",
            f"{first.low:.1f}-{first.high:.1f}",
            f"{own.delta_ms.p50:+.1f} ms" if case != "same" else "",
            f"{own.load_ms.p50:.1f} ms",
        )
    return table


def churn_table(churn: ChurnFigures) -> Table:
    """Tabulate the time between tokens, with and without uploads."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{churn.streams} streams during {churn.publishes} {churn.by}s")
    for column in ("p50", "p99", "longest"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = (
        ("between tokens, quiet", churn.quiet_ms),
        ("between tokens, during one, to its end in DEVICE", churn.inside_ms),
        (f"between tokens, between {churn.by}s", churn.outside_ms),
        (f"{churn.by}, until in DEVICE", churn.publish_ms),
    )
    for name, row in rows:
        if row is None:
            continue
        table.add_row(name, f"{row.p50:.1f} ms", f"{row.p99:.1f} ms", f"{row.high:.1f} ms")
    return table


def levels_table(levels: Sequence[Level]) -> Table:
    """Tabulate a run: one row for each number of adapters."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["adapters", "ok", "failed", "req/s", "tok/s", "TTFT p50", "p99"]
    columns += ("ITL p50", "p99", "e2e p50", "queue p99", "good")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for each in levels:
        table.add_row(
            str(each.adapters),
            str(each.requests.ok),
            str(each.requests.failed),
            f"{each.requests_per_s:.2f}",
            f"{each.tokens_per_s:.1f}",
            *_ends(each.first_token_ms),
            *_ends(each.inter_token_ms),
            _ends(each.end_to_end_ms)[0],
            _ends(each.queue_ms)[1],
            f"{each.slo.share:.1%}" if each.slo else "",
        )
    return table


def probes_table(probes: Sequence[Probe]) -> Table:
    """Tabulate a search for the highest rate, in order of the rates."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("req/s", "good", "", "ok", "failed", "tok/s", "TTFT p50", "p99", "ITL p99"):
        table.add_column(column, justify="right", no_wrap=True)
    for probe in sorted(probes, key=lambda each: each.rate):
        level = probe.level
        table.add_row(
            f"{probe.rate:.2f}",
            f"{level.slo.share:.1%}" if level.slo else "",
            "kept" if probe.kept else "broken",
            str(level.requests.ok),
            str(level.requests.failed),
            f"{level.tokens_per_s:.1f}",
            *_ends(level.first_token_ms),
            _ends(level.inter_token_ms)[1],
        )
    return table


def split_table(level: Level) -> Table:
    """Tabulate a level by the tier in which the server found the adapter."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    adapters = "1 adapter" if level.adapters == 1 else f"{level.adapters} adapters"
    table.add_column(f"{adapters}, found in", no_wrap=True)
    for column in ("requests", "share", "failed", "TTFT p50", "TTFT p99", "load p50"):
        table.add_column(column, justify="right", no_wrap=True)
    requests = sum(split.requests for split in level.by_tier.values())
    for tier, split in level.by_tier.items():
        table.add_row(
            tier,
            str(split.requests),
            f"{split.requests / requests:.1%}",
            str(split.failed),
            _ms(split.first_token_p50_ms),
            _ms(split.first_token_p99_ms),
            _ms(split.load_p50_ms),
        )
    return table


def _ends(values: Distribution | None) -> tuple[str, str]:
    return (_ms(values.p50), _ms(values.p99)) if values else ("", "")


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} ms"
