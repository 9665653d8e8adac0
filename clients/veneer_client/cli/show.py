"""Records as text: units, summary lines, tables, JSON."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final

from rich.table import Table
from veneer_registry.adapter import SHORT_REVISION
from veneer_registry.screen import Screen, cell
from veneer_registry.terminal import visible, write_answer

from veneer_client.records import (
    AdapterInfo,
    AdapterState,
    Alias,
    AliasTarget,
    HistoryEntry,
)
from veneer_client.server_records import SelfTest, ServerInfo, UsageReport
from veneer_client.types import Chunk, FinishReason, GenerationEnd

__all__ = [
    "adapter_table",
    "ago",
    "alias_table",
    "as_json",
    "byte_size",
    "count",
    "history_table",
    "info_rows",
    "json_line",
    "place_of",
    "print_rows",
    "print_table",
    "self_test_table",
    "shares",
    "summary",
    "usage_table",
    "write_reasoning",
]

_WIDEST: Final = 10_000
"""Width for output that programs read."""
_REVISION: Final = re.compile(rf"\b([0-9a-f]{{{SHORT_REVISION}}})[0-9a-f]{{52}}\b")
"""A full revision; `SHORT_REVISION` digits are enough for a reader."""


def as_json(value: object) -> str:
    """Records as JSON; enums by value, times in ISO 8601."""
    return visible(json.dumps(_plain(value), ensure_ascii=False, indent=2))


def json_line(value: object) -> str:
    """`as_json` on one line."""
    return visible(json.dumps(_plain(value), ensure_ascii=False))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def count(number: int, noun: str) -> str:
    """``1 adapter``, ``2 adapters``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def byte_size(size: int) -> str:
    """Bytes with a binary unit, for example ``9.4 MiB``."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"


def summary(end: GenerationEnd, *, samples: int = 1) -> str:
    """A summary line: ``queue 2 ms · load 41 ms (disk) · first token 88 ms · 54 tok/s ·
    chat@1a2b…``. It starts with a note if the answer was cut off, or with the number of
    samples and tokens if there are several samples."""
    place, times = end.provenance, end.provenance.timings
    parts = []
    if samples > 1:
        parts.append(f"{samples} samples, {end.usage.completion_tokens} tokens in all")
    elif end.finish_reason is FinishReason.LENGTH:
        parts.append(f"truncated at {end.usage.completion_tokens} tokens (see --max-tokens)")
    parts.append(f"queue {_ms(times.queue_s)}")
    if place.tier is not None:
        parts.append(f"load {_ms(times.adapter_load_s)} ({place.tier.value})")
    parts.append(f"first token {_ms(times.time_to_first_token_s)}")
    after_first = times.total_s - times.time_to_first_token_s
    if end.usage.completion_tokens > 1 and after_first > 0:
        together = " in all" if samples > 1 else ""
        speed = (end.usage.completion_tokens - samples) / after_first
        parts.append(f"{speed:.0f} tok/s{together}")
    return " · ".join([*parts, place.short])


def ago(moment: datetime | None) -> str:
    """``3 min ago``, or ``never``."""
    if moment is None:
        return "never"
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def _columns(*names: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    return table


def place_of(adapter: AdapterInfo) -> str:
    """An adapter's tier and notable state: ``disk (pinned, quarantined)``."""
    notes = ["pinned"] if adapter.pinned else []
    if adapter.tenant:
        notes.append(f"of {adapter.tenant}")
    elif adapter.shared:
        notes.append("shared")
    if adapter.state not in (AdapterState.READY, AdapterState.UNKNOWN):
        notes.append(adapter.state.value.replace("_", " "))
    return adapter.tier.value + (f" ({', '.join(notes)})" if notes else "")


def adapter_table(adapters: Iterable[AdapterInfo]) -> Table:
    """One row per adapter."""
    table = _columns(
        "adapter",
        "tier",
        "rank",
        "size",
        "in use",
        "last used",
        "labels",
        right=("rank", "size", "in use"),
    )
    for adapter in adapters:
        table.add_row(
            cell(adapter.short),
            cell(place_of(adapter)),
            str(adapter.rank),
            byte_size(adapter.size),
            # Only its own tenant may see how much a shared adapter is used.
            "" if adapter.tenant else str(adapter.leases),
            "" if adapter.tenant else ago(adapter.last_used),
            cell(" ".join(f"{key}={value}" for key, value in adapter.labels.items())),
        )
    return table


def shares(targets: Iterable[AliasTarget]) -> str:
    """``1a2b3c4d5e6f``; for several targets ``1a2b3c4d5e6f=90 6f5e4d3c2b1a=10``."""
    found = tuple(targets)
    if len(found) == 1:
        return found[0].revision[:SHORT_REVISION]
    return " ".join(f"{t.revision[:SHORT_REVISION]}={t.weight}" for t in found) or "nothing"


def alias_table(aliases: Iterable[Alias]) -> Table:
    """One row per alias."""
    table = _columns("alias", "revision", "moved", "etag")
    for alias in aliases:
        moved = ago(alias.updated)
        table.add_row(cell(alias.alias), cell(shares(alias.targets)), moved, cell(alias.etag))
    return table


