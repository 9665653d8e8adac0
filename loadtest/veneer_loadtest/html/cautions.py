"""Warnings shown before any figure: why results may be misleading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from veneer_loadtest.html.columns import ReportColumn, name_of
from veneer_loadtest.html.words import BUSY, amount, count, load_average, ms
from veneer_loadtest.results import LoadResult, Result

FEW: Final = 10
"""With fewer samples than this a percentile means next to nothing."""

_LATE_MS: Final = 10.0
"""A generator that sends later than this has measured itself."""


@dataclass(frozen=True, slots=True)
class Banner:
    """A warning. ``bad``: the figures do not answer the question; ``warn``: they may be
    inaccurate."""

    kind: Literal["bad", "warn", "good"]
    head: str
    text: str


def banners(
    results: Sequence[LoadResult], columns: Sequence[ReportColumn], names: Sequence[str] = ()
) -> list[Banner]:
    """All banners, the worst first."""
    found = conditions_banners(results, names)
    for column in columns:
        of = f" ({column.short})" if len(columns) > 1 else ""
        found += _generator(column, of) + _counts(column, of)
    found += _few(columns)
    agree = [column.level.server.agrees for column in columns if column.level.server]
    if agree and all(agree):
        text = (
            "the server counted as many requests, prompt tokens and new tokens as the client."
        )
        found.append(Banner("good", "Counts agree:", text))
    order = ("bad", "warn", "good")
    return sorted(found, key=lambda banner: order.index(banner.kind))


def conditions_banners(results: Sequence[Result], names: Sequence[str] = ()) -> list[Banner]:
    """Problems that results of any kind can have: an early end, a busy machine."""
    found: list[Banner] = []
    for number, result in enumerate(results):
        of = f" ({name_of(results, number, names)})" if len(results) > 1 else ""
        if result.partial:
            why = result.why or "no reason was recorded"
            found.append(
                Banner("bad", f"Partial{of}:", f"{why}. The figures cover what had ended.")
            )
        found += _busy(result, of)
    return found


def _busy(result: Result, of: str) -> list[Banner]:
    average = load_average(result.conditions)
    cores = result.conditions.get("cores")
    if not average or not isinstance(cores, int) or average[0] / max(cores, 1) <= BUSY:
        return []
    text = (
        f"the load average of the minute before was {amount(average[0])} on "
        f"{count(cores, 'core')}: other work was using the machine, so figures are worse than "
        "on an idle one."
    )
    return [Banner("warn", f"Busy machine{of}:", text)]


def _generator(column: ReportColumn, of: str) -> list[Banner]:
    found = []
    generator = column.level.generator
    if generator.lost:
        text = f"no result arrived for {count(generator.lost, 'request')} that were sent."
        found.append(Banner("bad", f"Requests lost{of}:", text))
    if generator.late_p99_ms > _LATE_MS:
        text = (
            f"one request in a hundred was sent more than {ms(generator.late_p99_ms)} after "
            f"it was due (the latest {ms(generator.late_max_ms)}). Times count from when a "
            "request was due, so they are too long by that; give more --workers, or another "
            "machine."
        )
        found.append(Banner("warn", f"The generator was late{of}:", text))
    return found


def _few(columns: Sequence[ReportColumn]) -> list[Banner]:
    told = []
    for column in columns:
        first = column.level.first_token_ms
        if first is None or first.count < FEW:
            got = count(0 if first is None else first.count, "first token")
            told.append(f"{got} of {column.short}" if len(columns) > 1 else got)
    return [few_samples(", ".join(told), "--duration or --requests")] if told else []


def few_samples(what: str, flag: str) -> Banner:
    """Return the banner for figures of fewer than `FEW` samples.

    Args:
        what: the number of samples, and of what, such as ``3 requests``.
        flag: the option that gives more samples.
    """
    text = (
        f"{what}. With fewer than {FEW} a median is rough, and p90 and p99 are no more than "
        f"the longest: give a larger {flag}."
    )
    return Banner("warn", "Few samples:", text)


def _counts(column: ReportColumn, of: str) -> list[Banner]:
    server, own = column.level.server, column.level.totals
    if server is None or server.agrees is not False:
        return []
    text = (
        f"the server counted {server.requests:,} requests, {server.prompt_tokens:,} prompt "
        f"tokens and {server.tokens:,} new tokens; the client {own.requests:,}, "
        f"{own.prompt_tokens:,} and {own.tokens:,}. Did others use the server?"
    )
    return [Banner("bad", f"Counts disagree{of}:", text)]
