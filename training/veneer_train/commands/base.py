"""Commands on base models: ``import-gguf``, ``quantize``, ``plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.table import Table
from veneer_registry.screen import Screen

from veneer_train.base_folder import resolve_base
from veneer_train.commands.common import (
    AsJson,
    Base,
    Debug,
    errors,
    pulse,
    quiet_libraries,
    stderr,
)
from veneer_train.config import PRESETS, QuantConfig, load_config

IMPORT_EXAMPLES = "Example:\n\n  veneer-train import-gguf model.Q4_1.gguf --out model"
QUANTIZE_EXAMPLES = (
    "Examples:\n\n  veneer-train quantize --base smollm2-135m --out base-nf4\n\n"
    "  veneer-train quantize --base smollm2-135m --out base-fp4 --type fp4 --no-double-quant"
)
PLAN_EXAMPLES = (
    "Examples:\n\n  veneer-train plan --base smollm2-135m --preset paper --device cuda\n\n"
    "  veneer-train plan --base smollm2-135m --config chat.yaml --set train.batch=16\n\n"
    "  veneer-train plan --llama-65b --preset paper --device cuda --set data.max_len=512"
)


def import_gguf(
    file: Annotated[Path, typer.Argument(help="A GGUF file of a Llama-like model.")],
    out: Annotated[Path, typer.Option(help="Output folder; must not exist.")],
    debug: Debug = False,
) -> None:
    """Convert a GGUF file into a Hugging Face folder in bfloat16.

    Weights stored in fewer bits gain no precision. Digits are split as the
    file's tokenizer says, which transformers alone does not do for SmolLM.
    """
    with errors(debug), pulse("converting"):
        quiet_libraries()
        from veneer_train.llama_cpp.import_ import import_file

        import_file(file, out)
    print(out)


def quantize(
    base: Base,
    out: Annotated[Path, typer.Option(help="Output folder; must not exist.")],
    kind: Annotated[Literal["nf4", "fp4"], typer.Option("--type", help="Codebook.")] = "nf4",
    double_quant: Annotated[
        bool, typer.Option(help="Also quantize the scales (double quantization).")
    ] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a base in 4 bits, so that it loads quickly for serving and training."""
    with errors(debug), pulse("quantizing"):
        base_folder = resolve_base(base)
        quiet_libraries()
        from veneer_train.quantize import quantize as run

        saving = run(base_folder, out, QuantConfig(type=kind, double_quant=double_quant))
    rows = {
        "linear layers": (saving.linear_before, saving.linear_after),
        "whole model": (saving.whole_before, saving.whole_after),
    }
    if as_json:
        print(json.dumps({"folder": str(out), **rows}))
        return
    for name, (before, after) in rows.items():
        print(
            f"{name:<14}{before / 1e6:9.1f} MB -> {after / 1e6:7.1f} MB, "
            f"{1 - after / before:.1%} less"
        )
    print(f"written to {out}: serve adapters trained on it with --base {out}")


def plan(
    base: Annotated[
        str | None, typer.Option(help="The base model: a folder, a hub name or smollm2-135m.")
    ] = None,
    llama_65b: Annotated[
        bool, typer.Option("--llama-65b", help="Plan for LLaMA 65B, as in the QLoRA paper.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file of the run.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"{', '.join(PRESETS)}.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device of the run.")] = "cpu",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Estimate the memory of a run with QLoRA, LoRA and full fine-tuning, without
    loading anything."""
    with errors(debug):
        from veneer_train import plan as planning

        if (base is None) == (not llama_65b):
            raise typer.BadParameter("give --base smollm2-135m or --llama-65b")
        shape = planning.LLAMA_65B if base is None else planning.read_shape(resolve_base(base))
        parsed = load_config(config, settings or (), preset, under=_UNNEEDED)
        methods: tuple[planning.Method, ...] = ("qlora", "lora", "full")
        plans = [planning.plan(shape, parsed, method=m, device=device) for m in methods]
    if as_json:
        print(json.dumps({p.method: {"total": p.total, "parts": p.parts} for p in plans}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{shape.name}, {shape.parameters / 1e6:,.1f} M parameters")
    for each in plans:
        table.add_column(each.method, justify="right")
    for part in plans[0].parts:
        table.add_row(part, *(_size(p.parts[part]) for p in plans))
    table.add_row("[bold]peak[/bold]", *(f"[bold]{_size(p.total)}[/bold]" for p in plans))
    table.add_row(
        "trained parameters", *(f"{p.trained_parameters / 1e6:,.2f} M" for p in plans)
    )
    Screen().print(table)
    tokens = parsed.train.batch * parsed.data.max_len
    stderr().print(
        f"batches of {parsed.train.batch} x {parsed.data.max_len} = {tokens} tokens, rank "
        f"{parsed.lora.r}; `veneer-train lab qlora-vs-lora` measures it",
        style="dim",
    )


_UNNEEDED: Final[dict[str, Any]] = {
    "model": {"path": "-", "name": "-"},
    "data": {"train": "-"},
    "output": {"dir": "-"},
}
"""Settings that a run requires but that do not affect its memory."""


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
