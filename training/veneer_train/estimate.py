"""Estimates how long a run will take, from one measured step whose result is discarded."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from veneer_train.config import TrainConfig

_LOOKED_AT: Final = 64
"""Number of batches whose lengths represent all batches."""

_FORWARD: Final = 1 / 3
"""Time of a validation relative to a step with as many tokens: it is only a forward pass."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Remaining work of a run.

    Attributes:
        steps: optimiser steps, without those of an earlier session.
        tokens: input tokens of these steps, padding included.
        seconds: duration of these steps and of validations, without tasks and publications.
        limit_s: the run ends after this time at the latest (``train.max_minutes``).
    """

    steps: int
    tokens: int
    seconds: float
    limit_s: float | None = None

    def __str__(self) -> str:
        text = f"{self.steps} steps, {self.tokens:,} tokens: about {_minutes(self.seconds)}"
        if self.limit_s is not None and self.limit_s < self.seconds:
            text += f", of which train.max_minutes allows {_minutes(self.limit_s)}"
        return text


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(
    model: Any,
    rows: Sequence[Any],
    order: Iterable[int],
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
    config: TrainConfig,
    *,
    steps: int,
    validation_tokens: int = 0,
    recompute: bool = False,
) -> Estimate:
    """Measure one batch forward and backward. Weights, gradients and the model's mode are left
    unchanged. Dropout consumes random numbers, so set the seed afterwards.

    Args:
        rows, order, collate: the training data and its order.
        steps: number of steps that are left.
        recompute: recompute activations, as in training; stays switched on.
    """
    options, device = config.train, next(model.parameters()).device
    picked = list(itertools.islice(order, _LOOKED_AT * options.batch))
    batches = [
        collate([rows[index] for index in picked[at : at + options.batch]])
        for at in range(0, len(picked), options.batch)
    ]
    sizes = [batch["input_ids"].numel() for batch in batches]
    mean = sum(sizes) / len(sizes)
    # A batch of average size: the time per token differs for short and long ones.
    usual = min(range(len(sizes)), key=lambda at: abs(sizes[at] - mean))
    if recompute:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    was_training = model.training
    model.train()
    try:
        _step(model, batches[min(range(len(sizes)), key=sizes.__getitem__)], device)
        seconds = _step(model, batches[usual], device) / sizes[usual]
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    own = steps * options.accum * mean  # tokens of this process
    every = config.eval.every
    validations = 1 + (steps // every if every else 0)
    limit = options.max_minutes
    return Estimate(
        steps=steps,
        tokens=round(own * int(os.environ.get("WORLD_SIZE", "1"))),
        seconds=seconds * (own + _FORWARD * validations * validation_tokens),
        limit_s=None if limit is None else 60 * limit,
    )


def _step(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> float:
    """Run one forward and backward pass; return its seconds."""
    began = time.perf_counter()
    model(**{name: values.to(device) for name, values in batch.items()}).loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
