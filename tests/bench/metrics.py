"""Measure what metrics cost the front process: ``python -m tests.bench.metrics``.

Prints the microseconds for one step's events and tokens, and for a scrape with many resident
adapters. The rest of a step runs in another process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import generate_latest
from veneer_server.telemetry.metrics import Metrics
from veneer_server.wire.messages import Occupancy, ResidencyChanged, StepDone

STEPS = 2000
SCRAPES = 50


class Names:
    """FAKE registry: every content has one name, since only named contents have a series."""

    def __contains__(self, name: object) -> bool:
        return True

    def __len__(self) -> int:
        return 200

    def names(self, weights_digest: str) -> Iterable[str]:
        return (f"adapter-{int(weights_digest, 16)}",)


def main() -> None:
    metrics = Metrics()
    for rows in (1, 8, 32, 64):
        start = time.perf_counter()
        for step in range(STEPS):
            metrics.on_event(StepDone(step, 0.02, 0, rows, rows))
            metrics.on_event(Occupancy(rows, 0, 10, 90, rows))
            for _ in range(rows):
                metrics.inter_token.observe(0.02)
                metrics.generation_tokens.inc(1)
        took = (time.perf_counter() - start) / STEPS
        print(f"{rows} rows: {took * 1e6:.0f} us a step")
    metrics.ask(Names())
    for adapters in (0, 50, 200):
        for number in range(adapters):
            digest = f"{number:064x}"
            metrics.on_event(
                ResidencyChanged(digest, "device", False, 10, 20, 10, adapters, adapters)
            )
        start = time.perf_counter()
        for _ in range(SCRAPES):
            generate_latest(metrics.registry)
        took = (time.perf_counter() - start) / SCRAPES
        print(f"{adapters} adapters: {took * 1e3:.1f} ms a scrape")


if __name__ == "__main__":
    main()
