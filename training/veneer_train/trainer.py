"""Hugging Face Trainer, extended to log each step, stop when diverged, and save safely."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from veneer_registry.errors import InvalidField

from veneer_train.batches import Order, collate, collate_packed, pack
from veneer_train.checkpoint import Checkpoints, TrainerCheckpoint
from veneer_train.config import OptimConfig, TrainConfig
from veneer_train.data import Split
from veneer_train.estimate import Estimate, estimate
from veneer_train.evaluate import Evaluation, evaluate
from veneer_train.metrics_log import MetricsLog
from veneer_train.stability import StabilityWatch

_Row = TypeVar("_Row")

_OPTIMIZERS = {"adamw8bit": "adamw_8bit"}
"""Common names -> transformers' names."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Outcome of training.

    Attributes:
        steps: optimiser steps, of all sessions.
        tokens: input tokens seen, without padding (with packing, including the little padding
            that there is).
        last_loss: loss of the last step.
    """

    steps: int
    tokens: int
    last_loss: float


def main_process() -> bool:
    """Whether this process writes files (``accelerate launch`` starts several)."""
    return int(os.environ.get("RANK", "0")) == 0


def _optimizer(wanted: str, *, cuda: bool) -> str:
    """transformers' name of an optimizer.

    Raises:
        InvalidField: a paged one on a CPU, where bitsandbytes pages nothing.
    """
    if wanted == "auto":
        # On a CPU, paging has no effect and 8-bit optimizers are slower. DeepSpeed divides the
        # states of torch's AdamW among processes; it calls bitsandbytes' untested.
        deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
        return "paged_adamw_8bit" if cuda and not deepspeed else "adamw_torch_fused"
    if wanted.startswith("paged_") and not cuda:
        raise InvalidField(
            f"train.optim: {wanted} pages optimizer states out of GPU memory, but there is no "
            "GPU: use auto, adamw_torch_fused or adamw_8bit",
            metadata={"field": "train.optim", "optim": wanted},
        )
    return _OPTIMIZERS.get(wanted, wanted)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Logs each step, evaluates, and stops a run that has diverged or run out of time."""

    def __init__(
        self,
        config: TrainConfig,
        split: Split,
        log: MetricsLog,
        order: Order,
        *,
        before_s: float,
        vocabulary: int,
    ) -> None:
        self._config = config
        self._split = split
        self._log = log
        self._order = order
        self._stability = StabilityWatch(vocabulary)
        self._started = time.monotonic() - before_s
        self.last_loss = float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A checkpoint restores the interval that it was saved with.
        state.save_steps = args.save_steps

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        """Called after each optimiser step, and once more with a summary."""
        if not logs or "grad_norm" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs["grad_norm"])
        self._log.write(
            event="step",
            step=state.global_step,
            steps=state.max_steps,
            loss=loss,
            grad_norm=norm,
            lr=logs["learning_rate"],
            tokens=int(state.num_input_tokens_seen),
            seconds=round(time.monotonic() - self._started, 3),
        )
        self._stability.check(state.global_step, loss, norm)
        self.last_loss = loss
        val, every = self._split.val, self._config.eval.every
        due = every > 0 and state.global_step % every == 0
        # The last step is measured after training, on the rounded weights.
        if val and due and state.global_step < state.max_steps:
            measured = evaluate(kw["model"], val.samples, self._config.train.batch)
            log_evaluation(self._log, state.global_step, measured)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # With several processes, a resumed loader does not pass on the epoch.
        self._order.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        limit = self._config.train.max_minutes
        if limit is not None and time.monotonic() - self._started >= limit * 60:
            control.should_training_stop = True


def log_evaluation(log: MetricsLog, step: int, measured: Evaluation) -> None:
    """Add a row with a validation's figures."""
    log.write(
        event="eval",
        step=step,
        val_loss=measured.loss,
        val_accuracy=measured.accuracy,
        val_tokens=measured.tokens,
    )


class _Rows(torch.utils.data.Dataset[_Row]):
    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> _Row:
        return self._rows[index]


