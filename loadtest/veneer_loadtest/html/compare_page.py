"""The page of ``compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer_loadtest.html import tables
from veneer_loadtest.html.cautions import FEW, Banner, conditions_banners, few_samples
from veneer_loadtest.html.columns import name_of
from veneer_loadtest.html.document import document
from veneer_loadtest.html.drawing import COLOURS, INK, PAPER, Plot, canvas, from_zero, svg_of
from veneer_loadtest.html.words import amount, count, ms
from veneer_loadtest.results import CompareLevel, CompareResult, Ratio, SystemFigures

_HATCHES = ("", "///", "\\\\\\", "--", "xx")


@dataclass(frozen=True, slots=True)
class _Shown:
    """One result's part of the page."""

    name: str
    plots: Sequence[Plot]
    figures: tables.ReportTable
    systems: tables.ReportTable


def compare_page(results: Sequence[CompareResult], names: Sequence[str] = ()) -> str:
    """The whole document; several results one after the other."""
    alone = len(results) == 1
    told = ["" if alone else name_of(results, n, names) for n in range(len(results))]
    name = name_of(results, 0, names) if alone else ""
    return document(
        "compare",
        "Veneer compared with other systems" + (f": {name}" if name else ""),
        [line for r, n in zip(results, told, strict=True) for line in _lede(r, n)],
        [
            *conditions_banners(results, names),
            *(banner for result in results for banner in _disturbed(result)),
            *(banner for result in results for banner in _few(result)),
        ],
        facts=tables.plain_facts(results, told, [_workload(result) for result in results]),
        results=[
            _Shown(
                name=own,
                plots=_plots(result, number),
                figures=_figures_table(result),
                systems=_systems_table(result),
            )
            for number, (result, own) in enumerate(zip(results, told, strict=True))
        ],
    )


def _plots(result: CompareResult, number: int) -> list[Plot]:
    """Return no plots if nothing was measured."""
    return [_throughput(result, number), _latency(result, number)] if result.levels else []


def _disturbed(result: CompareResult) -> list[Banner]:
    rounds = sum(level.disturbed for level in result.levels)
    if not rounds:
        return []
    text = f"{count(rounds, 'round')} began while the machine was busy with something else."
    return [Banner("warn", "Disturbed:", text)]


