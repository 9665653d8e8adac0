"""Measures a model on a data set: validation loss (a mean over learned tokens, not over
batches), and scores on the samples that are tasks, answered greedily as a server would."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from veneer_train.batches import collate
from veneer_train.checks import Score, require_sandbox, score
from veneer_train.data import IGNORE, PAD, Task, TrainingSample


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
    samples: Sequence[TrainingSample],
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


def answer(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    batch: int = 16,
    max_tokens: int = 256,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Answer each task greedily; return the answers in the order of the tasks.

    Args:
        max_tokens: most tokens of an answer; longer ones are cut off.
        progress: called with the number done.
    """
    was_training, cached = model.training, model.config.use_cache
    device = next(model.parameters()).device
    order = sorted(range(len(tasks)), key=lambda i: len(tasks[i].prompt_ids))
    found = [""] * len(tasks)
    model.eval()
    model.config.use_cache = True
    try:
        progress(0)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            longest = max(len(tasks[i].prompt_ids) for i in part)
            ids = torch.full((len(part), longest), PAD)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(part):  # left-padded: answers follow on the right
                prompt = tasks[index].prompt_ids
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    pad_token_id=PAD,
                    eos_token_id=tokenizer.eos_token_id,
                )
            for row, index in enumerate(part):
                told = out[row, longest:].tolist()
                if tokenizer.eos_token_id in told:
                    told = told[: told.index(tokenizer.eos_token_id)]
                found[index] = tokenizer.decode(told, skip_special_tokens=True)
            progress(min(start + batch, len(order)))
    finally:
        model.config.use_cache = cached
        model.train(was_training)
    return found


def measure_tasks(
    model: Any,
    tokenizer: Any,
    samples: Sequence[TrainingSample],
    *,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Score]:
    """Scores by kind of check, over the (first ``limit``) samples that have a check.

    Raises:
        Unimplemented: a check runs code, and this machine cannot isolate it.
    """
    tasks = [sample.task for sample in samples if sample.task is not None][:limit]
    if not tasks:
        return {}
    require_sandbox(task.check for task in tasks)
    longest = max(len(tokenizer(task.expected)["input_ids"]) for task in tasks)
    answers = answer(model, tokenizer, tasks, max_tokens=2 * longest + 8, progress=progress)
    return score([task.check for task in tasks], answers, [task.expected for task in tasks])
