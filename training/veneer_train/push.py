"""Publish adapters from a training run, while it goes on and at its end.

`PushCallback` works with any trainer of Hugging Face's kind whose model is a PEFT model
(Trainer, TRL's SFTTrainer): every so many steps it copies the adapter and publishes it
from a thread of its own, so that training waits for the copy alone.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback
from veneer_client import Client, Pushed
from veneer_registry.adapter import BaseFingerprint, BaseSpec, check_name
from veneer_registry.errors import InvalidField
from veneer_registry.training_manifest import check_base

from veneer_train.config import QuantConfig
from veneer_train.export import AdapterState, model_card, take, write_folder
from veneer_train.manifest import FORMAT, versions
from veneer_train.manifest import fingerprint as fingerprint_of
from veneer_train.plain_json import finite

__all__ = ["Moment", "Publication", "PushCallback", "Target", "check_target", "publish"]

_NICE: Final = 10


@dataclass(frozen=True, slots=True)
class Moment:
    """Where training is.

    Attributes:
        step: optimiser steps done.
        tokens: seen by then; 0 where the trainer does not count them.
        metrics: the newest numbers that it logged.
    """

    step: int
    tokens: int
    metrics: Mapping[str, float]


Write = Callable[[AdapterState, Path, Moment], None]
"""Writes an adapter's folder, as it is then."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to publish.

    Attributes:
        address: host:port of a server.
        name: adapter name.
        alias: that shall mean the last revision, such as ``prod``; "": none.
    """

    address: str
    name: str
    alias: str = ""


@dataclass(frozen=True, slots=True)
class Publication:
    """What came of one.

    Attributes:
        revision: of the adapter; "" where it failed.
        error: why it failed; "" where it did not.
    """

    step: int
    revision: str = ""
    error: str = ""


def check_target(target: Target, base: BaseFingerprint | None) -> tuple[str, ...]:
    """Ask a server, before hours of training, whether it will take the adapter; warnings.

    Raises:
        InvalidField: no such name or alias is possible.
        BaseModelMismatch: it serves another base.
        ServerUnreachable: there is none.
    """
    check_name(target.name)
    if target.alias:
        check_name(target.alias)
    with Client(target.address) as client:
        served = client.info().base_model
    spec = BaseSpec(served.name, 0, {}, BaseFingerprint(**asdict(served.fingerprint)))
    return check_base(base, spec) if base is not None else ()


def publish(target: Target, folder: Path, *, step: int | None = None) -> Pushed:
    """Push a folder, in place of what the name holds now, and move the alias to it.

    Raises:
        VeneerError: the server refuses it or cannot be reached.
    """
    labels = {} if step is None else {"step": str(step)}
    with Client(target.address) as client:
        pushed = client.push(folder, target.name, labels=labels, allow_replace=True)
        if target.alias:
            client.set_alias(f"{target.name}/{target.alias}", pushed.adapter.revision)
    return pushed


class PushCallback(TrainerCallback):  # type: ignore[misc]
    """Publishes the adapter that a trainer trains.

    A publication that fails is told (``on_publication``) and costs the run nothing. While
    one is under way at most one waits; a newer one takes its place.

    Args:
        address, name: of the server and the adapter.
        every: steps between publications; 0: at the end only.
        alias: moved to the last revision at the end.
        base: folder of the base model, for the fingerprint that lets a server refuse
            adapters of another base; None: the adapter says nothing of it.
        base_name: the base's logical name.
        fingerprint: of the base, in place of the folder.
        at_end: publish what there is when training ends; else that is somebody else's, and so
            is the last step.
        on_publication: told each outcome, from another thread.
        write: writes the folder; by default with a short manifest.

    Attributes:
        publications: outcomes, in order.

    Example:
        >>> trainer = SFTTrainer(..., callbacks=[
        ...     PushCallback("127.0.0.1:50051", "sql", every=50, base=folder,
        ...                  base_name="smollm2-135m")])
    """

    def __init__(
        self,
        address: str,
        name: str,
        *,
        every: int = 0,
        alias: str = "",
        base: Path | None = None,
        base_name: str = "",
        fingerprint: BaseFingerprint | None = None,
        at_end: bool = True,
        on_publication: Callable[[Publication], None] = lambda done: None,
        write: Write | None = None,
    ) -> None:
        if every < 0:
            raise InvalidField(
                f"every={every}: steps between publications are 0 (at the end only) or more",
                metadata={"field": "every"},
            )
        self._target = Target(address, name, alias)
        self._every = every
        self._base_name = base_name or (base.name if base is not None else "")
        self._folder = base
        self._base = fingerprint
        self._at_end = at_end
        self._told = on_publication
        self._write = write or self._write_plain
        self._worker: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._waiting: tuple[AdapterState, Moment, Target] | None = None
        self.publications: list[Publication] = []

    # ------------------------------------------------------------- Trainer's calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises as `check_target`, and InvalidField for a model without an adapter: a run
        whose result nobody takes does not begin."""
        if not state.is_world_process_zero:
            return
        model = peft_model(kwargs["model"])
        if self._folder is not None:
            self._base = fingerprint_of(self._folder, quant_of_model(model))
        check_target(self._target, self._base)
        self._worker = ThreadPoolExecutor(
            1, thread_name_prefix="push", initializer=_lower_priority
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publish what there is, every so many steps. Not at a step's end: whether that one
        was sound is looked at after it."""
        step = int(state.global_step)
        if self._worker is not None and self._every and step and step % self._every == 0:
            self._submit(kwargs["model"], state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for what is under way; publish the end."""
        if self._worker is None:
            return
        if self._at_end:
            self._submit(kwargs["model"], state, last=True)
        self._worker.shutdown(wait=True)
        self._worker = None

    # ---------------------------------------------------------------------- parts

    def _submit(self, model: Any, state: Any, *, last: bool = False) -> None:
        tokens = int(getattr(state, "num_input_tokens_seen", 0) or 0)
        moment = Moment(int(state.global_step), tokens, _metrics(state))
        # The alias moves at the end alone.
        target = self._target if last else replace(self._target, alias="")
        try:
            adapter = take(peft_model(model), self._base_name)
        except Exception as error:  # whatever it is, training goes on
            self._done(Publication(moment.step, error=f"{type(error).__name__}: {error}"))
            return
        with self._lock:
            self._waiting = (adapter, moment, target)
        assert self._worker is not None, "called between the run's begin and end"
        self._worker.submit(self._next)

    def _next(self) -> None:
        with self._lock:
            taken, self._waiting = self._waiting, None
        if taken is None:
            return  # a newer one took its place, and was published
        adapter, moment, target = taken
        try:
            with tempfile.TemporaryDirectory(prefix="veneer-push-") as scratch:
                folder = Path(scratch) / target.name
                self._write(adapter, folder, moment)
                pushed = publish(target, folder, step=moment.step)
            done = Publication(moment.step, pushed.adapter.revision)
        except Exception as error:  # also what libraries raise where the disk is full
            done = Publication(moment.step, error=str(error) or type(error).__name__)
        self._done(done)

    def _done(self, done: Publication) -> None:
        self.publications.append(done)
        self._told(done)

    def _write_plain(self, adapter: AdapterState, folder: Path, moment: Moment) -> None:
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "base_name": self._base_name,
            "versions": versions(),
            "steps": moment.step,
            "metrics": finite(moment.metrics),
        }
        if self._base is not None:
            manifest["base_fingerprint"] = asdict(self._base)
        write_folder(folder, adapter, manifest, card=model_card(folder.name, manifest))


def peft_model(model: Any) -> Any:
    """The PEFT model inside what accelerate or DeepSpeed put around it."""
    while not hasattr(model, "peft_config") and hasattr(model, "module"):
        model = model.module
    if not hasattr(model, "peft_config"):
        raise InvalidField(
            "the trainer's model has no adapter: give it a PEFT model, or a peft_config",
            metadata={"field": "model"},
        )
    return model


def quant_of_model(model: Any) -> QuantConfig:
    """How a loaded base is quantized, by its own config."""
    facts = getattr(model.config, "quantization_config", None)
    if facts is None:
        return QuantConfig(type="none")
    if not isinstance(facts, Mapping):
        facts = facts.to_dict()
    if not facts.get("load_in_4bit"):
        return QuantConfig(type="none")
    return QuantConfig(
        type=facts.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(facts.get("bnb_4bit_use_double_quant", False)),
    )


def _metrics(state: Any) -> dict[str, float]:
    """The newest numbers that the trainer logged."""
    found: dict[str, float] = {}
    for row in state.log_history:
        for key in ("loss", "eval_loss"):
            if isinstance(row.get(key), int | float):
                found["train_loss_last" if key == "loss" else "val_loss_after"] = row[key]
    return found


def _lower_priority() -> None:
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