def history_table(entries: Iterable[HistoryEntry]) -> Table:
    """One row per change; times are local."""
    table = _columns("time", "event", "adapter", "by", "from", "detail")
    for entry in entries:
        local = entry.time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        detail = _REVISION.sub(r"\1", entry.detail)
        told = (entry.event, entry.short, entry.actor, entry.peer, detail)
        table.add_row(local, *map(cell, told))
    return table


def self_test_table(test: SelfTest) -> Table:
    """One row per member of the batch."""
    table = _columns(
        "adapter",
        "passed",
        "difference",
        "allowed",
        "to nearest other",
        "detail",
        right=("difference", "allowed", "to nearest other"),
    )
    for result in test.results:
        numbers = (result.max_difference, result.bound, result.nearest_other)
        table.add_row(
            cell(result.adapter or "base"),
            "yes" if result.passed else "NO",
            *(f"{number:.2g}" for number in numbers),
            cell(result.detail),
        )
    return table


def print_table(table: Table) -> None:
    """Print a table, fitted to a terminal's width, or at full width through a pipe."""
    console = Screen(highlight=False)
    if not console.is_terminal:
        unbounded = console.options.update(max_width=_WIDEST)
        console.width = console.measure(table, options=unbounded).maximum
    console.print(table)


def print_rows(rows: dict[str, str]) -> None:
    """Print labels and texts, one pair per line."""
    table: Any = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows.items():
        table.add_row(cell(label), cell(text))
    Screen(highlight=False).print(table)


_LABELS: Final = {"repetition_penalty": "repetition penalty"}
_OFF: Final = {"temperature": None, "top_p": None, "repetition_penalty": 1}
"""Neutral values of defaults, which are not shown; 0 for options not listed."""


def _threads(info: ServerInfo) -> dict[str, str]:
    if not info.threads:
        return {}
    return {"threads": f"{info.threads} ({info.why_threads})"}


def _admin_port(info: ServerInfo) -> dict[str, str]:
    if not info.admin_port:
        return {}
    return {"admin port": "yes: send pushes and all other changes there"}


def _defaults(info: ServerInfo) -> dict[str, str]:
    if (given := info.defaults) is None:
        return {}
    parts = [
        f"{_LABELS.get(name, name.replace('_', '-'))} {value:g}"
        for name, value in dataclasses.asdict(given).items()
        if name != "max_tokens" and value != _OFF.get(name, 0)
    ]
    return {"defaults": ", ".join([*parts, f"{given.max_tokens} tokens"])}


def info_rows(info: ServerInfo) -> dict[str, str]:
    """Everything about a server, as labels and texts."""
    base, budgets = info.base_model, info.budgets
    restarts = (
        "" if info.engine_starts <= 1 else f" (engine started {info.engine_starts} times)"
    )
    rows = {
        "version": info.version,
        "base model": f"{base.name} ({base.architecture}, {base.parameters:,} parameters)",
        "weights": f"{base.quantization}, {byte_size(base.size)}; activations {base.dtype}",
        "fingerprint": f"weights {base.fingerprint.weights[:12]}, "
        f"tokenizer {base.fingerprint.tokenizer[:12]}",
        "device": f"{info.device}, backend {info.backend}"
        + (f" ({info.why_not_native})" if info.why_not_native else ""),
        **_threads(info),
        **_admin_port(info),
        "context": f"{info.context_length:,} tokens",
        **_defaults(info),
        "adapters": f"{info.adapters_registered} registered, "
        f"{info.adapters_on_device} on the device",
        "adapter memory": f"device {byte_size(budgets.device_adapter_bytes)}, "
        f"host {byte_size(budgets.host_adapter_bytes)}",
        "kv cache": f"{byte_size(budgets.kv_cache_bytes)}, {budgets.kv_cache_tokens:,} tokens",
        "batch": f"{budgets.max_batch_tokens} tokens per step ({budgets.max_prefill_tokens} "
        f"prompt tokens while decoding), {budgets.max_running} running, {budgets.max_queue} "
        "waiting",
        "up": f"{info.uptime_s:.0f} s{restarts}",
    }
    for pool in info.memory.pools:
        uses = " + ".join(f"{name} {byte_size(size)}" for name, size in pool.uses.items())
        rows[f"{pool.name} memory"] = (
            f"{uses} = {byte_size(pool.total)} of {byte_size(pool.limit)}"
        )
    rows["peak memory"] = (
        f"front {byte_size(info.memory.front_peak)}, "
        f"engine {byte_size(info.memory.engine_peak)}"
    )
    return rows


def usage_table(report: UsageReport) -> Table:
    """One row per tenant."""
    numbers = ("requests", "prompt tokens", "cached", "new tokens", "stored, GiB-hours")
    table = _columns("tenant", *numbers, right=numbers)
    for each in report.tenants:
        table.add_row(
            cell(each.tenant),
            f"{each.requests:,}",
            f"{each.prompt_tokens:,}",
            f"{each.cached_prompt_tokens:,}",
            f"{each.generated_tokens:,}",
            f"{each.adapter_byte_hours / (1 << 30):,.3f}",
        )
    return table


def write_reasoning(chunk: Chunk) -> None:
    """Write the model's reasoning to standard error: standard output has only the answer."""
    if chunk.reasoning:
        write_answer(sys.stderr, chunk.reasoning)
