"""The command ``lab``: small experiments."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from veneer_registry.errors import InvalidField

from veneer_train.base_folder import resolve_base
from veneer_train.commands.common import Debug, errors, quiet_libraries, stderr
from veneer_train.config import read_preset
from veneer_train.plan import Method
from veneer_train.strict import apply_setting, overlay, read_yaml

Name = Literal["quant-error", "quant-ppl", "qlora-vs-lora", "rank", "optimizers", "swap"]

EXAMPLES = (
    "Examples:\n\n  veneer-train lab quant-error --base smollm2-135m --out lab/quant-error\n\n"
    "  veneer-train lab quant-ppl --base smollm2-135m --modes bf16,nf4-dq,int4 "
    "--out lab/ppl\n\n"
    "  veneer-train lab rank --base smollm2-135m --r 8,64 --set train.steps=200 "
    "--out lab/rank\n\n"
    "  veneer-train lab swap --adapters chat=DIR,code=DIR --out lab/swap"
)


def lab(
    name: Annotated[Name, typer.Argument(help="Lab to run.")],
    out: Annotated[
        Path, typer.Option(help="Output folder for table, CSV and plot; must be empty or new.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model: a folder, a hub name or smollm2-135m; all but swap need it."
        ),
    ] = None,
    modes: Annotated[
        str, typer.Option(help="quant-ppl: some of bf16, nf4, nf4-dq, fp4, int4.")
    ] = "bf16,nf4,nf4-dq,fp4,int4",
    tokens: Annotated[int, typer.Option(help="quant-ppl: tokens of text.", min=64)] = 16_384,
    window: Annotated[int, typer.Option(help="quant-ppl: tokens of context.", min=16)] = 512,
    ranks: Annotated[str, typer.Option("--r", help="rank: the ranks.")] = "16,32,64,128",
    methods: Annotated[
        str, typer.Option(help="qlora-vs-lora: some of qlora, lora, full.")
    ] = "qlora,lora,full",
    optimizers: Annotated[
        str | None,
        typer.Option(
            "--optim",
            help="optimizers: their names in transformers; default: AdamW in 32 and "
            "8 bits, on a GPU also both paged.",
        ),
    ] = None,
    adapters: Annotated[
        str | None, typer.Option(help="swap: two or more NAME=FOLDER, comma-separated.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="swap: use this server; default: start one."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="swap: repeats of each case.", min=1)] = 10,
    config: Annotated[
        Path | None, typer.Option(help="Labs that train: a YAML file of the runs' settings.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Labs that train: override a key."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads per run; 0: one per core.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    debug: Debug = False,
) -> None:
    """Run an experiment; write its table, CSV, plot, versions, seed and limitations."""
    with errors(debug):
        folder = None if name == "swap" else _needed(base)
        quiet_libraries()
        from veneer_train.labs.output import empty_folder, write

        empty_folder(out)
        command = " ".join(["veneer-train", *_shown(sys.argv[1:])])
        console = stderr()

        def told(line: str) -> None:
            console.print(line, style="dim")

        if folder is None:
            from veneer_train.labs.swap import swap

            made = swap(
                _adapters(adapters), server=server, repeats=repeats, seed=seed, command=command
            )
        else:
            if name == "quant-error":
                from veneer_train.labs.quant import quant_error

                made = quant_error(folder, seed=seed, command=command)
            elif name == "quant-ppl":
                from veneer_train.labs.quant import quant_ppl

                made = quant_ppl(
                    folder,
                    modes.split(","),
                    tokens=tokens,
                    window=window,
                    seed=seed,
                    command=command,
                    told=told,
                )
            else:
                from veneer_train.labs import training

                over: dict[str, Any] = read_yaml(config) if config else {}
                if preset := over.pop("preset", None):
                    over = overlay(read_preset(preset), over)
                for setting in settings or ():
                    apply_setting(over, setting)
                runs = training.Runs(
                    folder, out, over, seed=seed, threads=threads or _cores(), told=told
                )
                if name == "rank":
                    made = training.rank(runs, _numbers(ranks), command=command)
                elif name == "optimizers":
                    names = optimizers or training.usual_optimizers()
                    made = training.optimizers(runs, names.split(","), command=command)
                else:
                    chosen = _methods(methods, training.METHODS)
                    made = training.qlora_vs_lora(runs, chosen, command=command)
        page = write(made, out)
    print(page.read_text("utf-8"))


def _needed(base: str | None) -> Path:
    if base is not None:
        return resolve_base(base)
    raise InvalidField(
        "this lab needs the base model: --base smollm2-135m, or its folder",
        metadata={"field": "base"},
    )


def _adapters(text: str | None) -> dict[str, Path]:
    found = {}
    for part in (text or "").split(","):
        name, equals, folder = part.partition("=")
        if equals and (Path(folder) / "adapter_config.json").is_file():
            found[name] = Path(folder)
    if len(found) < 2:
        raise InvalidField(
            f"--adapters {text}: give two or more adapter folders as NAME=FOLDER,NAME=FOLDER",
            metadata={"field": "adapters"},
        )
    return found


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidField(
            f"--r {text}: give comma-separated integers", metadata={"field": "r"}
        ) from None


def _methods(text: str, known: Sequence[Method]) -> list[Method]:
    wanted = text.split(",")
    found = [method for method in known if method in wanted]
    if len(found) != len(wanted):
        raise InvalidField(
            f"--methods {text}: give some of {', '.join(known)}, separated by commas",
            metadata={"field": "methods"},
        )
    return found


def _cores() -> int:
    import os

    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _shown(arguments: list[str]) -> list[str]:
    """The command line without this machine's folders."""
    return [_FOLDERS.sub("", argument) for argument in arguments]


_FOLDERS: Final = re.compile(r"(?<![\w.~-])[~/](?:[^/\s,=]*/)+(?=[^/\s,=])")
"""The folders of an absolute path, without its last part."""
