"""Write each request of a load as a row of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from veneer_registry.replacing import replacing

from veneer_loadtest.load.records import Record

COLUMNS: Final = (
    "adapters", "index", "adapter", "revision", "tier", "outcome", "reason", "warm_up",
    "due_s", "sent_s", "first_token_ms", "end_to_end_ms", "queue_ms", "load_ms",
    "inter_token_mean_ms", "inter_token_max_ms", "prompt_tokens", "cached_tokens", "tokens",
)  # fmt: skip
"""``adapters``: number of adapters of the level. Times in ``*_ms`` count from the due time."""


def write_csv(path: Path, levels: Iterable[tuple[int, float, Iterable[Record]]]) -> None:
    """Write ``levels`` (number of adapters, seconds of warm-up, records) atomically."""
    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for adapters, warmup_s, records in levels:
            for record in sorted(records, key=lambda each: each.index):
                writer.writerow(_row(adapters, warmup_s, record))


def _row(adapters: int, warmup_s: float, record: Record) -> list[object]:
    gaps = record.gap_values()
    return [
        adapters,
        record.index,
        record.adapter,
        record.revision,
        record.tier,
        record.outcome,
        record.reason,
        int(record.due_s < warmup_s),
        f"{record.due_s:.6f}",
        f"{record.sent_s:.6f}",
        _ms(record.first_token_s),
        _ms(record.whole_s),
        _ms(record.queue_s),
        _ms(record.load_s),
        _ms(sum(gaps) / len(gaps) if gaps else None),
        _ms(max(gaps, default=None)),
        record.prompt_tokens,
        record.cached,
        record.tokens,
    ]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"
