"""A FAKE slow machine: ``python -m tests.slow_engine STEP ROW HANG FD`` is the engine process
on a backend that waits before each call.

STEP and ROW are the seconds to wait per step and per row. From step number HANG on (0: never),
calls do not return at all. Calls made for measuring do not count.
"""

from __future__ import annotations

import sys
import time
from typing import Any
from unittest.mock import patch

from veneer_server.engine import process
from veneer_server.engine.execution.backend_choice import Chosen, choose
from veneer_server.engine.execution.step_cost import measure
from veneer_server.engine.scheduling.step_limits import StepCost


class Slow:
    """A backend that waits before each call."""

    def __init__(self, backend: Any, step_s: float, row_s: float, hang: int) -> None:
        self._backend = backend
        self._step_s = step_s
        self._row_s = row_s
        self._hang = hang
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def execute(self, step: Any) -> Any:
        self._calls += 1
        while self._hang and self._calls >= self._hang:
            time.sleep(1)
        time.sleep(self._step_s + self._row_s * len(step.tokens))
        return self._backend.execute(step)


def main() -> None:
    step_s, row_s, hang = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    del sys.argv[1:4]

    def slow(*arguments: Any) -> Chosen:
        chosen = choose(*arguments)
        object.__setattr__(chosen, "backend", Slow(chosen.backend, step_s, row_s, hang))
        return chosen

    def measured(backend: Any, *arguments: Any, **named: Any) -> StepCost:
        return measure(backend._backend if hang else backend, *arguments, **named)

    # Waiting uses no CPU time, so measure wall-clock time, as if no core were shared.
    with (
        patch.object(process, "choose", slow),
        patch.object(process, "measure", measured),
        patch("time.process_time", time.perf_counter),
    ):
        process.main()


if __name__ == "__main__":
    main()
