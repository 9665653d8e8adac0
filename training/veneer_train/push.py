"""Publishes adapters from a training run, during it and at its end.

`PushCallback` works with any Hugging Face style trainer whose model is a PEFT model
(Trainer, TRL's SFTTrainer): every N steps it copies the adapter and publishes it
from a thread, so that training waits only for the copy.
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
from veneer_train.export import AdapterSnapshot, model_card, take, write_folder
from veneer_train.manifest import FORMAT, versions
from veneer_train.manifest import fingerprint as fingerprint_of
from veneer_train.plain_json import finite

_NICE: Final = 10


@dataclass(frozen=True, slots=True)
class Moment:
    """The progress of training.

    Attributes:
        step: optimiser steps done.
        tokens: tokens seen so far; 0 if the trainer does not count them.
        metrics: the latest numbers that it logged.
    """

    step: int
    tokens: int
    metrics: Mapping[str, float]


Write = Callable[[AdapterSnapshot, Path, Moment], None]
"""Writes the folder of an adapter as of a moment."""


@dataclass(frozen=True, slots=True)
class PushTarget:
    """Where to publish.

    Attributes:
        address: host:port of a server.
        name: adapter name.
        alias: alias to point at the last revision, such as ``prod``; "" for none.
    """

    address: str
    name: str
    alias: str = ""


@dataclass(frozen=True, slots=True)
class PushOutcome:
    """Outcome of a publication.

    Attributes:
        revision: revision of the adapter; "" if it failed.
        error: why it failed, or "".
    """

    step: int
    revision: str = ""
    error: str = ""


def check_target(target: PushTarget, base: BaseFingerprint | None) -> tuple[str, ...]:
    """Ask a server, before hours of training, whether it will accept the adapter; returns
    warnings.

    Raises:
        InvalidField: the name or alias is not allowed.
        BaseModelMismatch: the server serves another base.
        Unauthenticated, PermissionDenied: the server does not let this caller push.
        ServerUnreachable: no server answers.
    """
    check_name(target.name)
    if target.alias:
        check_name(target.alias)
    with Client(target.address) as client:
        served = client.info().base_model
        client.check_push(target.name)
    spec = BaseSpec(served.name, 0, {}, BaseFingerprint(**asdict(served.fingerprint)))
    return check_base(base, spec)[1] if base is not None else ()


def publish(target: PushTarget, folder: Path, *, step: int | None = None) -> Pushed:
    """Push a folder, replacing the name's current revision, and move the alias to it.

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

    A failed publication is reported (``on_publication``) and does not affect the run. While
    one is running, at most one waits, and a newer one replaces it.

    Args:
        address, name: the server's address and the adapter's name.
        every: steps between publications; 0: only at the end.
        alias: alias that is moved to the last revision at the end.
        base: folder of the base model, for the fingerprint that lets a server refuse
            adapters of another base; None: the adapter does not record its base.
        base_name: the base's logical name.
        fingerprint: the base's fingerprint, to give instead of its folder.
        at_end: publish the adapter when training ends; if False, the caller does that, and
            the last step is not published here.
        on_publication: called with each outcome, from another thread.
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
        on_publication: Callable[[PushOutcome], None] = lambda done: None,
        write: Write | None = None,
    ) -> None:
        if every < 0:
            raise InvalidField(
                f"every={every}: use 0 (publish only at the end) or more",
                metadata={"field": "every"},
            )
        self._target = PushTarget(address, name, alias)
        self._every = every
        self._base_name = base_name or (base.name if base is not None else "")
        self._folder = base
        self._base = fingerprint
        self._at_end = at_end
        self._told = on_publication
        self._write = write or self._write_plain
        self._worker: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._waiting: tuple[AdapterSnapshot, Moment, PushTarget] | None = None
        self.publications: list[PushOutcome] = []

    # ------------------------------------------------------------- Trainer's calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check model and server first. Raises as `check_target`, and InvalidField for a model
        without an adapter: a run whose result cannot be published must not start."""
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
        """Publish every ``every`` steps. Not in `on_step_end`, since the step is checked for
        divergence only after that."""
        step = int(state.global_step)
        if self._worker is not None and self._every and step and step % self._every == 0:
            self._submit(kwargs["model"], state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for a running publication, then publish the final adapter."""
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
        # The alias moves only at the end.
        target = self._target if last else replace(self._target, alias="")
        try:
            adapter = take(peft_model(model), self._base_name)
        except Exception as error:  # training continues after any error
            self._done(PushOutcome(moment.step, error=f"{type(error).__name__}: {error}"))
            return
        with self._lock:
            self._waiting = (adapter, moment, target)
        assert self._worker is not None, "called between the run's begin and end"
        self._worker.submit(self._next)

    def _next(self) -> None:
        with self._lock:
            taken, self._waiting = self._waiting, None
        if taken is None:
            return  # a newer one replaced it and was published
        adapter, moment, target = taken
        try:
            with tempfile.TemporaryDirectory(prefix="veneer-push-") as scratch:
                folder = Path(scratch) / target.name
                self._write(adapter, folder, moment)
                pushed = publish(target, folder, step=moment.step)
            done = PushOutcome(moment.step, pushed.adapter.revision)
        except Exception as error:  # includes what libraries raise if the disk is full
            done = PushOutcome(moment.step, error=str(error) or type(error).__name__)
        self._done(done)

    def _done(self, done: PushOutcome) -> None:
        self.publications.append(done)
        self._told(done)

    def _write_plain(self, adapter: AdapterSnapshot, folder: Path, moment: Moment) -> None:
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
    """The PEFT model inside the wrappers of accelerate or DeepSpeed."""
    while not hasattr(model, "peft_config") and hasattr(model, "module"):
        model = model.module
    if not hasattr(model, "peft_config"):
        raise InvalidField(
            "the trainer's model has no adapter: give it a PEFT model, or a peft_config",
            metadata={"field": "model"},
        )
    return model


def quant_of_model(model: Any) -> QuantConfig:
    """How a loaded base is quantized, by its config."""
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
    """The latest numbers that the trainer logged."""
    found: dict[str, float] = {}
    for row in state.log_history:
        for key in ("loss", "eval_loss"):
            if isinstance(row.get(key), int | float):
                found["train_loss_last" if key == "loss" else "val_loss_after"] = row[key]
    return found


def _lower_priority() -> None:
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
