"""The whole check: kernels, answers, speed, swaps, training. What fails is told, not hidden."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from tests.gpu.cards import card_of
from tests.gpu.check.result import GpuCheck, Kernels, Serving, Training
from tests.gpu.check.runs import Failed, Plan, Run, Runner, read, trained

METHODS: Final = ("qlora", "lora")


@dataclass
class _Found:
    answers: dict[str, float] = field(default_factory=dict)
    serving: list[Serving] = field(default_factory=list)
    swap: dict[str, float] = field(default_factory=dict)
    training: list[Training] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Notes a failure, so that what can still be measured is."""
        try:
            yield
        except (Failed, OSError, ValueError, KeyError, TypeError) as error:
            what = (
                str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            )
            self.failed[name] = what


def check(
    plan: Plan,
    kernels: Mapping[str, Any],
    runner: Runner,
    *,
    seeds: int,
    tell: Callable[[str], None] = print,
) -> GpuCheck:
    """Check, then measure.

    Args:
        kernels: the self-test's answer, of a card that was found.
        runner: runs the commands.
    """
    began, found = time.monotonic(), _Found()
    card = card_of(kernels["name"])

    def result(run: Run) -> dict[str, Any]:
        tell(f"{run.name} ...")
        runner(run.command, run.file)
        return read(run.file)

    wrong = dict(kernels.get("wrong", {}))
    if kernels["why"]:
        found.failed["kernels"] = kernels["why"]
    else:
        peft: dict[tuple[int, int], float] = {}
        for adapters in plan.adapters:
            with found.step(f"answers of {adapters} adapters"):
                compared = result(plan.answers(adapters))
                found.answers[str(adapters)] = compared["gate"]["mean"]
                for level in compared["levels"]:
                    speed = level["systems"]["peft"]["tokens_per_s"]["median"]
                    peft[adapters, level["streams"]] = speed
        # Speed counts only where answers are right.
        if found.answers:
            for streams in plan.streams:
                with found.step(f"{streams} streams"):
                    found.serving += plan.served(streams, result(plan.load(streams)), card)
            with found.step("swaps"):
                found.swap = result(plan.swap())["summary"]
        found.serving = [
            msgspec.structs.replace(each, ratio_to_peft=each.tokens_per_s / speed)
            if (speed := peft.get((each.adapters, each.streams)))
            else each
            for each in found.serving
        ]
    # One after the other: a base may fit into the card's memory in 4 bits and not in 16.
    for method in METHODS:
        with found.step(f"training by {method}"):
            run = plan.training(method)
            tell(f"{run.name} ...")
            runner(run.command, run.file)
            now = trained(run.file)
            found.training.append(now)
            if not now.val_loss < now.base_loss:
                raise Failed(f"the loss goes from {now.base_loss:.3f} to {now.val_loss:.3f}")
    return GpuCheck(
        card=kernels["name"],
        capability=kernels["capability"],
        versions={name: kernels.get(name, "") for name in ("torch", "cuda", "triton")},
        base=plan.base.name,
        kernels=Kernels(
            checked=list(kernels.get("checked", ())),
            wrong=wrong,
            seeds=seeds,
            seconds=kernels.get("seconds", 0.0),
        ),
        answers=found.answers,
        serving=found.serving,
        swap=found.swap,
        training=found.training,
        failed=found.failed,
        seconds=time.monotonic() - began,
    )