class _Trainer(Trainer):  # type: ignore[misc]
    """Args:
    order: order of the samples.
    watch: knows the last loss.
    checkpoints: where to save; None: nowhere.
    facts: returns the facts to save with a checkpoint.
    """

    def __init__(
        self,
        *args: Any,
        order: Order,
        watch: _Watch,
        checkpoints: Checkpoints | None,
        facts: Callable[[], Mapping[str, Any]],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._order = order
        self._watch = watch
        self._checkpoints = checkpoints
        self._facts = facts

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self._order

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._checkpoints is None or not main_process():
            self._save_together(model, trial)
            return
        facts = {
            **self._facts(),
            "tokens": int(self.state.num_input_tokens_seen),
            "last_loss": self._watch.last_loss,
        }
        with self._checkpoints.saving(self.state.global_step, facts):
            self._save_together(model, trial)

    def _save_together(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Each process writes the state of its random number generators.
        self.accelerator.wait_for_everyone()


def training_arguments(
    config: OptimConfig,
    scratch: Path,
    device: torch.device,
    *,
    save_every: int = 0,
    packing: bool = False,
) -> TrainingArguments:
    """Trainer's arguments for this run; ``auto`` is resolved here by ``device``.

    Raises:
        InvalidField: settings that transformers refuses, or that this device cannot do.
    """
    cuda = device.type == "cuda"
    optim = _optimizer(config.optim, cuda=cuda)
    recompute = config.checkpointing == "on" or (config.checkpointing == "auto" and cuda)
    schedule = config.schedule
    if schedule == "constant" and config.warmup > 0:
        schedule = "constant_with_warmup"  # Trainer's "constant" ignores a warm-up
    chosen: dict[str, Any] = {"save_strategy": "no"}
    if save_every:
        # We remove old checkpoints ourselves: Trainer would remove the last valid one before
        # the new one is known to be valid.
        chosen = {"save_strategy": "steps", "save_steps": save_every}
    if recompute:
        chosen["gradient_checkpointing"] = True
        chosen["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    try:
        arguments = TrainingArguments(
            output_dir=str(scratch),
            per_device_train_batch_size=config.batch,
            gradient_accumulation_steps=config.accum,
            max_steps=config.steps,
            learning_rate=config.lr,
            lr_scheduler_type=schedule,
            warmup_steps=round(config.warmup * config.steps),
            weight_decay=config.weight_decay,
            max_grad_norm=config.clip,
            optim=optim,
            **chosen,
            seed=config.seed,
            data_seed=config.seed,
            use_cpu=not cuda,
            logging_steps=1,
            logging_nan_inf_filter=False,  # the default hides a NaN loss
            include_num_input_tokens_seen="all" if packing else "non_padding",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=cuda,
            remove_unused_columns=False,
        )
        if cuda and arguments.n_gpu > 1:
            # One process uses one GPU: if more are visible, Trainer would count batches and
            # losses for all of them.
            arguments._n_gpu = 1
        return arguments
    except ValueError as error:
        raise InvalidField(
            f"transformers refuses these train settings: {error}", metadata={"field": "train"}
        ) from error


def fit(
    model: Any,
    split: Split,
    config: TrainConfig,
    log: MetricsLog,
    device: torch.device,
    *,
    checkpoints: Checkpoints | None = None,
    resume: TrainerCheckpoint | None = None,
    facts: Callable[[], Mapping[str, Any]] = dict,
    callbacks: Sequence[TrainerCallback] = (),
    expect: Callable[[Estimate], None] | None = None,
) -> Fitted:
    """Train ``model``'s adapter in place.

    Args:
        checkpoints: where to save; None: nowhere.
        resume: checkpoint to resume from.
        facts: returns the facts to save with each checkpoint.
        callbacks: callbacks of Trainer in addition to ours.
        expect: called before the first step with an estimate, which takes the time of a step.

    Raises:
        TrainingStopped: the loss or the gradients diverged.
        DiskFull, CheckpointFailed: a checkpoint could not be written.
    """
    samples, options = split.train.samples, config.train
    packing = config.data.packing
    rows: Sequence[Any] = pack(samples, config.data.max_len) if packing else samples
    lengths = [len(s.input_ids) for s in samples] if config.data.bucketing else None
    order = Order(len(rows), options.seed, lengths=lengths, batch=options.batch)
    before_s = resume.facts["seconds"] if resume is not None else 0.0
    watch = _Watch(
        config, split, log, order, before_s=before_s, vocabulary=model.config.vocab_size
    )
    arguments = training_arguments(
        options,
        config.output.checkpoints_dir,
        device,
        save_every=config.output.save_every if checkpoints is not None else 0,
        packing=packing,
    )
    together: Any = collate_packed if packing else collate
    if expect is not None:  # before creating a Trainer, which sets the random seed
        val = split.val.samples if split.val is not None else ()
        expect(
            estimate(
                model,
                rows,
                order,
                together,
                config,
                steps=options.steps - (resume.step if resume is not None else 0),
                validation_tokens=sum(len(sample.input_ids) for sample in val),
                recompute=arguments.gradient_checkpointing,
            )
        )
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(rows),
        data_collator=together,
        callbacks=[watch, *callbacks],
        order=order,
        watch=watch,
        checkpoints=checkpoints,
        facts=facts,
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=str(resume.folder) if resume is not None else None)
    state = trainer.state
    return Fitted(int(state.global_step), int(state.num_input_tokens_seen), watch.last_loss)
