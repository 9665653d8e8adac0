"""Commands on data: ``data``, ``inspect-data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from veneer_registry.screen import Screen

from veneer_train.base_folder import resolve_base
from veneer_train.commands.common import AsJson, Base, Debug, errors, pulse, quiet_libraries

DATA_EXAMPLES = "Example:\n\n  veneer-train data sql --out .cache/veneer/train-data/sql"
INSPECT_EXAMPLES = (
    "Examples:\n\n  veneer-train inspect-data my.jsonl --base smollm2-135m\n\n"
    "  veneer-train inspect-data my.jsonl --base smollm2-135m --samples 0 --json"
)


def data(
    recipe: Annotated[
        Literal["chat", "code", "sql"], typer.Argument(help="Data set to build.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl and val.jsonl.")],
    seed: Annotated[int, typer.Option(help="Same seed, same files.")] = 0,
    debug: Debug = False,
) -> None:
    """Build a JSONL data set from files on this machine."""
    with errors(debug), pulse("building the data set"):
        from veneer_train.recipes import build

        counts = build(recipe, out, seed)
    for name, count in counts.items():
        print(f"{out / name}: {count} samples")


def inspect_data(
    file: Annotated[Path, typer.Argument(help="JSONL, as for training.")],
    base: Base,
    samples: Annotated[int, typer.Option(help="Number of samples to show.", min=0)] = 3,
    loss_on: Annotated[Literal["assistant", "all"], typer.Option(help="Like data.loss_on.")] = (
        "assistant"
    ),
    template: Annotated[Path | None, typer.Option(help="Like data.template.")] = None,
    max_len: Annotated[int, typer.Option(help="Like data.max_len.")] = 512,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show which tokens of each sample a run would learn (green) and which not (dim), and
    counts and lengths. Samples longer than --max-len count as dropped."""
    with errors(debug):
        base_folder = resolve_base(base)
        quiet_libraries()
        from veneer_train.config import DataConfig
        from veneer_train.data import load_file
        from veneer_train.inspection import coloured, summary
        from veneer_train.model import load_tokenizer, read_template

        tokenizer = load_tokenizer(base_folder)
        options = DataConfig(
            train=str(file), loss_on=loss_on, max_len=max_len, on_truncated="drop"
        )
        text = read_template(str(template) if template is not None else None, tokenizer)
        found = load_file(file, options, tokenizer, text)
        facts = summary(found)
    if as_json:
        print(json.dumps(facts))
        return
    console = Screen(highlight=False, soft_wrap=True)
    for sample in found.samples[:samples]:
        console.rule(f"line {sample.line}", style="dim")
        console.print(coloured(sample, tokenizer))
    if samples:
        console.rule(style="dim")
    for name, value in facts.items():
        console.print(
            f"{name:<16}{value:.1%}" if isinstance(value, float) else f"{name:<16}{value}"
        )
