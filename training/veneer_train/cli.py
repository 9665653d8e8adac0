"""``veneer-train``: train adapters, and build data to train on."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from veneer_registry.errors import VeneerError

from veneer_train.config import load_config

__all__ = ["app", "main"]

app = typer.Typer(
    name="veneer-train",
    help="Train LoRA adapters in the server's own format.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Recipe(Enum):
    """Data sets that need no model hub."""

    CHAT = "chat"
    CODE = "code"


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Errors of ours end the command with one line and code 1; a bug shows its trace."""
    try:
        yield
    except VeneerError as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(
            f"veneer-train: {error}"
        )
        raise typer.Exit(1) from None


@contextmanager
def _reporter() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Shows the run: a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("train", total=None, note="")

        def report(row: Mapping[str, Any]) -> None:
            if row["event"] == "eval":
                console.print(
                    f"step {row['step']}: validation loss {row['val_loss']:.4f}, "
                    f"accuracy {row['val_accuracy']:.1%}"
                )
                return
            speed = row["tokens"] / max(row["seconds"], 1e-9)
            note = f"loss {row['loss']:.3f}  grad {row['grad_norm']:.2f}  {speed:.0f} tok/s"
            progress.update(task, completed=row["step"], total=row["steps"], note=note)
            if not console.is_terminal and (row["step"] % 10 == 0 or row["step"] == 1):
                console.print(f"step {row['step']}/{row['steps']}  {note}")

        yield report


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see docs/training.md.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder of the base model, in place of model.path.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace output.dir if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: Annotated[bool, typer.Option(help="Show traces of errors.")] = False,
) -> None:
    """Train an adapter over the 4-bit base and write its folder.

    Example: veneer-train train examples/configs/chat.yaml --base DIR --set train.steps=50
    """
    with _one_line_errors(debug):
        parsed = load_config(config, settings or ())
        if base is not None:
            model = dataclasses.replace(parsed.model, path=base)
            parsed = dataclasses.replace(parsed, model=model)
        # Imported here: torch and transformers take seconds, and --help needs neither.
        # bitsandbytes reports a missing optional kernel as it is imported.
        logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
        from transformers.utils import logging as transformers_logging

        from veneer_train.loop import train as run

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)  # between our dependencies
        with _reporter() as report:
            result = run(parsed, report, overwrite=overwrite)
    metrics = result.facts.metrics()
    if as_json:
        print(json.dumps({"folder": str(result.folder), "metrics": metrics}))
        return
    for name, value in metrics.items():
        print(f"{name:<22}{value:.4f}")
    print(
        f"\nadapter written to {result.folder}: veneer adapter push {result.folder} --name NAME"
    )


@app.command()
def data(
    recipe: Annotated[Recipe, typer.Argument(help="Which data set to build.")],
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl and val.jsonl.")],
    seed: Annotated[int, typer.Option(help="Same seed, same files.")] = 0,
    debug: Annotated[bool, typer.Option(help="Show traces of errors.")] = False,
) -> None:
    """Build a JSONL data set from what is on this machine.

    Example: veneer-train data chat --out .cache/veneer/train-data/chat
    """
    with _one_line_errors(debug):
        from veneer_train.recipes import build

        counts = build(recipe.value, out, seed)
    for name, count in counts.items():
        print(f"{out / name}: {count} samples")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="veneer-train")


if __name__ == "__main__":
    main()
