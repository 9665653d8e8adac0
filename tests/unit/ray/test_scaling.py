"""How many engines a load wants."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from veneer_ray.scaling import KV, WAITING, engines_wanted, policy


@pytest.mark.parametrize(
    ("current", "waiting", "kv", "wanted"),
    [
        (2, 0, 0.9, 2),  # neither full nor idle
        (2, 0, 1.9, 3),  # the KV caches are
        (2, 7, 0.2, 4),  # sequences wait
        (1, 100, 0, 2),  # at most twice as many at once
        (3, 0, 0.2, 2),  # one fewer at a time
        (1, 0, 0, 1),  # never none
        (0, 0, 0, 1),
        (2, 0, 0.3, 1),
        (2, 0, 0.4, 2),  # one alone would be near its target
    ],
)
def test_engines_for_a_load(current: int, waiting: float, kv: float, wanted: int) -> None:
    assert engines_wanted(current, waiting, kv) == wanted


def test_what_all_engines_report_is_summed() -> None:
    context = SimpleNamespace(
        current_num_replicas=2,
        aggregated_metrics={WAITING: {"a": 6.0, "b": 0.0}, KV: {"a": 0.1, "b": 0.1}},
    )
    assert policy(context) == (3, {})
    context.aggregated_metrics = None  # none has reported yet
    assert policy(context) == (1, {})
