"""Commands on trained adapters: ``eval``, ``verify``, ``merge``, ``export-gguf``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from veneer_registry.errors import InvalidField
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

EVAL_EXAMPLES = (
    "Examples:\n\n  veneer-train eval my-sql --base smollm2-135m --data sql/val.jsonl "
    "--record\n\n"
    "  veneer-train eval my-sql --base smollm2-135m --data sql/val.jsonl --limit 20 "
    "--no-reference"
)
VERIFY_EXAMPLES = (
    "Examples:\n\n  veneer-train verify my-sql --base smollm2-135m\n\n"
    "  veneer-train verify my-sql --base smollm2-135m --data sql/val.jsonl "
    "--server 127.0.0.1:50051"
)
MERGE_EXAMPLES = (
    "Examples:\n\n  veneer-train merge my-sql --base smollm2-135m --out my-sql-merged "
    "--data sql/val.jsonl\n\n"
    "  veneer-train merge my-sql --base smollm2-135m --dtype float16 --out my-sql-merged\n\n"
    "  veneer-train merge my-sql --base smollm2-135m --into source --out my-sql-merged"
)
EXPORT_EXAMPLES = (
    "Examples:\n\n  veneer-train export-gguf my-sql --base smollm2-135m --out my-sql.gguf\n\n"
    "  veneer-train export-gguf my-sql-merged --out my-sql-merged.gguf --type q8_0"
)

Adapter = Annotated[Path, typer.Argument(help="The adapter's folder.")]
Data = Annotated[Path, typer.Option(help="JSONL, as for training.")]
MaxLen = Annotated[
    int | None,
    typer.Option(help="Skip samples with more tokens; default: as in training."),
]


def evaluate(
    adapter: Adapter,
    base: Base,
    data: Data,
    max_len: MaxLen = None,
    limit: Annotated[
        int | None, typer.Option(help="Maximum number of samples to use.", min=1)
    ] = None,
    reference: Annotated[
        bool, typer.Option(help="Also measure the base in 16 bits (needs more memory).")
    ] = True,
    record: Annotated[
        bool, typer.Option("--record", help="Write the figures into the adapter's manifest.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare an adapter with its base in 4 and in 16 bits: loss, perplexity, and tasks if
    samples have a check."""
    with errors(debug), pulse("importing PyTorch") as running:
        base_folder = resolve_base(base)
        quiet_libraries()
        from veneer_train import measure

        if record:
            measure.check_recordable(adapter)
        options = measure.data_options(adapter, data, max_len=max_len)
        console = stderr()

        def told(line: str) -> None:
            console.print(line, style="dim")
            running.printed()
            running.doing(line)

        running.doing("loading the base")
        found = measure.measure(
            base_folder,
            adapter,
            data,
            options,
            reference=reference,
            limit=limit,
            told=told,
        )
        if record:
            measure.record(adapter, data, found)
    if as_json:
        print(json.dumps({each.name: each.metrics() for each in found}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(data.name)
    for column in ("loss", "perplexity", "accuracy", *found[0].tasks):
        table.add_column(column, justify="right")
    for each in found:
        table.add_row(
            each.name,
            f"{each.loss.loss:.4f}",
            f"{each.loss.perplexity:.3f}",
            f"{each.loss.accuracy:.1%}",
            *(
                f"{s.share:.1%} ({s.low:.1%} to {s.high:.1%} of {s.asked})"
                for s in each.tasks.values()
            ),
        )
    Screen().print(table)


def verify(
    adapter: Adapter,
    base: Base,
    data: Annotated[
        Path | None, typer.Option(help="Measure the manifest's figure for this file again.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Check whether this server would accept the adapter."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Check that an adapter is complete, fits this base, and reaches its manifest's figures."""
    with errors(debug), pulse("verifying"):
        base_folder = resolve_base(base)
        quiet_libraries()
        from veneer_train.verify import verify as run

        for line in run(adapter, base_folder, data=data, server=server):
            print(line)


def merge(
    adapter: Adapter,
    base: Base,
    out: Annotated[Path, typer.Option(help="Output folder; must not exist.")],
    into: Annotated[
        Literal["dequant", "source"],
        typer.Option(
            help="Merge into the dequantized base (as served), or into the original one."
        ),
    ] = "dequant",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        typer.Option(
            help="Dtype of the written weights. float32 is lossless; the others need "
            "half the space, but bfloat16 can lose most of a lightly trained adapter."
        ),
    ] = "float32",
    data: Annotated[
        Path | None,
        typer.Option(help="Compare on this JSONL file; default: four short texts."),
    ] = None,
    limit: Annotated[
        int, typer.Option(help="Maximum number of samples of that file to use.", min=1)
    ] = 64,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base. Reports how much of the adapter's change is lost to
    rounding, and how far the result is from the 4-bit and the 16-bit base with the adapter."""
    with errors(debug), pulse("merging"):
        base_folder = resolve_base(base)
        quiet_libraries()
        from veneer_train.merge_report import merge_and_compare

        report = merge_and_compare(
            base_folder, adapter, out, into, dtype=dtype, data=data, limit=limit
        )
        for warning in report.warnings():
            stderr().print(f"warning: {warning}", style="yellow", markup=False)
    if as_json:
        print(json.dumps({"folder": str(out), **report.as_json()}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{out.name}, from")
    columns = ["logits, largest", "logits, relative", "KL, nats a token", "same choice"]
    for column in [*columns, *(["its answer loss"] if report.losses else [])]:
        table.add_column(column, justify="right")
    for name, facts in report.divergences.items():
        table.add_row(
            name,
            f"{facts.largest:.4f}",
            f"{facts.relative:.2e}",
            f"{facts.kl:.2e}",
            f"{facts.same_first:.2%}",
            *([f"{report.losses[name]:.4f}"] if report.losses else []),
        )
    Screen().print(table)
    if report.losses:
        print(
            f"answer loss of {out.name}: {report.losses['merged']:.4f} "
            f"({report.samples} samples of {report.data})"
        )
    rounding = report.rounding
    print(
        f"rounding to {dtype} / delta: {rounding.of_delta:.2%} of the norm, at most "
        f"{rounding.worst:.2%} ({rounding.worst_module or 'no module'})"
    )


def export_gguf(
    folder: Annotated[
        Path, typer.Argument(help="An adapter, or a model (a base or a merged one).")
    ],
    out: Annotated[Path, typer.Option(help="Output file.")],
    base: Annotated[
        str | None,
        typer.Option(help="An adapter's base: a folder, a hub name or smollm2-135m."),
    ] = None,
    kind: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option(
            "--type",
            help="Type of a model's matrices; default: as in the folder. An adapter's are f32.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a GGUF file for llama.cpp, of a model or of an adapter (which needs --base)."""
    with errors(debug), pulse("exporting"):
        is_adapter = (folder / "adapter_config.json").is_file()
        if is_adapter and base is None:
            raise InvalidField(
                f"{folder} is an adapter: give --base, the folder of its base model",
                metadata={"field": "base"},
            )
        model = resolve_base(base if is_adapter and base is not None else str(folder))
        quiet_libraries()
        from veneer_train.llama_cpp.export import export_adapter, export_model
        from veneer_train.merge_report import MUCH_ROUNDING

        if is_adapter:
            export_adapter(folder, model, out)
        else:
            lost = export_model(model, out, kind)
            if lost > MUCH_ROUNDING:
                stderr().print(
                    f"warning: {lost:.0%} of the merged adapter's change is lost to "
                    "rounding: merge with --dtype float32 and export with --type f32, or "
                    "export the adapter itself",
                    style="yellow",
                    markup=False,
                )
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
