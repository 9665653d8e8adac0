"""How long a new request would wait for its turn, from the engine's recent pace.

Work is counted as the engine's scheduler counts service: prompt tokens, and twice the output
tokens, each by what its adapter makes of it (`token_work`). Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from veneer_server.wire.messages import StepDone

OUTPUT_COST: Final = 2.0

_RECENT_S: Final = 10.0
"""Older steps count less: a step of this many seconds ago 1 / e."""
_GUESS: Final = 128
"""New tokens of a sequence, before one has ended."""
_SMOOTHING: Final = 0.05
"""Weight of the newest request in means over requests."""


class WaitEstimate:
    """Observes steps and requests.

    Attributes:
        mean_work: of recent requests; 0 before the first.
    """

    def __init__(self) -> None:
        self._work = self._seconds = 0.0
        self._asked = self._found = 0.0
        self._output: float | None = None
        self.mean_work = 0.0

    @property
    def rate(self) -> float:
        """Recent work per second of steps; 0 if unknown."""
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
        """The engine has ended: another one may be faster or slower."""
        self._work = self._seconds = 0.0

    def ended(self, output_tokens: int) -> None:
        """Observe how many tokens a sequence had when it ended by itself."""
        before = output_tokens if self._output is None else self._output
        self._output = before + _SMOOTHING * (output_tokens - before)

    def work(self, prompt_tokens: int, max_tokens: int, each: float = 1.0) -> float:
        """Work of a sequence, also counted in `mean_work`: as much of its prompt as recent
        requests did not find in the prefix cache, and as many new tokens as they had.

        Args:
            each: what one of its tokens takes.
        """
        computed = 1.0 - (self._found / self._asked if self._asked else 0.0)
        output = min(max_tokens, _GUESS if self._output is None else self._output)
        work = each * (prompt_tokens * computed + OUTPUT_COST * output)
        before = self.mean_work or work
        self.mean_work = before + _SMOOTHING * (work - before)
        return work

    def wait(self, ours: float, weight: float, others: Iterable[tuple[float, float]]) -> float:
        """Seconds until a request of a flow would start, if no place is free; 0 if unknown.

        While the flow's own work is done, each other flow gets as much for its weight.

        Args:
            ours, weight: waiting work of the flow, and its weight.
            others: the same of each other flow.
        """
        if not self.rate or self._output is None:
            return 0.0
        ahead, mean = ours, self.mean_work
        for work, other in others:
            ahead += min(work, ours / weight * other + mean)
        return (ahead + mean) / self.rate
