"""Validation loss, as the mean over learned tokens, not over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from veneer_train.batches import collate
from veneer_train.data import IGNORE, Sample

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Attributes:
    loss: nats per learned token.
    accuracy: share of learned tokens that are the model's first choice, 0 to 1.
    tokens: number of learned tokens.
    """

    loss: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: Any,
    samples: Sequence[Sample],
    batch: int,
    *,
    progress: Callable[[int], object] = lambda done: None,
) -> Evaluation:
    """Measure ``model`` on ``samples``, and restore its train or eval mode.

    Args:
        progress: called with the number of samples done, at first 0.
    """
    was_training = model.training
    device = next(model.parameters()).device
    total, right, tokens = 0.0, 0, 0
    # Samples of similar length share a batch: less padding, the same sums.
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(ordered), batch):
                progress(start)
                inputs = {
                    k: v.to(device) for k, v in collate(ordered[start : start + batch]).items()
                }
                labels = inputs.pop("labels")[:, 1:]
                learned = labels != IGNORE
                logits = (
                    model(**inputs).logits[:, :-1][learned].float()
                )  # [learned, vocabulary]
                wanted = labels[learned]
                total += float(F.cross_entropy(logits, wanted, reduction="sum"))
                right += int((logits.argmax(-1) == wanted).sum())
                tokens += int(wanted.numel())
    finally:
        model.train(was_training)
    return Evaluation(total / tokens, right / tokens, tokens)
