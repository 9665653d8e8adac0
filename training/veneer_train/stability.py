"""When a run must stop: decided on plain numbers, without torch."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import ClassVar, Final

from veneer_registry.errors import Aborted

__all__ = ["StabilityWatch", "TrainingStopped"]

_WINDOW: Final = 20
_JUMP: Final = 100.0


class TrainingStopped(Aborted):
    """A run was stopped because going on cannot help (metadata ``step``)."""

    reason: ClassVar[str] = "TRAINING_STOPPED"


class StabilityWatch:
    """Raises when loss or gradient norm say that the run is lost.

    Not finite: at once. A jump: the gradient norm before clipping is more than 100
    times the median of the last 20 steps, and there are 20 to compare with. Low
    precision may cause both; a smaller learning rate is the first thing to try.
    """

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=_WINDOW)

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Look at one optimiser step.

        Raises:
            TrainingStopped: with the step, what was seen, and what to try.
        """
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise self._stop(step, f"the {what} is {value}")
        if len(self._norms) == _WINDOW:
            usual = median(self._norms)
            if usual > 0 and grad_norm > _JUMP * usual:
                raise self._stop(
                    step, f"the gradient norm jumped from about {usual:.3g} to {grad_norm:.3g}"
                )
        self._norms.append(grad_norm)

    @staticmethod
    def _stop(step: int, seen: str) -> TrainingStopped:
        return TrainingStopped(
            f"stopped at step {step}: {seen}. Lower train.lr or train.clip, set "
            "quant.compute_dtype: fp32, or look at the data of this step; nothing was written",
            metadata={"step": str(step)},
        )
