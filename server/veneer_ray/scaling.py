"""Autoscaling: the number of engines, from waiting requests and KV cache use.

Serve's own policy counts requests, whatever they cost. An engine's figures are better: while
its KV cache has room and nothing waits, more requests only make its batch larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

WAITING: Final = "veneer_waiting"
"""Name of the statistic: one engine's sequences that have no token yet."""
KV: Final = "veneer_kv"
"""Name of the statistic: used share of one engine's KV cache, 0 to 1."""

_KV_TARGET: Final = 0.7
_WAITING_TARGET: Final = 2.0
"""Sequences that may wait at an engine: they start with one of its next steps."""
_QUIET: Final = 0.5
"""An engine is removed if the others then stay below this share of both targets."""


def engines_wanted(current: int, waiting: float, kv: float) -> int:
    """Return the number of engines to run, from sums over all engines.

    Args:
        current: number of running engines.
        waiting: sequences that wait in them.
        kv: sum of the used shares of their KV caches.
    """
    if current == 0:
        return 1
    load = max(kv / _KV_TARGET, waiting / _WAITING_TARGET)
    if load > current:
        return min(math.ceil(load), 2 * current)  # at most doubled, as loads lag behind
    if current > 1 and load <= _QUIET * (current - 1):
        return current - 1
    return current


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """The policy for Serve's autoscaler, which applies its own delays and bounds."""
    metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    wanted = engines_wanted(
        context.current_num_replicas,
        sum(metrics.get(WAITING, {}).values()),
        sum(metrics.get(KV, {}).values()),
    )
    return wanted, {}
