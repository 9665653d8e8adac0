"""``veneer_backend_info``: what executes a step, and why not the native kernels."""

from __future__ import annotations

import pytest
from veneer_server.telemetry.metrics import Metrics


@pytest.mark.parametrize(
    ("backend", "why", "expected"),
    [
        (
            "native (avx512-bf16)",
            "",
            {"backend": "native", "instructions": "avx512-bf16", "reason": ""},
        ),
        (
            "torch",
            "there is no C++ compiler",
            {"backend": "torch", "instructions": "", "reason": "there is no C++ compiler"},
        ),
        ("torch", "x" * 5000, {"backend": "torch", "instructions": "", "reason": "x" * 200}),
    ],
)
def test_one_series_says_it(backend: str, why: str, expected: dict[str, str]) -> None:
    metrics = Metrics()
    metrics.engine_started("cpu", "torch", "of an engine before")
    metrics.engine_started("cpu", backend, why)
    (family,) = (f for f in metrics.registry.collect() if f.name == "veneer_backend_info")
    ((_, labels, value, *_),) = family.samples
    assert (labels, value) == (expected, 1)
