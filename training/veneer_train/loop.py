"""One training run: Hugging Face Trainer over PEFT over the frozen 4-bit base."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from veneer_registry.errors import InvalidField

from veneer_train.config import OptimConfig, TrainConfig
from veneer_train.data import Sample, Split, collate, load_split
from veneer_train.evaluate import Evaluation, evaluate
from veneer_train.export import round_to_file_dtype, write_folder
from veneer_train.manifest import RunFacts, build_manifest, fingerprint
from veneer_train.model import (
    add_adapter,
    load_base,
    load_tokenizer,
    resolve_base,
    training_device,
)
from veneer_train.stability import StabilityWatch, TrainingStopped

__all__ = ["MetricsLog", "TrainResult", "fit", "train", "training_arguments"]

Report = Callable[[Mapping[str, Any]], None]
"""Called with each row of ``metrics.jsonl`` as it is written."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run.

    Attributes:
        folder: the adapter, ready to push.
        facts: what happened, as the manifest tells it.
    """

    folder: Path
    facts: RunFacts


class MetricsLog:
    """``metrics.jsonl``: one object a line, flushed as it is written."""

    def __init__(self, path: Path, report: Report) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._report = report

    def write(self, **row: Any) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._report(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Logs each step, evaluates, and stops a run that is lost or out of time."""

    def __init__(self, config: TrainConfig, split: Split, log: MetricsLog) -> None:
        self._config = config
        self._split = split
        self._log = log
        self._stability = StabilityWatch()
        self._started = time.monotonic()
        self.last_loss = float("nan")

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
            _log_evaluation(self._log, state.global_step, measured)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        limit = self._config.train.max_minutes
        if limit is not None and time.monotonic() - self._started >= limit * 60:
            control.should_training_stop = True


def _log_evaluation(log: MetricsLog, step: int, measured: Evaluation) -> None:
    log.write(
        event="eval",
        step=step,
        val_loss=measured.loss,
        val_accuracy=measured.accuracy,
        val_tokens=measured.tokens,
    )


class _Samples(torch.utils.data.Dataset[Sample]):
    def __init__(self, samples: tuple[Sample, ...]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def training_arguments(
    config: OptimConfig, scratch: Path, device: torch.device
) -> TrainingArguments:
    """Trainer's arguments for this run; ``auto`` is settled here by ``device``."""
    cuda = device.type == "cuda"
    optim = config.optim
    if optim == "auto":
        # Paged optimizers do nothing on a CPU, and 8-bit ones are slower there.
        optim = "paged_adamw_8bit" if cuda else "adamw_torch_fused"
    recompute = config.checkpointing == "on" or (config.checkpointing == "auto" and cuda)
    schedule = config.schedule
    if schedule == "constant" and config.warmup > 0:
        schedule = "constant_with_warmup"  # Trainer's "constant" ignores a warm-up
    recomputing: dict[str, Any] = {}
    if recompute:
        recomputing["gradient_checkpointing"] = True
        recomputing["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    try:
        return TrainingArguments(
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
            **recomputing,
            seed=config.seed,
            data_seed=config.seed,
            use_cpu=not cuda,
            logging_steps=1,
            logging_nan_inf_filter=False,  # the default hides a NaN loss
            include_num_input_tokens_seen="non_padding",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=cuda,
            remove_unused_columns=False,
        )
    except ValueError as error:
        raise InvalidField(
            f"transformers refuses these train settings: {error}", metadata={"field": "train"}
        ) from error


def fit(
    model: Any, split: Split, config: TrainConfig, log: MetricsLog, device: torch.device
) -> tuple[int, int, float]:
    """Train ``model``'s adapter in place.

    Returns:
        optimiser steps done, input tokens seen (without padding), last step's loss.

    Raises:
        TrainingStopped: the loss or the gradients went bad.
    """
    watch = _Watch(config, split, log)
    trainer = Trainer(
        model=model,
        args=training_arguments(config.train, config.output.logs_dir, device),
        train_dataset=_Samples(split.train.samples),
        data_collator=collate,
        callbacks=[watch],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    trainer.train()
    state = trainer.state
    return int(state.global_step), int(state.num_input_tokens_seen), watch.last_loss


def _check_output(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidField(
            f"output.dir {str(folder)!r} exists and is not empty: remove it, choose another, "
            "or use --overwrite",
            metadata={"field": "output.dir"},
        )


def _template(config: TrainConfig, tokenizer: Any) -> str:
    if config.data.template is None:
        return str(tokenizer.chat_template or "")
    try:
        return Path(config.data.template).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidField(
            f"cannot read data.template {config.data.template!r}: {error}",
            metadata={"field": "data.template"},
        ) from error


def train(config: TrainConfig, report: Report, *, overwrite: bool = False) -> TrainResult:
    """Train an adapter as ``config`` says and write its folder.

    The folder appears whole at the end, or not at all; ``metrics.jsonl`` grows in the
    logs folder meanwhile.

    Raises:
        InvalidField: the config, the data or the base cannot be used.
        TemplateFailed: the chat template cannot be marked or rendered.
        TrainingStopped: the run went bad.
    """
    out = Path(config.output.dir)
    if not overwrite:
        _check_output(out)
    folder = resolve_base(config.model.path)
    tokenizer = load_tokenizer(folder)
    template = _template(config, tokenizer)
    split = load_split(config.data, tokenizer, template, config.train.seed)
    base = fingerprint(folder, config.quant)
    device = training_device()
    set_seed(config.train.seed)
    started = time.monotonic()
    model = add_adapter(load_base(folder, config.quant, device), config.lora)
    val, batch = split.val, config.train.batch
    with MetricsLog(config.output.logs_dir / "metrics.jsonl", report) as log:
        before = None
        if val and config.eval.compare_base:  # a fresh adapter is the base, to the bit
            before = evaluate(model, val.samples, batch)
            _log_evaluation(log, 0, before)
        steps, tokens, last_loss = fit(model, split, config, log, device)
        round_to_file_dtype(model)  # what is measured is what is written
        after = evaluate(model, val.samples, batch) if val else None
        if after is not None:
            _log_evaluation(log, steps, after)
            if not after.loss < float("inf"):
                raise TrainingStopped(f"the trained adapter's validation loss is {after.loss}")
    facts = RunFacts(
        steps=steps,
        tokens=tokens,
        seconds=time.monotonic() - started,
        last_loss=last_loss,
        before=before,
        after=after,
    )
    shipped = template if config.data.template is not None else None
    write_folder(out, model, config, build_manifest(config, split, base, facts), shipped)
    return TrainResult(out, facts)
