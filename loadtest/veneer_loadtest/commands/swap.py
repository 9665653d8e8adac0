"""The command ``swap``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress
from veneer_client import AsyncClient
from veneer_registry.screen import Screen

from veneer_loadtest import report, setup, workload
from veneer_loadtest import swap as swapping
from veneer_loadtest.churn import ChurnOptions, churn
from veneer_loadtest.commands.common import (
    OUT,
    PACKAGES,
    BaseFolder,
    Debug,
    JsonFile,
    Rank,
    Seed,
    Server,
    ServerFlag,
    Spawn,
    Threads,
    warn_if_busy,
)
from veneer_loadtest.commands.common import run as run_command
from veneer_loadtest.commands.output import FailIf, HtmlFile, Label, Outputs
from veneer_loadtest.cpus import parse_cpus
from veneer_loadtest.load.session import StopSignal, stop_on_signals
from veneer_loadtest.load.summary import parse_limit, parse_seconds
from veneer_loadtest.results import Case, ChurnBy, ChurnFigures, SwapResult
from veneer_loadtest.tables import churn_table, swap_table

EXAMPLES = (
    "Examples:\n\n  veneer-loadtest swap --spawn\n\n"
    "  veneer-loadtest swap --server 127.0.0.1:50051 --samples 50 --json swap.json\n\n"
    "  veneer-loadtest swap --spawn --samples 1 --churn-by load --cpus 0/1\n\n"
    "  veneer-loadtest swap --spawn --churn 0 --fail-if 'disk_delta_ms>100'"
)

KEYS = (
    "first_token_ms",
    "device_delta_ms",
    "host_delta_ms",
    "disk_delta_ms",
    "disk_cached_delta_ms",
    "publish_to_first_token_ms",
    "churn_itl_p99_ratio",
    "churn_added_p99_ms",
    "churn_max_stall_steps",
)


def swap(
    spawn: Spawn = False,
    server: Server = None,
    samples: Annotated[int, typer.Option(help="Samples per case.", min=1)] = 20,
    rank: Rank = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt.", min=1)] = 40,
    churn_text: Annotated[
        str,
        typer.Option(
            "--churn",
            help="Length of each phase of streams with or without uploads; 0: no phases.",
        ),
    ] = "15s",
    churn_by: Annotated[
        ChurnBy,
        typer.Option(
            help="What to do while streams decode: upload adapters, or load them from DISK.",
        ),
    ] = "upload",
    churn_phases: Annotated[
        int, typer.Option(help="Number of phases of each kind.", min=1)
    ] = 2,
    base_folder: BaseFolder = None,
    threads: Threads = 0,
    cpus_text: Annotated[
        str,
        typer.Option(
            "--cpus",
            metavar="SERVER/CLIENT",
            help="CPUs of the spawned server and of the client, such as 0/1 or 0-2/3.",
        ),
    ] = "",
    server_flag: ServerFlag = None,
    seed: Seed = 1,
    label: Label = "",
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
    fail_if: FailIf = None,
    debug: Debug = False,
) -> None:
    """Measure the cost of swapping adapters, by the tier that holds the next one, and
    the effect of uploads on running streams."""

    async def work() -> None:
        limits = [parse_limit(each, KEYS) for each in fail_if or ()]
        outputs = Outputs(json_file, html_file, limits, {})
        outputs.check()
        phase_s = parse_seconds("--churn", churn_text)
        cpus = parse_cpus(cpus_text)
        used = threads or (len(cpus.server) if cpus else report.usable_cores())
        conditions = report.conditions()
        warn_if_busy()
        OUT.print(f"seed {seed}", style="dim")
        with stop_on_signals() as stop:
            async with setup.target(
                spawn=spawn,
                address=server,
                base_folder=base_folder,
                threads=used,
                flags=server_flag or (),
                cpus=cpus,
            ) as ours:
                info = await ours.client.info()
                options = swapping.SwapOptions(
                    base=setup.needed_shape(info, base_folder),
                    rank=rank,
                    prompt_tokens=prompt_tokens,
                    samples=samples,
                    seed=seed,
                    data_dir=ours.data_dir,
                )
                cases = swapping.case_figures(await _swap(ours.client, options, stop))
                OUT.print(swap_table(cases))
                if "disk_cold" not in cases:
                    OUT.print(
                        "[yellow]note:[/yellow] the adapter files stayed in the page cache, "
                        "so disk figures are for a warm cache (--spawn on a local disk drops "
                        "the cache)",
                        soft_wrap=True,
                    )
                churned = None
                if phase_s and not stop.event.is_set():
                    churned = await _churn(
                        ours.client,
                        options,
                        stop,
                        context=info.context_length,
                        phase_s=phase_s,
                        phases=churn_phases,
                        by=churn_by,
                    )
                    if churned is not None:
                        OUT.print(churn_table(churned))
        result = SwapResult(
            label=label,
            conditions=conditions,
            versions=report.versions(PACKAGES),
            target={
                "api": "veneer",
                "command": ours.command,
                "version": info.version,
                "device": info.device,
                "backend": info.backend,
                "base_model": info.base_model.name,
                "quantization": info.base_model.quantization,
                **({"cpus": cpus_text} if cpus else {}),
            },
            workload={
                "rank": rank,
                "adapter_bytes": _adapter_bytes(options),
                "prompt_tokens": prompt_tokens,
                "samples": samples,
                "threads": used,
                "seed": seed,
            },
            cases=cases,
            churn=churned,
            partial=stop.event.is_set(),
            why=stop.why,
            summary=swapping.summary(cases, churned),
        )
        outputs.deliver(result)

    run_command(work(), debug)


async def _churn(
    client: AsyncClient,
    options: swapping.SwapOptions,
    stop: StopSignal,
    *,
    context: int,
    phase_s: float,
    phases: int,
    by: ChurnBy,
) -> ChurnFigures | None:
    with tempfile.TemporaryDirectory(prefix="veneer-loadtest-") as scratch:
        named = workload.make_adapters(
            Path(scratch), options.base, count=4, rank=options.rank, seed=options.seed
        )
        async with setup.published(client, named):
            with Screen(stderr=True).status(f"streams during {by}s"):
                return await churn(
                    client,
                    ChurnOptions(
                        base=options.base,
                        adapters=tuple(named),
                        rank=options.rank,
                        phase_s=phase_s,
                        phases=phases,
                        context=context,
                        seed=options.seed,
                        by=by,
                    ),
                    Path(scratch),
                    stop.event.is_set,
                )


async def _swap(
    client: AsyncClient, options: swapping.SwapOptions, stop: StopSignal
) -> dict[Case, list[swapping.SwapSample]]:
    progress = Progress(console=Screen(stderr=True), transient=True)
    with tempfile.TemporaryDirectory(prefix="veneer-loadtest-") as scratch, progress:
        task = progress.add_task("swapping", total=options.samples)
        return await swapping.swap(
            client,
            options,
            Path(scratch),
            lambda: progress.advance(task),
            stop.event.is_set,
        )


def _adapter_bytes(options: swapping.SwapOptions) -> int:
    """Bytes of one synthetic adapter in bf16."""
    per_layer = sum(
        options.rank * (rows + columns) for rows, columns in options.base.projections().values()
    )
    return 2 * options.base.layers * per_layer
