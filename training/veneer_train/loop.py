"""One training run, from a config to an adapter folder."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, Self

from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed
from veneer_registry.adapter import BaseFingerprint
from veneer_registry.errors import InvalidField

from veneer_train.base_folder import resolve_base
from veneer_train.checkpoint import Checkpoints, TrainerCheckpoint, disk_errors
from veneer_train.checks import Score, require_sandbox
from veneer_train.config import TrainConfig
from veneer_train.data import Split, load_split
from veneer_train.estimate import Estimate
from veneer_train.evaluate import Evaluation, evaluate, measure_tasks
from veneer_train.export import (
    AdapterSnapshot,
    model_card,
    round_to_file_dtype,
    take,
    write_folder,
)
from veneer_train.manifest import RunFacts, build_manifest, config_facts, fingerprint
from veneer_train.metrics_log import MetricsLog, Report, draw_curves
from veneer_train.model import (
    add_adapter,
    load_base,
    load_tokenizer,
    read_template,
    training_device,
)
from veneer_train.push import Moment
from veneer_train.stability import TrainingStopped
from veneer_train.trainer import Fitted, fit, log_evaluation, main_process


class Doing(Protocol):
    """Called with the current activity, and how much of it is done."""

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run.

    Attributes:
        folder: the adapter, ready to push.
        facts: facts of the run, as in the manifest.
        dora: the adapter can only be served merged.
    """

    folder: Path
    facts: RunFacts
    dora: bool


@dataclass(frozen=True, slots=True)
class _Figures:
    """Figures on the validation split; None or empty if not measured."""

    loss: Evaluation | None = None
    tasks: Mapping[str, Score] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        loss = Evaluation(**plain["loss"]) if plain["loss"] is not None else None
        return cls(loss, {kind: Score(**facts) for kind, facts in plain["tasks"].items()})


