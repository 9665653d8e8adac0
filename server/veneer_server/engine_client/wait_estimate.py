"""Estimates how long a new request would wait for its turn, from the engine's recent pace.

Work is counted as the engine's scheduler counts service: prompt tokens plus twice the output
tokens, each weighted by its adapter's size (`token_work`). Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from veneer_server.wire.messages import StepDone

OUTPUT_COST: Final = 2.0

_RECENT_S: Final = 10.0
"""Older steps count less: a step that lies this many seconds of steps back counts 1 / e."""
_GUESS: Final = 128
"""Assumed output tokens of a sequence, before any sequence has ended."""
_SMOOTHING: Final = 0.05
"""Weight of the newest request in means over requests."""


class WaitEstimate:
    """Observes steps and requests, and estimates waits from them.

    Attributes:
        mean_work: mean work of recent requests; 0 before the first.
    """

    def __init__(self) -> None:
        self._work = self._seconds = 0.0
        self._asked = self._found = 0.0
        self._output: float | None = None
        self.mean_work = 0.0

    @property
    def rate(self) -> float:
        """Recent work per second spent in steps; 0 if unknown."""
        return self._work / self._seconds if self._seconds > 0 else 0.0

    def step(self, step: StepDone) -> None:
        """Observe a step."""
        kept = math.exp(-max(0.0, step.seconds) / _RECENT_S)
        work = step.prefill_tokens + step.extra_prefill
        work += OUTPUT_COST * (step.decode_rows + step.extra_decode)
        self._work = self._work * kept + work
        self._seconds = self._seconds * kept + max(0.0, step.seconds)
        if step.prefix_asked:
            self._asked = 0.95 * self._asked + step.prefix_asked
            self._found = 0.95 * self._found + step.prefix_found

    def restart(self) -> None:
        """Forget the engine's pace after it has ended: the next one may be faster or slower."""
        self._work = self._seconds = 0.0

    def ended(self, output_tokens: int) -> None:
        """Observe how many output tokens a sequence had when it ended by itself."""
        before = output_tokens if self._output is None else self._output
        self._output = before + _SMOOTHING * (output_tokens - before)

    def work(self, prompt_tokens: int, max_tokens: int, each: float = 1.0) -> float:
        """Estimate the work of a sequence, and count it in `mean_work`. Assumes that it finds
        as much of its prompt in the prefix cache as recent requests did, and that it has as
        many output tokens.

        Args:
            each: work of one of its tokens.
        """
        computed = 1.0 - (self._found / self._asked if self._asked else 0.0)
        output = min(max_tokens, _GUESS if self._output is None else self._output)
        work = each * (prompt_tokens * computed + OUTPUT_COST * output)
        before = self.mean_work or work
        self.mean_work = before + _SMOOTHING * (work - before)
        return work

    def wait(self, ours: float, weight: float, others: Iterable[tuple[float, float]]) -> float:
        """Estimate the seconds until a request of a flow would start, if no place is free; 0 if
        unknown.

        While the flow's own work is done, each other flow gets as much service for its weight.

        Args:
            ours, weight: waiting work of the flow, and its weight.
            others: (waiting work, weight) of each other flow.
        """
        if not self.rate or self._output is None:
            return 0.0
        ahead, mean = ours, self.mean_work
        for work, other in others:
            ahead += min(work, ours / weight * other + mean)
        return (ahead + mean) / self.rate
