"""The key figures of a run, and limits on them for scripts."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from veneer_loadtest.errors import BadOption
from veneer_loadtest.results import Distribution, Level, SloLimits

KEYS: Final = (
    "requests_per_s",
    "tokens_per_s",
    "first_token_p50_ms",
    "first_token_p99_ms",
    "inter_token_p50_ms",
    "inter_token_p99_ms",
    "end_to_end_p50_ms",
    "end_to_end_p99_ms",
    "queue_p50_ms",
    "queue_p99_ms",
    "first_token_max_ms",
    "device_hit_share",
    "host_hit_share",
    "disk_share",
    "error_share",
    "slo_share",
    "goodput_per_s",
    "late_p99_ms",
    "lost",
    "requests_ratio",
    "tokens_ratio",
)
"""Keys of a run's summary; a figure without data is left out."""


def summary(level: Level, first: Level | None = None) -> dict[str, float]:
    """Return the figures named in `KEYS`.

    Args:
        first: the level to compare with: ``*_ratio`` are this level's requests and tokens per
            second divided by those of ``first``.
    """
    told = level.requests.ok + level.requests.failed
    base = first if first is not level else None
    found: dict[str, float | None] = {
        "requests_per_s": level.requests_per_s,
        "tokens_per_s": level.tokens_per_s,
        **_ends("first_token", level.first_token_ms),
        **_ends("inter_token", level.inter_token_ms),
        **_ends("end_to_end", level.end_to_end_ms),
        **_ends("queue", level.queue_ms),
        "first_token_max_ms": level.first_token_ms.max if level.first_token_ms else None,
        **found_in(level),
        "error_share": level.requests.failed / told if told else None,
        "slo_share": level.slo.share if level.slo else None,
        "goodput_per_s": level.slo.goodput_per_s if level.slo else None,
        "late_p99_ms": level.generator.late_p99_ms,
        "lost": float(level.generator.lost),
        "requests_ratio": _ratio(level.requests_per_s, base.requests_per_s if base else None),
        "tokens_ratio": _ratio(level.tokens_per_s, base.tokens_per_s if base else None),
    }
    return {key: value for key in KEYS if (value := found[key]) is not None}


def _ratio(value: float, by: float | None) -> float | None:
    return value / by if by else None


def found_in(level: Level) -> dict[str, float | None]:
    """Return the shares of requests with an adapter, by the tier in which it was found."""
    tiers = {"device": "device_hit_share", "host": "host_hit_share", "disk": "disk_share"}
    counts = {tier: level.by_tier[tier].requests for tier in tiers if tier in level.by_tier}
    of = sum(counts.values())
    return {key: counts.get(tier, 0) / of if of else None for tier, key in tiers.items()}


def _ends(name: str, values: Distribution | None) -> dict[str, float | None]:
    return {
        f"{name}_p50_ms": values.p50 if values else None,
        f"{name}_p99_ms": values.p99 if values else None,
    }


_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}


@dataclass(frozen=True, slots=True)
class FailLimit:
    """A condition under which a script should fail, such as ``first_token_p99_ms>500``."""

    text: str
    key: str
    sign: str
    value: float

    def holds(self, figures: Mapping[str, float]) -> bool:
        """Return whether the condition holds; True too if the figure was not measured."""
        figure = figures.get(self.key)
        return (
            figure is None
            or not math.isfinite(figure)
            or _COMPARE[self.sign](figure, self.value)
        )


def parse_limit(text: str, keys: Sequence[str] = KEYS) -> FailLimit:
    """Parse a ``--fail-if`` condition.

    Raises:
        BadOption: the text is not a condition, or its figure is not in the summary.
    """
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*", text)
    try:
        value = float(found[3]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or math.isnan(value):
        raise BadOption(
            f"--fail-if {text!r}: give a figure of the summary, a sign and a number, such as "
            f"'{keys[0]}<1'",
            metadata={"field": "--fail-if"},
        )
    if found[1] not in keys:
        raise BadOption(
            f"--fail-if {text!r}: the summary has {', '.join(keys)}",
            metadata={"field": "--fail-if", "figure": found[1]},
        )
    return FailLimit(text, found[1], found[2], value)


_UNITS: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


def parse_seconds(option: str, text: str) -> float:
    """Parse ``500ms``, ``30s``, ``5m``, ``1h``, or a number of seconds without a unit.

    Raises:
        BadOption: anything else.
    """
    found = re.fullmatch(r"([0-9.]+)(ms|s|m|h|)", text.strip())
    try:
        return float(found[1]) * _UNITS[found[2]] if found else _bad_time(option, text)
    except ValueError:
        return _bad_time(option, text)


def _bad_time(option: str, text: str) -> float:
    raise BadOption(
        f"{option} {text!r}: give a time such as 500ms, 30s or 5m", metadata={"field": option}
    )


def parse_slo(text: str) -> SloLimits:
    """Parse limits such as ``ttft=500ms,tpot=50ms,e2e=10s``; each is optional.

    Raises:
        BadOption: anything else.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = part.strip().partition("=")
        if name not in ("ttft", "tpot", "e2e") or not sign:
            raise BadOption(
                f"--slo {text!r}: give limits of ttft (first token), tpot (mean time between "
                "tokens) and e2e (whole request), such as ttft=500ms,tpot=50ms",
                metadata={"field": "--slo"},
            )
        limits[f"{name}_ms"] = parse_seconds("--slo", value) * 1e3
    return SloLimits(**limits)
