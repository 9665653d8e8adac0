"""Decides when a run must stop, from plain numbers, without torch."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import ClassVar, Final

from veneer_registry.errors import Aborted

_WINDOW: Final = 20
_ENOUGH: Final = 5
"""Fewest gradient norms to compare with: few enough to cover the first steps, where a learning
rate that is far too high does its harm."""
_JUMP: Final = 100.0
_WORSE_THAN_GUESSING: Final = 2.0
"""Nats per token above guessing, which no sound run exceeds twice in a row."""


class TrainingStopped(Aborted):
    """A run was stopped because it had diverged (metadata ``step`` and ``cause``)."""

    reason: ClassVar[str] = "TRAINING_STOPPED"


class StabilityWatch:
    """Raises when loss or gradient norm show that the run has diverged.

    It raises in three cases:

    - A value is not finite.
    - The gradient norm jumps: before clipping, it is more than 100 times the median of the
      last 20 steps (or of those so far), from the sixth step on.
    - The loss is worse than guessing: in two consecutive steps it is 2 nats above that of
      uniform guessing, or above the first step's if that was worse. A step's loss is measured
      before its update, so this applies from the third step on; a single such step may be an
      odd batch.

    Low precision may cause any of these; try a smaller learning rate first.

    Args:
        vocabulary: size of the model's vocabulary.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._norms: deque[float] = deque(maxlen=_WINDOW)
        self._worst: float | None = None
        self._above: float | None = None  # the last step's loss, if it was that high

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Check one optimiser step.

        Raises:
            TrainingStopped: with the step, the observation, and what to try.
        """
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise self._stop(step, "not_finite", f"the {what} is {value}")
        self._check_loss(step, loss)
        if len(self._norms) >= _ENOUGH:
            usual = median(self._norms)
            if usual > 0 and grad_norm > _JUMP * usual:
                raise self._stop(
                    step,
                    "jump",
                    f"the gradient norm jumped from about {usual:.3g} to {grad_norm:.3g}",
                )
        self._norms.append(grad_norm)

    def _check_loss(self, step: int, loss: float) -> None:
        guessing = math.log(self._vocabulary)
        if self._worst is None:
            self._worst = max(guessing, loss) + _WORSE_THAN_GUESSING
        if loss <= self._worst:
            self._above = None
            return
        if self._above is not None:
            raise self._stop(
                step,
                "worse_than_guessing",
                f"the loss is {loss:.3g} after {self._above:.3g}, while guessing among all "
                f"{self._vocabulary} tokens gives {guessing:.3g}",
            )
        self._above = loss

    @staticmethod
    def _stop(step: int, cause: str, seen: str) -> TrainingStopped:
        return TrainingStopped(
            f"stopped at step {step}: {seen}. Lower train.lr or train.clip, set "
            "quant.compute_dtype: fp32, or check the data of this step; nothing was written",
            metadata={"step": str(step), "cause": cause},
        )
