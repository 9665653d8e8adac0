"""Numbers and loads as words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from veneer_loadtest.load.spec import AdapterMix, Closed, Lengths, LoadSpec, Open
from veneer_loadtest.results import Distribution, SloLimits

BUSY: Final = 0.25
"""Load average of the last minute / cores above which results are not to be trusted."""

_TAIL: Final = 100
"""With fewer values than this the 99th percentile is only the longest, or nearly."""


def amount(value: float) -> str:
    """Format with three significant digits, or all digits before the point: ``0.53``,
    ``80.9``, ``1,019``."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.1 or not size:
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return f"{value:.2g}"


def ms(milliseconds: float) -> str:
    """Format a time with its unit: milliseconds, or seconds from 10,000 ms on."""
    if milliseconds >= 10_000:
        return f"{milliseconds / 1e3:,.1f} s"
    return f"{amount(milliseconds)} ms"


def share(value: float) -> str:
    """Format a share as ``12.5%``; only 1 is 100%, and only 0 is 0%."""
    text = f"{value:.1%}"
    if text == "100.0%":
        return "100%" if value >= 1 else "above 99.9%"
    if text == "0.0%":
        return "0%" if value <= 0 else "below 0.1%"
    return text.replace(".0%", "%")


def count(number: float, one: str, many: str = "") -> str:
    """Format a count: ``1 request``, ``2 requests``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def bytes_words(size: float) -> str:
    """Format bytes: ``19.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{amount(size)} {unit}"
        size /= 1000
    return f"{amount(size)} TB"


def shortened(text: str, length: int) -> str:
    """Shorten the text to at most ``length`` characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def spread(things: str, values: Distribution) -> str:
    """Say within which time half of ``things`` came, and how long the slowest took."""
    slow = (
        f"one in a hundred took more than {ms(values.p99)}"
        if values.count >= _TAIL
        else f"the slowest of {values.count:,} took {ms(values.max)}"
    )
    return f"half of {things} came within {ms(values.p50)}, {slow}"


def rate_words(rate: float) -> str:
    """Format a rate: ``2.38 requests/s``."""
    return f"{amount(rate)} request{'' if rate == 1 else 's'}/s"


def adapters_words(names: Sequence[str]) -> str:
    """Return the number of adapters, and the first few names."""
    shown = ["the base model" if not name else shortened(name, 40) for name in names[:3]]
    rest = ", …" if len(names) > len(shown) else ""
    return f"{count(len(names), 'adapter')} ({', '.join(shown)}{rest})"


def load_words(load: LoadSpec, rates: Sequence[float] = ()) -> list[str]:
    """Describe a load in sentences; ``rates``: the rates that were tried, if several were."""
    told = [_arrivals(load, rates), _popularity(load.popularity)]
    prompts = "words" if load.text else "random token ids"
    told.append(
        f"Prompts of {_lengths(load.prompt_tokens)} tokens ({prompts}); "
        f"{_lengths(load.tokens)} new tokens each."
    )
    ends = []
    if load.duration_s:
        ends.append(f"after {load.duration_s:g} s")
    if load.requests:
        ends.append(f"after {count(load.requests, 'request')}")
    told.append(f"No request was begun {' or '.join(ends)}." if ends else "Sent completely.")
    if load.warmup_s:
        told.append(f"The first {load.warmup_s:g} s are warm-up and not measured.")
    if load.cancel_share:
        told.append(f"{share(load.cancel_share)} of the clients cancel early.")
    told.append(f"Seed {load.seed}.")
    return told


def _arrivals(load: LoadSpec, rates: Sequence[float]) -> str:
    arrivals = load.arrivals
    if isinstance(arrivals, Closed):
        return (
            f"Closed loop: {count(arrivals.streams, 'stream')}, each sends its next request "
            "when its last one has ended."
        )
    if isinstance(arrivals, Open):
        kinds = {0.0: "evenly spaced", 1.0: "a Poisson process"}
        kind = kinds.get(arrivals.cv, f"Gamma arrivals with CV {arrivals.cv:g}")
        if rates:
            tried = f"{len(rates)} rates from {amount(min(rates))} to {rate_words(max(rates))}"
            return f"Open loop, {kind}: {tried} were tried."
        return f"Open loop: {rate_words(arrivals.rate)} on average, {kind}."
    speed = "" if arrivals.speed == 1 else f", {arrivals.speed:g} times as fast"
    return f"Replay of {arrivals.path}{speed}."


def _popularity(popularity: AdapterMix) -> str:
    if popularity.kind == "identical":
        return "All requests use the first adapter."
    return f"Adapters are requested with {popularity} popularity."


def _lengths(lengths: Lengths) -> str:
    if lengths.mean:
        return (
            f"{lengths.mean:g} (mean; log-normal, CV {lengths.cv:g}, at most {lengths.high:,})"
        )
    if lengths.low == lengths.high:
        return f"{lengths.low:,}"
    return f"{lengths.low:,} to {lengths.high:,}"


def limits_words(limits: SloLimits) -> str:
    """Format limits: ``first token within 500 ms, ...``."""
    named = (
        ("first token within", limits.ttft_ms),
        ("mean time between tokens within", limits.tpot_ms),
        ("whole request within", limits.e2e_ms),
    )
    return ", ".join(f"{name} {ms(limit)}" for name, limit in named if limit is not None)


def load_average(conditions: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the load averages of 1, 5 and 15 minutes, or nothing if the file has none."""
    found = conditions.get("load_average")
    if not isinstance(found, Sequence) or isinstance(found, str):
        return ()
    return tuple(float(each) for each in found if isinstance(each, int | float))


def machine_words(conditions: Mapping[str, Any]) -> str:
    """Describe the machine: CPU, cores, memory, system."""
    memory = conditions.get("memory_bytes")
    parts = [
        str(conditions.get("cpu") or "CPU unknown"),
        f"{conditions['cores']} cores" if "cores" in conditions else "",
        f"{memory / 2**30:.1f} GiB memory" if isinstance(memory, int | float) else "",
        str(conditions.get("system", "")),
    ]
    return ", ".join(part for part in parts if part)