class Snapshots:
    """Writes adapter folders of a run at any step.

    Args:
        template: the chat template that the adapter is trained with.
        before: figures of the base.
        seconds: returns the time since the run began, over all sessions.
    """

    def __init__(
        self,
        config: TrainConfig,
        split: Split,
        base: BaseFingerprint,
        template: str,
        before: _Figures,
        seconds: Callable[[], float],
    ) -> None:
        self._config = config
        self._split = split
        self.base = base
        self._template = template if config.data.template is not None else None
        self._before = before
        self._seconds = seconds

    def facts(self, fitted: Fitted, after: _Figures | None = None) -> RunFacts:
        """Facts of the run so far."""
        after = after or _Figures()
        return RunFacts(
            steps=fitted.steps,
            tokens=fitted.tokens,
            seconds=self._seconds(),
            last_loss=fitted.last_loss,
            before=self._before.loss,
            after=after.loss,
            tasks_before=self._before.tasks,
            tasks_after=after.tasks,
        )

    def write_moment(self, adapter: AdapterSnapshot, folder: Path, moment: Moment) -> None:
        """Write the adapter as of ``moment``; called by `push.PushCallback`."""
        loss = moment.metrics.get("train_loss_last", float("nan"))
        self.write(adapter, folder, self.facts(Fitted(moment.step, moment.tokens, loss)))

    def rehearse(self, adapter: AdapterSnapshot, folder: Path) -> None:
        """Write the untrained adapter, check it as at the end, and remove it. This finds an
        adapter that a server would refuse in any case, or a folder that cannot be written,
        before hours of training.

        Raises:
            AdapterInvalid: a server would refuse it.
            OSError: it cannot be written.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
            nothing = Fitted(steps=0, tokens=0, last_loss=float("nan"))
            self.write(adapter, Path(work) / folder.name, self.facts(nothing))

    def write(self, adapter: AdapterSnapshot, folder: Path, facts: RunFacts) -> None:
        """Write an adapter of this run; see `export.write_folder`."""
        manifest = build_manifest(self._config, self._split, self.base, facts)
        output = self._config.output
        card = model_card(
            Path(output.dir).name,
            manifest,
            about=output.description,
            license_name=output.license,
        )
        write_folder(folder, adapter, manifest, card=card, template=self._template)


def _check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise InvalidField if the folder has something that must not be replaced."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        cause, why = "no_folder", "is not a folder"
        fix = "remove it, or choose another"
    elif not any(folder.iterdir()):
        return
    elif not overwrite:
        cause, why = "exists", "exists and is not empty"
        fix = "remove it, choose another, or use --overwrite"
    elif not (folder / "adapter_config.json").is_file():
        cause, why = "no_adapter", "contains files that do not belong to an adapter"
        fix = "choose another"
    else:
        return
    raise InvalidField(
        f"output.dir {str(folder)!r} {why}: {fix}",
        metadata={"field": "output.dir", "cause": cause},
    )


def _identity(
    config: TrainConfig, split: Split, base: BaseFingerprint, template: str
) -> dict[str, Any]:
    """Facts that must be the same for a run to resume from a checkpoint."""
    facts = config_facts(config)
    del facts["eval"], facts["train"]["max_minutes"]
    return {
        **facts,
        "data.sha256": {
            "train": split.train.sha256,
            "val": split.val.sha256 if split.val is not None else None,
        },
        "base": {"weights": base.weights, "tokenizer": base.tokenizer},
        "template": sha256(template.encode()).hexdigest(),
    }


def _found(
    checkpoints: Checkpoints, config: TrainConfig, *, overwrite: bool
) -> TrainerCheckpoint | None:
    """Return the checkpoint to resume from; if there is none, remove all checkpoints. With
    ``overwrite``, checkpoints of another run are no error."""
    wanted = config.output.resume
    found = None
    if wanted != "never":
        try:
            found = checkpoints.newest()
        except InvalidField:
            if not overwrite or wanted == "must":
                raise
    if found is None and wanted == "must":
        raise InvalidField(
            f"there is no checkpoint in {checkpoints.root} to resume from: set "
            "output.resume: auto to start",
            metadata={"field": "output.resume"},
        )
    if found is None and main_process():
        checkpoints.clear()
    return found


def train(
    config: TrainConfig,
    report: Report,
    *,
    overwrite: bool = False,
    callbacks: Callable[[Snapshots], Sequence[TrainerCallback]] = lambda snapshots: (),
    check_base: Callable[[BaseFingerprint], object] = lambda base: None,
    expect: Callable[[Estimate], None] | None = None,
    doing: Doing = lambda what, done=0, total=0: None,
) -> TrainResult:
    """Train an adapter as ``config`` says and write its folder.

    The folder appears complete at the end, or not at all; ``metrics.jsonl``, ``curves.png``
    and checkpoints are written to the logs folder meanwhile. An interrupted run resumes from
    its newest checkpoint; a finished run leaves none.

    Args:
        overwrite: replace the folder, and checkpoints of another run.
        callbacks: returns callbacks for Trainer; see `Snapshots`.
        check_base: called before anything is loaded; may raise.
        expect: called before the first step with an estimate of the training time.
        doing: called with each activity before, between and after the steps, and how much of it
            is done.

    Raises:
        InvalidField: the config, the data or the base cannot be used.
        AdapterInvalid: a server would refuse the adapter, whatever it learns.
        TemplateFailed: the chat template cannot be marked or rendered.
        TrainingStopped: the run diverged.
        DiskFull, CheckpointFailed: a file could not be written.
        Unimplemented: a task would run code, and this machine has no sandbox for it.
    """
    out = Path(config.output.dir)
    _check_output(out, overwrite=overwrite)
    folder = resolve_base(config.model.path)
    doing("reading the data")
    tokenizer = load_tokenizer(folder)
    template = read_template(config.data.template, tokenizer)
    split = load_split(config.data, tokenizer, template, config.train.seed)
    if split.val is not None and config.eval.tasks:  # fail now, not after the training
        tasks = [each.task for each in split.val.samples if each.task is not None]
        require_sandbox(task.check for task in tasks[: config.eval.tasks])
    doing("hashing the base")
    base = fingerprint(folder, config.quant)
    if main_process():
        check_base(base)
    checkpoints = Checkpoints(
        config.output.checkpoints_dir,
        _identity(config, split, base, template),
        keep=config.output.keep,
    )
    resume = _found(checkpoints, config, overwrite=overwrite)
    device = training_device()
    set_seed(config.train.seed)
    doing("loading the base")
    started = time.monotonic() - (resume.facts["seconds"] if resume is not None else 0.0)
    model = add_adapter(load_base(folder, config.quant, device), config.lora)
    logs = config.output.logs_dir
    after_step = resume.step if resume is not None else None
    file = logs / "metrics.jsonl" if main_process() else None

    def seconds() -> float:
        return time.monotonic() - started

    def snapshots_from(before: _Figures) -> Snapshots:
        return Snapshots(config, split, base, template, before, seconds)

    if main_process():
        with disk_errors(f"the adapter {out}", "choose another output.dir"):
            snapshots_from(_Figures()).rehearse(take(model, config.model.name), out)

    def measured(step: int) -> _Figures:
        if split.val is None:
            return _Figures()
        whose = "the adapter" if step else "the base"
        samples = len(split.val.samples)
        loss = evaluate(
            model,
            split.val.samples,
            config.train.batch,
            progress=partial(doing, f"measuring {whose}, samples", total=samples),
        )
        log_evaluation(log, step, loss)
        limit = config.eval.tasks
        asked = sum(each.task is not None for each in split.val.samples)
        scores = measure_tasks(
            model,
            tokenizer,
            split.val.samples,
            limit=limit,
            progress=partial(
                doing, f"measuring {whose}, tasks", total=min(asked, limit or asked)
            ),
        )
        for kind, score in scores.items():
            log.write(event="tasks", step=step, kind=kind, right=score.right, asked=score.asked)
        return _Figures(loss, scores)

    with MetricsLog(file, report, after=after_step) as log:
        before = _Figures()
        if resume is not None:
            log.write(event="resumed", step=resume.step, folder=resume.folder.name)
            before = _Figures.of(resume.facts["before"])
        elif config.eval.compare_base:  # with a fresh adapter, bit-identical to the base
            before = measured(0)

        doing("measuring one step")
        snapshots = snapshots_from(before)
        try:
            fitted = _fit(
                model,
                split,
                config,
                log,
                device,
                checkpoints=checkpoints if config.output.save_every else None,
                resume=resume,
                facts=lambda: {"seconds": seconds(), "before": before.plain()},
                callbacks=callbacks(snapshots),
                expect=expect,
            )
        finally:
            # A full disk must not fail a finished run just for its plot.
            with contextlib.suppress(OSError):
                draw_curves(log.rows, logs / "curves.png", out.name)
        round_to_file_dtype(model)  # measure the weights that are written
        after = measured(fitted.steps)
        if after.loss is not None and not after.loss.loss < float("inf"):
            raise TrainingStopped(f"the trained adapter's validation loss is {after.loss.loss}")
    facts = snapshots.facts(fitted, after)
    if main_process():
        doing("writing the adapter")
        with disk_errors(f"the adapter {out}", checkpoints.advice()):
            snapshots.write(take(model, config.model.name), out, facts)
        checkpoints.clear()
    return TrainResult(out, facts, config.lora.dora)


def _fit(
    model: Any,
    split: Split,
    config: TrainConfig,
    log: MetricsLog,
    device: Any,
    *,
    resume: TrainerCheckpoint | None,
    **options: Any,
) -> Fitted:
    """Call `trainer.fit`, unless the checkpoint is of the last step and only needs loading."""
    if resume is None or resume.step < config.train.steps:
        return fit(model, split, config, log, device, resume=resume, **options)
    weights = load_file(resume.folder / "adapter_model.safetensors")
    set_peft_model_state_dict(model, weights)
    return Fitted(resume.step, resume.facts["tokens"], resume.facts["last_loss"])
