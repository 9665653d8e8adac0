"""Records as text: units, summary lines, tables, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import Enum

from rich.table import Table

from veneer_client.records import AdapterInfo, ServerInfo
from veneer_client.types import GenerationEnd

__all__ = [
    "adapter_rows",
    "adapter_table",
    "as_json",
    "byte_size",
    "info_rows",
    "json_line",
    "summary",
]


def as_json(value: object) -> str:
    """JSON of records, enums by value, times in ISO 8601."""
    return json.dumps(_plain(value), ensure_ascii=False, indent=2)


def json_line(value: object) -> str:
    """The same on one line."""
    return json.dumps(_plain(value), ensure_ascii=False)


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


def summary(end: GenerationEnd) -> str:
    """``queue 2 ms · load 41 ms (disk) · first token 88 ms · 54 tok/s · chat@1a2b…``."""
    place, times = end.provenance, end.provenance.timings
    parts = [f"queue {_ms(times.queue_s)}"]
    if place.tier is not None:
        parts.append(f"load {_ms(times.adapter_load_s)} ({place.tier.value})")
    parts.append(f"first token {_ms(times.time_to_first_token_s)}")
    after_first = times.total_s - times.time_to_first_token_s
    if end.usage.completion_tokens > 1 and after_first > 0:
        parts.append(f"{(end.usage.completion_tokens - 1) / after_first:.0f} tok/s")
    return " · ".join([*parts, place.short])


def _ago(moment: datetime | None) -> str:
    if moment is None:
        return "never"
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def _state(adapter: AdapterInfo) -> str:
    return adapter.tier.value + (" (pinned)" if adapter.pinned else "")


def adapter_table(adapters: Iterable[AdapterInfo]) -> Table:
    """One line for each adapter."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("adapter", "tier", "rank", "size", "in use", "last used", "labels"):
        right = column in ("rank", "size", "in use")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for adapter in adapters:
        table.add_row(
            adapter.short,
            _state(adapter),
            str(adapter.rank),
            byte_size(adapter.size),
            str(adapter.leases),
            _ago(adapter.last_used),
            " ".join(f"{key}={value}" for key, value in adapter.labels.items()),
        )
    return table


def adapter_rows(adapter: AdapterInfo) -> dict[str, str]:
    """Everything about one adapter, as label and text."""
    rows = {
        "adapter": adapter.short,
        "revision": adapter.revision,
        "weights": adapter.weights_digest,
        "base model": adapter.base_model,
        "rank": str(adapter.rank),
        "targets": ", ".join(adapter.targets),
        "parameters": f"{adapter.parameters:,}",
        "size": byte_size(adapter.size),
        "tier": _state(adapter),
        "requests": str(adapter.leases),
        "created": adapter.created.isoformat(timespec="seconds"),
        "last used": _ago(adapter.last_used),
        "chat template": "its own" if adapter.has_chat_template else "the base's",
        "etag": adapter.etag,
    }
    rows |= {f"label {key}": value for key, value in adapter.labels.items()}
    return rows | {f"training {key}": value for key, value in adapter.training.items()}


def info_rows(info: ServerInfo) -> dict[str, str]:
    """Everything about a server, as label and text."""
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
        "device": f"{info.device}, backend {info.backend}",
        "context": f"{info.context_length:,} tokens",
        "adapters": f"{info.adapters_registered} registered, "
        f"{info.adapters_on_device} on the device",
        "adapter memory": f"device {byte_size(budgets.device_adapter_bytes)}, "
        f"host {byte_size(budgets.host_adapter_bytes)}",
        "kv cache": f"{byte_size(budgets.kv_cache_bytes)}, {budgets.kv_cache_tokens:,} tokens",
        "batch": f"{budgets.max_batch_tokens} tokens a step, {budgets.max_running} running, "
        f"{budgets.max_queue} waiting",
        "up": f"{info.uptime_s:.0f} s{restarts}",
    }
    for pool in info.memory.pools:
        uses = " + ".join(f"{name} {byte_size(size)}" for name, size in pool.uses.items())
        rows[f"{pool.name} memory"] = (
            f"{uses} = {byte_size(pool.total)} of {byte_size(pool.limit)}"
        )
    rows["used at most"] = (
        f"front {byte_size(info.memory.front_peak)}, "
        f"engine {byte_size(info.memory.engine_peak)}"
    )
    return rows
