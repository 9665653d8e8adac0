"""The command ``train``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from veneer_registry.errors import InvalidField, VeneerError

from veneer_train.base_folder import resolve_base
from veneer_train.checkpoint import last_step
from veneer_train.commands.common import (
    AsJson,
    Debug,
    Reporter,
    errors,
    quiet_libraries,
    reporter,
    share_cores,
)
from veneer_train.config import PRESETS, load_config

if TYPE_CHECKING:
    from veneer_train.config import TrainConfig
    from veneer_train.estimate import Estimate
    from veneer_train.loop import Snapshots, TrainResult
    from veneer_train.push import PushOutcome, PushTarget

EXAMPLES = (
    "Examples:\n\n"
    "  veneer-train train examples/configs/chat.yaml --base smollm2-135m "
    "--set train.steps=50\n\n"
    "  veneer-train train --preset quick --base smollm2-135m --set data.train=my.jsonl "
    "--set output.dir=my-adapter\n\n"
    "  veneer-train train sql.yaml --push 127.0.0.1:50051 --name sql --alias prod "
    "--push-every 50"
)

Report = Callable[[Mapping[str, Any]], None]


def train(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file; see docs/training.md.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"Defaults that the file overrides: {', '.join(PRESETS)}."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key; repeatable."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model, overriding model.path: a folder, a hub name or smollm2-135m."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace output.dir if it exists and start over.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Publish the adapter to this server."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name to publish the adapter under.")] = None,
    alias: Annotated[str, typer.Option(help="Alias to point to it: prod sets NAME/prod.")] = "",
    push_every: Annotated[
        int,
        typer.Option(
            metavar="STEPS",
            help="Also publish every STEPS steps during training.",
            min=0,
        ),
    ] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train an adapter on the 4-bit base and write its folder."""
    parsed: TrainConfig | None = None
    result: TrainResult | None = None
    with errors(debug, lambda: _kept(parsed) if result is None else _written(result, name)):
        parsed = load_config(config, settings or (), preset, base=base)
        if (push is None) != (name is None):
            raise InvalidField(
                "--push HOST:PORT and --name NAME belong together", metadata={"field": "name"}
            )
        if push is None and (alias or push_every):
            raise InvalidField(
                "--alias and --push-every need --push HOST:PORT and --name NAME",
                metadata={"field": "push"},
            )
        resolve_base(parsed.model.path)  # fail before imports, which take seconds
        with reporter() as report:
            report.doing("importing PyTorch")
            if push is not None:
                share_cores(push)
            # Imported here: torch and transformers take seconds, and --help needs neither.
            quiet_libraries()
            from veneer_train.push import PushTarget
            from veneer_train.trainer import main_process

            target = None if push is None or name is None else PushTarget(push, name, alias)
            if target is not None and parsed.lora.dora:
                raise InvalidField(
                    "servers accept DoRA adapters only merged into the base: train without "
                    "--push, then use veneer-train merge",
                    metadata={"field": "lora.dora"},
                )
            result = _run(parsed, target, push_every, overwrite, report)
            if not main_process():
                return
            report.doing("publishing")
            published = _publish(target, result) if target is not None else None
    _show(result, published, as_json)


def _kept(config: TrainConfig | None) -> str:
    """What a stopped run leaves behind, and how to resume it."""
    if config is None:
        return "nothing had begun"
    output = config.output
    if (step := last_step(output.checkpoints_dir)) is not None:
        kept = f"the checkpoint of step {step} is kept in {output.checkpoints_dir}"
        if output.resume == "never":
            return (
                f"{kept}; to resume from it, add --set output.resume=auto: the same command "
                "without that removes it"
            )
        return f"{kept}; the same command resumes from it"
    if not output.save_every:
        return "nothing is kept, as output.save_every is 0; the same command starts anew"
    return (
        f"nothing is kept before the first checkpoint, at step {output.save_every}; the same "
        "command starts anew (sooner: --set output.save_every=N)"
    )


def _written(result: TrainResult, name: str | None) -> str:
    """Like `_kept`, for a run that has ended."""
    return f"the adapter is in {result.folder}; {_next(result, name)}"


def _next(result: TrainResult, name: str | None) -> str:
    """How to get an adapter served that was not published."""
    if result.dora:
        return f"to serve DoRA, merge it: veneer-train merge {result.folder} --out DIR ..."
    return f"publish it: veneer adapter push {result.folder} --name {name or 'NAME'}"


def _run(
    config: TrainConfig,
    target: PushTarget | None,
    push_every: int,
    overwrite: bool,
    report: Reporter,
) -> TrainResult:
    from veneer_train.loop import train as run

    if target is None:
        return run(
            config, report, overwrite=overwrite, expect=_expect(report), doing=report.doing
        )
    from veneer_train.push import check_target

    return run(
        config,
        report,
        overwrite=overwrite,
        callbacks=lambda snapshots: (_callback(target, push_every, snapshots, report),),
        expect=_expect(report),
        # Check before hours of training, not after.
        check_base=lambda base: check_target(target, base),
        doing=report.doing,
    )


def _expect(report: Report) -> Callable[[Estimate], None]:
    from veneer_train.trainer import main_process

    def told(estimate: Estimate) -> None:
        if main_process():
            report({"event": "expected", "words": str(estimate)})

    return told


def _callback(target: PushTarget, every: int, snapshots: Snapshots, report: Report) -> Any:
    from veneer_train.push import PushCallback

    def told(done: PushOutcome) -> None:
        if done.error:
            report({"event": "push_failed", "step": done.step, "error": done.error})
        else:
            report({"event": "pushed", "step": done.step, "revision": done.revision})

    return PushCallback(
        target.address,
        target.name,
        every=every,
        fingerprint=snapshots.base,
        at_end=False,  # `_publish` publishes the final folder, rounded and measured
        on_publication=told,
        write=snapshots.write_moment,
    )


def _publish(target: PushTarget, result: TrainResult) -> str:
    """Publish the adapter and return its revision.

    Raises:
        VeneerError: the server does not accept it; the message says where the adapter is.
    """
    from veneer_train.push import publish

    try:
        return publish(target, result.folder, step=result.facts.steps).adapter.revision
    except VeneerError as error:
        error.message += f"; the adapter is in {result.folder}: veneer adapter push it later"
        raise


def _show(result: TrainResult, published: str | None, as_json: bool) -> None:
    metrics = result.facts.metrics()
    if as_json:
        facts = {"folder": str(result.folder), "metrics": metrics, "revision": published}
        print(json.dumps(facts))
        return
    for name, value in metrics.items():
        print(f"{name:<22}{value:.4f}")
    print(f"\nadapter written to {result.folder}")
    print(_next(result, None) if published is None else f"published as {published[:12]}")
