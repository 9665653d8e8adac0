"""The page of ``swap``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from veneer_loadtest.html import tables
from veneer_loadtest.html.cautions import FEW, Banner, conditions_banners, few_samples
from veneer_loadtest.html.columns import MOST_DRAWN, name_of
from veneer_loadtest.html.document import document
from veneer_loadtest.html.drawing import (
    COLOURS,
    GREY,
    INK,
    MARKERS,
    Plot,
    canvas,
    from_zero,
    named_legend,
    svg_of,
)
from veneer_loadtest.html.words import bytes_words, count, ms
from veneer_loadtest.results import CaseFigures, ChurnFigures, SwapResult

CASES: Final = {
    "same": "same adapter",
    "device": "another,\nin DEVICE",
    "host": "another,\nin HOST",
    "disk": "another, on DISK,\nin page cache",
    "disk_cold": "another,\non DISK",
    "publish": "new, just\nuploaded",
}
_PHASES: Final = {
    "quiet_ms": "without uploads or loads",
    "inside_ms": "during an upload or load",
    "outside_ms": "between those",
}


def swap_page(results: Sequence[SwapResult], names: Sequence[str] = ()) -> str:
    """The whole document."""
    alone = len(results) == 1
    told = ["" if alone else name_of(results, n, names) for n in range(len(results))]
    name = name_of(results, 0, names) if alone else ""
    pairs = list(zip(results, told, strict=True))
    return document(
        "swap",
        "What a swap of adapters costs" + (f": {name}" if name else ""),
        [_lede(result, name) for result, name in pairs],
        conditions_banners(results, names) + _few(results, told),
        facts=tables.plain_facts(results, told, [_workload(result) for result in results]),
        plots=[_first_tokens(results, told), _churn(results, told)],
        cases=[_cases_table(result, name) for result, name in pairs],
        churns=[_churn_table(result, name) for result, name in pairs],
    )


def _few(results: Sequence[SwapResult], names: Sequence[str]) -> list[Banner]:
    found = []
    for result, name in zip(results, names, strict=True):
        of = f" of {name}" if name else ""
        least = min((len(own.samples_ms) for own in result.cases.values()), default=FEW)
        if least < FEW:
            found.append(few_samples(f"{count(least, 'request')} a case{of}", "--samples"))
        if (churn := result.churn) is not None and churn.publishes < FEW:
            text = f"{count(churn.publishes, 'adapter')} {churn.by}ed while streams run{of}"
            found.append(few_samples(text, "--churn"))
    return found


def _lede(result: SwapResult, name: str) -> str:
    found = result.summary
    if not found:
        return f"{name}: nothing was measured." if name else "Nothing was measured."
    told = (f"{name}: " if name else "") + (
        f"the median first token takes {ms(found['first_token_ms'])}; another adapter adds "
        f"{found['device_delta_ms']:.1f} ms from DEVICE, {found['host_delta_ms']:.1f} ms from "
        f"HOST, {found['disk_delta_ms']:.1f} ms from DISK; from an acknowledged upload it "
        f"takes {ms(found['publish_to_first_token_ms'])}."
    )
    return told[0].upper() + told[1:]


def _workload(result: SwapResult) -> str:
    work = result.workload
    return (
        f"adapters of rank {work['rank']} ({bytes_words(work['adapter_bytes'])}), prompts of "
        f"{work['prompt_tokens']} tokens, {count(work['samples'], 'round')}, "
        f"{count(work['threads'], 'thread')}, seed {work['seed']}"
    )


def _cases(results: Sequence[SwapResult]) -> list[str]:
    return [case for case in CASES if any(case in result.cases for result in results)]


def _first_tokens(results: Sequence[SwapResult], names: Sequence[str]) -> Plot:
    title = "First token by where the adapter was"
    cases = _cases(results)
    if not cases:
        return Plot(title, "Nothing was measured.")
    with canvas(1, 1, 3.6) as (figure, axes):
        axis = axes[0][0]
        drawn = results[:MOST_DRAWN]
        for number, result in enumerate(drawn):
            for place, case in enumerate(cases):
                if case in result.cases:
                    _strip(axis, place, number, len(drawn), result.cases[case])
        axis.set_xticks(range(len(cases)), [CASES[case] for case in cases])
        axis.grid(axis="x", visible=False)
        axis.set_xlim(-0.6, len(cases) - 0.4)
        from_zero(axis, "ms", room=1.12)
        named_legend(figure, names)
        svg = svg_of(figure, "swap", title)
    return Plot(title, _first_tokens_caption(results, names), svg)


def _strip(axis: Any, place: int, number: int, of: int, case: CaseFigures) -> None:
    """Draw every sample as a mark, and the median as a line with its value."""
    width = 0.7 / of
    middle = place - 0.35 + width * (number + 0.5)
    samples = case.samples_ms
    spread = [middle + width * 0.7 * ((i * 0.618) % 1 - 0.5) for i in range(len(samples))]
    axis.scatter(
        spread, samples, s=9, color=COLOURS[number], marker=MARKERS[number], alpha=0.45,
        linewidths=0,
    )  # fmt: skip
    p50 = case.first_token_ms.p50
    axis.plot([middle - width * 0.42, middle + width * 0.42], [p50, p50], color=INK)
    if of <= 2:
        axis.annotate(
            f"{p50:.0f}", (middle + width * 0.44, p50), va="center", fontsize=8, color=GREY
        )


def _first_tokens_caption(results: Sequence[SwapResult], names: Sequence[str]) -> str:
    lines = []
    for result, name in zip(results, names, strict=True):
        deltas = [
            f"{figures.delta_ms.p50:+.1f} ms {CASES[case].replace(chr(10), ' ')}"
            for case, figures in result.cases.items()
            if case != "same"
        ]
        if deltas:
            lines.append(
                (f"{name}: " if name else "") + "Median added: " + "; ".join(deltas) + "."
            )
    return "\n".join([*lines, "A mark is one request; a line is the median, labelled in ms."])


def _churn(results: Sequence[SwapResult], names: Sequence[str]) -> Plot:
    title = "Time between tokens of running streams, with uploads or loads"
    told = [(r.churn, n) for r, n in zip(results, names, strict=True) if r.churn is not None]
    if not told:
        return Plot(title, "No adapter was uploaded or loaded while streams ran (--churn 0).")
    with canvas(1, 1, 3.4) as (figure, axes):
        axis = axes[0][0]
        for number, (churn, _) in enumerate(told[:MOST_DRAWN]):
            width = 0.8 / len(told)
            for place, field in enumerate(_PHASES):
                spread = getattr(churn, field)
                if spread is None:
                    continue
                at = place - 0.4 + width * (number + 0.5)
                axis.bar(at, spread.p99, width * 0.9, color=COLOURS[number], alpha=0.35)
                axis.bar(at, spread.p50, width * 0.45, color=COLOURS[number])
                axis.plot([at], [spread.high], marker="_", color=INK, markersize=12)
                axis.annotate(
                    f"{spread.p50:.0f} / {spread.p99:.0f} / {spread.high:.0f}",
                    (at, spread.high), xytext=(0, 4), textcoords="offset points",
                    ha="center", fontsize=8,
                )  # fmt: skip
        axis.set_xticks(range(len(_PHASES)), list(_PHASES.values()))
        axis.grid(axis="x", visible=False)
        from_zero(axis, "ms", room=1.15)
        named_legend(figure, [name for _, name in told])
        svg = svg_of(figure, "churn", title)
    lines = [(f"{name}: " if name else "") + _churn_words(churn) for churn, name in told]
    lines.append("Narrow: p50; wide: p99; a dash: the longest (p50 / p99 / longest, ms).")
    return Plot(title, "\n".join(lines), svg)


def _churn_words(churn: ChurnFigures) -> str:
    return (
        f"{count(churn.streams, 'stream')}, {count(churn.publishes, 'adapter')} {churn.by}ed, "
        "at most one a second: between tokens p99 "
        f"{ms(churn.inside_ms.p99)} during {churn.by}s, {ms(churn.quiet_ms.p99)} without; the "
        f"longest wait was {ms(churn.longest_ms)}, {churn.steps:.1f} median steps."
    )


def _cases_table(result: SwapResult, name: str) -> tables.ReportTable:
    rows = [
        [
            CASES[case].replace("\n", " "),
            ms(own.first_token_ms.p50),
            ms(own.first_token_ms.p99),
            f"{ms(own.first_token_ms.low)} to {ms(own.first_token_ms.high)}",
            f"{own.delta_ms.p50:+.1f} ms" if case != "same" else "",
            f"{own.delta_ms.low:+.1f} to {own.delta_ms.high:+.1f} ms" if case != "same" else "",
            ms(own.load_ms.p50),
        ]
        for case, own in result.cases.items()
    ]
    head = [name, "p50", "p99", "range", "added, p50", "added, range", "load, p50"]
    return tables.ReportTable(head, rows)


def _churn_table(result: SwapResult, name: str) -> tables.ReportTable | None:
    churn = result.churn
    if churn is None:
        return None
    rows = [
        [words, ms(each.p50), ms(each.p99), ms(each.high)]
        for words, each in (
            (f"between tokens, without {churn.by}s", churn.quiet_ms),
            (f"during {churn.by}s", churn.inside_ms),
            (f"between {churn.by}s", churn.outside_ms),
            (f"{churn.by} until in DEVICE", churn.publish_ms),
        )
        if each is not None
    ]
    return tables.ReportTable([name, "p50", "p99", "longest"], rows)
