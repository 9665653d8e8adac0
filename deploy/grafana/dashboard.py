"""Writes Veneer's Grafana dashboard: ``python deploy/grafana/dashboard.py`` (`make dashboard`).

The JSON beside this file is what Grafana loads. A test checks that this file writes the same
JSON, and runs each query against a real Prometheus.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    HeatmapCellLayout,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableRefresh,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TARGET: Final = Path(__file__).with_name("veneer.json")
SERVERS: Final = 'instance=~"$instance"'
SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${source}")


@dataclass(frozen=True, slots=True)
class Chart:
    """One panel.

    Attributes:
        unit: a unit that Grafana knows: s, short, bytes, percentunit, reqps.
        queries: legend -> PromQL; ``{...}`` in a legend is a label.
        kind: line; stack (parts of a whole); number (the last value); heat (buckets).
    """

    title: str
    unit: str
    queries: dict[str, str]
    help: str = ""
    kind: Literal["line", "stack", "number", "heat"] = "line"
    width: int = 8


def of(metric: str, *labels: str) -> str:
    """A PromQL selector of a metric of the chosen servers."""
    chosen = ",".join((SERVERS, *labels))
    return f"veneer_{metric}{{{chosen}}}"


def rate(metric: str, by: str = "", *labels: str) -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({of(metric, *labels)}[$__rate_interval]))"


def quantile(q: float, metric: str, by: str = "") -> str:
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', f'{by},le'.strip(','))})"


def mean(metric: str, by: str = "") -> str:
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"


def quantiles(metric: str) -> dict[str, str]:
    return {f"p{int(100 * q)}": quantile(q, metric) for q in (0.5, 0.95, 0.99)}


ROWS: Final[dict[str, tuple[Chart, ...]]] = {
    "Now": (
        Chart("Engines up", "short", {"": f"sum({of('engine_healthy')})"},
              "Engines with a responsive step loop.", "number", 4),
        Chart("Running", "short", {"": f"sum({of('num_requests_running')})"},
              "Sequences in the batch.", "number", 4),
        Chart("Waiting", "short", {"": f"sum({of('num_requests_waiting')})"},
              "Sequences in the queue.", "number", 4),
        Chart("New tokens", "short", {"": rate("generation_tokens_total")},
              "Tokens a second.", "number", 4),
        Chart("First token p95", "s", {"": quantile(0.95, "time_to_first_token_seconds")},
              "Time from arrival.", "number", 4),
        Chart("Found in DEVICE", "percentunit",
              {"": rate("adapter_cache_lookups_total", "", 'tier="device"', 'result="hit"')
               + " / " + rate("adapter_cache_lookups_total", "", 'tier="device"')},
              "Requests that needed no adapter load or move.", "number", 4),
    ),
    "Traffic": (
        Chart("Requests ended", "reqps", {"{{finish_reason}}":
              rate("requests_total", "finish_reason")}, kind="stack"),
        Chart("Errors", "reqps", {"{{grpc_code}}":
              f'sum by (grpc_code) (rate(grpc_server_handled_total{{{SERVERS},'
              'grpc_code!="OK"}[$__rate_interval]))'},
              "gRPC calls with a status other than OK.", kind="stack"),
        Chart("Tokens", "short", {
              "new": rate("generation_tokens_total"),
              "prompt": rate("prompt_tokens_total"),
              "prompt, found in the prefix cache": rate("prefix_cache_hit_tokens_total")},
              "Tokens a second."),
    ),
    "Latency": (
        Chart("First token", "s", quantiles("time_to_first_token_seconds"),
              "Time from arrival."),
        Chart("First token p95 by tier", "s", {"{{adapter_tier}}":
              quantile(0.95, "time_to_first_token_seconds", "adapter_tier")},
              "By the tier where the request's adapter was found; none: the base."),
        Chart("Between tokens", "s", quantiles("inter_token_latency_seconds")),
        Chart("Queue", "s", quantiles("request_queue_time_seconds"),
              "Time from arrival to the first step, adapter loads included."),
        Chart("Whole requests", "s", quantiles("e2e_request_latency_seconds")),
        Chart("Waiting and running", "short", {
              "waiting": f"sum({of('num_requests_waiting')})",
              "running": f"sum({of('num_requests_running')})"}),
    ),
    "Adapters": (
        Chart("Adapters by tier", "short", {"{{tier}}":
              f"sum by (tier) ({of('adapters_resident')})",
              "registered": f"sum({of('adapters_registered')})"}),
        Chart("Bytes and budgets", "bytes", {
              "{{tier}}": f"sum by (tier) ({of('adapter_bytes')})",
              "{{tier}} budget": f"sum by (tier) ({of('adapter_budget_bytes')})"}),
        Chart("Found at once, by tier", "percentunit", {"{{tier}}":
              rate("adapter_cache_lookups_total", "tier", 'result="hit"') + " / "
              + rate("adapter_cache_lookups_total", "tier")},
              "Share of lookups in a tier that found the adapter there."),
        Chart("Swaps", "s", {"{{le}}": rate("adapter_activate_seconds_bucket", "le")},
              "Distribution of load and move durations.", "heat"),
        Chart("Load by stage", "s", {"{{source}} {{stage}}":
              mean("adapter_load_seconds", "source, stage")},
              "Mean of a load's stages."),
        Chart("Evictions by cause", "reqps", {"{{tier}} {{cause}}":
              rate("adapter_evictions_total", "tier, cause")},
              "capacity: evicted to make room; many per request mean thrashing.", "stack"),
        Chart("Top adapters", "reqps", {"{{adapter_name}}":
              f"topk(10, {rate('adapter_requests_total', 'adapter_name')})"},
              "Requests a second of the ten most used.", width=16),
        Chart("Different adapters a step", "short", {"mean": mean("step_adapters")}),
    ),
    "Engine": (
        Chart("Step", "s", {"{{phase}}": mean("step_seconds", "phase")}, "Mean, by phase."),
        Chart("Rows a step", "short", {"mean": mean("step_batch_rows")},
              "Tokens computed at once."),
        Chart("KV blocks", "percentunit", {
              "used": f"avg({of('kv_cache_usage_ratio')})",
              "prefix cache alone": f"avg({of('prefix_cache_usage_ratio')})"}, kind="stack"),
    ),
}  # fmt: skip


def build() -> str:
    """The dashboard as JSON text."""
    built = (
        dashboard.Dashboard("Veneer")
        .uid("veneer")
        .tags(["veneer"])
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("source").label("Source").type("prometheus")
        )
        .with_variable(
            dashboard.QueryVariable("instance")
            .label("Server")
            .datasource(SOURCE)
            .query("label_values(veneer_engine_healthy, instance)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    for title, charts in ROWS.items():
        built = built.with_row(dashboard.Row(title))
        for chart in charts:
            built = built.with_panel(_panel(chart))
    return JSONEncoder(sort_keys=True, indent=2).encode(built.build()) + "\n"


def _panel(chart: Chart) -> stat.Panel | heatmap.Panel | timeseries.Panel:
    panel: stat.Panel | heatmap.Panel | timeseries.Panel
    if chart.kind == "number":
        panel = stat.Panel().height(4)
    elif chart.kind == "heat":
        color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges")
        panel = heatmap.Panel().height(8).color(color).rows_frame(
            heatmap.RowsHeatmapOptions().layout(HeatmapCellLayout.AUTO)
        )  # fmt: skip
    else:
        legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST)
        panel = timeseries.Panel().height(8).min(0).fill_opacity(10)
        panel = panel.legend(legend.placement(LegendPlacement.BOTTOM).show_legend(True))
        if chart.kind == "stack":
            panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    panel = panel.title(chart.title).description(chart.help).unit(chart.unit)
    panel = panel.span(chart.width).datasource(SOURCE)
    for legend_text, promql in chart.queries.items():
        query = prometheus.Dataquery().expr(promql).legend_format(legend_text or "__auto")
        if chart.kind == "heat":
            query = query.format(PromQueryFormat.HEATMAP)
        panel = panel.with_target(query)
    return panel


if __name__ == "__main__":
    TARGET.write_text(build())