def _few(result: CompareResult) -> list[Banner]:
    each = result.workload.get("tokens")
    if not isinstance(each, int) or each < 1:
        return []
    told = []
    for level in result.levels:
        tokens = min(sum(r.tokens for r in own.rounds) for own in level.systems.values())
        if (requests := tokens // each) < FEW:
            told.append(f"{count(requests, 'request')} of a system at {level.title}")
    return [few_samples(", ".join(told), "--repeat")] if told else []


def _workload(result: CompareResult) -> str:
    work = result.workload
    adapters = work.get("adapters") or []
    return (
        f"{len(adapters)} adapters, {work.get('popularity')}, prompts of "
        f"{work.get('prompt_tokens')} tokens, {work.get('tokens')} new ones; "
        f"{work.get('repeat')} rounds, {work.get('threads')} threads each, seed "
        f"{work.get('seed')}; {work.get('sampling')}"
    )


def _lede(result: CompareResult, name: str) -> list[str]:
    lines = []
    for level in result.levels:
        parts = [_ratio_words(level, peer, ratio) for peer, ratio in level.ratios.items()]
        subject = "Veneer's first token comes" if level.rate else "Veneer is"
        told = f"{level.title}: {subject} {', '.join(parts)}."
        lines.append(f"{name}: {told}" if name else told)
    return lines


def _ratio_words(level: CompareLevel, peer: str, ratio: Ratio) -> str:
    how, of = ("soon", f"{peer}'s") if level.rate else ("fast", peer)
    if ratio.ranges_overlap:
        return f"as {how} as {of}"
    return f"{ratio.ratio:.2f} times as {how} as {of}"


def _throughput(result: CompareResult, number: int) -> Plot:
    title = "Output tokens a second"
    with canvas(1, len(result.levels), 3.2) as (figure, axes):
        for axis, level in zip(axes[0], result.levels, strict=True):
            for place, (_, own) in enumerate(level.systems.items()):
                rate = own.tokens_per_s
                axis.bar(
                    place, rate.median, 0.7, color=COLOURS[place], alpha=0.75,
                    hatch=_HATCHES[place % len(_HATCHES)], edgecolor=PAPER,
                )  # fmt: skip
                axis.plot([place] * 2, [rate.low, rate.high], color=INK, linewidth=1.2)
                axis.annotate(
                    amount(rate.median), (place, rate.high), xytext=(0, 3),
                    textcoords="offset points", ha="center", fontsize=8,
                )  # fmt: skip
            _systems_axis(axis, level)
            from_zero(axis, "tokens/s", room=1.12)
        svg = svg_of(figure, f"rate{number}", title)
    lines = [_ratios(level) for level in result.levels if not level.rate]
    if lines:
        lines.insert(0, "Veneer's tokens/s / each peer's; above 1 Veneer is better:")
    if any(level.rate for level in result.levels):
        lines.append("In an open loop the request rate limits tokens/s: compare first tokens.")
    rounds = min(len(own.rounds) for lv in result.levels for own in lv.systems.values())
    note = "Bars: medians; lines: ranges of the rounds." if rounds > 1 else "Bars: one round."
    return Plot(title, "\n".join([*lines, note]), svg)


def _ratios(level: CompareLevel) -> str:
    told = ", ".join(
        f"{ratio.ratio:.2f} x {peer} ({ratio.low:.2f} to {ratio.high:.2f}"
        + (", ranges overlap)" if ratio.ranges_overlap else ")")
        for peer, ratio in level.ratios.items()
    )
    return f"{level.title}: {told}."


def _latency(result: CompareResult, number: int) -> Plot:
    title = "First token, and from one token to the next"
    with canvas(2, len(result.levels), 5.2) as (figure, axes):
        for row, (field, what) in enumerate(
            (("first_token_ms", "first token, ms"), ("inter_token_ms", "between tokens, ms"))
        ):
            for axis, level in zip(axes[row], result.levels, strict=True):
                _ends_bars(axis, level, field)
                _systems_axis(axis, level)
                from_zero(axis, what, room=1.14)
        svg = svg_of(figure, f"latency{number}", title)
    last = result.levels[-1]
    slowest = max(last.systems.items(), key=lambda item: item[1].first_token_ms.p50)
    fastest = min(last.systems.items(), key=lambda item: item[1].first_token_ms.p50)
    lines = [_ratios(level) for level in result.levels if level.rate]
    if lines:
        lines.insert(0, "Each peer's median first token / Veneer's; above 1 Veneer is better:")
    lines += [
        f"At {last.title} half of the first tokens of {fastest[0]} came within "
        f"{ms(fastest[1].first_token_ms.p50)}, of {slowest[0]} within "
        f"{ms(slowest[1].first_token_ms.p50)}.",
        "Narrow: p50; wide: p99 (p50 / p99, ms).",
    ]
    return Plot(title, "\n".join(lines), svg)


def _ends_bars(axis: Any, level: CompareLevel, field: str) -> None:
    for place, own in enumerate(level.systems.values()):
        ends = getattr(own, field)
        axis.bar(place, ends.p99, 0.74, color=COLOURS[place], alpha=0.3)
        axis.bar(place, ends.p50, 0.4, color=COLOURS[place])
        axis.annotate(
            f"{amount(ends.p50)} / {amount(ends.p99)}", (place, max(ends.p99, ends.p50)),
            xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7,
        )  # fmt: skip


def _systems_axis(axis: Any, level: CompareLevel) -> None:
    axis.set_title(level.title)
    axis.set_xticks(range(len(level.systems)), [n.replace("-", "-\n") for n in level.systems])
    axis.grid(axis="x", visible=False)


def _figures_table(result: CompareResult) -> tables.ReportTable:
    head = ["load, system", "tokens/s", "range", "first token p50", "p99"]
    head += ["between tokens p50", "p99", "ratio"]
    rows = [
        [f"{level.title}, {name}", *_figures(own), _ratio_cell(level.ratios.get(name))]
        for level in result.levels
        for name, own in level.systems.items()
    ]
    return tables.ReportTable(head, rows)


def _figures(own: SystemFigures) -> list[str]:
    rate = own.tokens_per_s
    return [
        amount(rate.median),
        f"{amount(rate.low)} to {amount(rate.high)}",
        ms(own.first_token_ms.p50),
        ms(own.first_token_ms.p99),
        ms(own.inter_token_ms.p50),
        ms(own.inter_token_ms.p99),
    ]


def _ratio_cell(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.ratio:.2f}" + (" (ranges overlap)" if ratio.ranges_overlap else "")


def _systems_table(result: CompareResult) -> tables.ReportTable:
    rows = []
    for name, facts in result.systems.items():
        versions = ", ".join(f"{k} {v}" for k, v in facts.versions.items())
        rows.append([name, facts.command, versions, _gate(result, name)])
    return tables.ReportTable(
        ["system", "command", "versions", "gate"], rows, kind="facts wide"
    )


def _gate(result: CompareResult, name: str) -> str:
    if name in result.peer_gates:
        gate = result.peer_gates[name]
        told = f"misses PEFT's likeliest tokens by {gate.regret:.3f} nats a token"
        if gate.other_regret is None:
            return told
        return (
            f"{told}, under other adapters by {gate.other_regret:.2f}; {gate.own_best} of "
            f"{gate.answers} answers are likeliest under their own"
        )
    if name == "peft":
        return "the reference"
    own = result.gate
    return f"log-probabilities {own.mean:.3f} nats from PEFT's (allowed {own.mean_bound})"
