"""The command ``swap``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from veneer_client import AsyncClient

from veneer_loadtest import report, setup, workload
from veneer_loadtest import swap as swapping
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
    finish,
    warn_if_busy,
)
from veneer_loadtest.commands.common import run as run_command
from veneer_loadtest.tables import swap_table

__all__ = ["EXAMPLES", "swap"]

EXAMPLES = (
    "Examples:\n\n  veneer-loadtest swap --spawn\n\n"
    "  veneer-loadtest swap --server 127.0.0.1:50051 --samples 50 --json swap.json"
)


def swap(
    spawn: Spawn = False,
    server: Server = None,
    samples: Annotated[int, typer.Option(help="Of each case.", min=1)] = 20,
    rank: Rank = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Of each prompt.", min=1)] = 40,
    base_folder: BaseFolder = None,
    threads: Threads = 0,
    server_flag: ServerFlag = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """What a change of adapter costs, by the tier that holds the next one."""

    async def work() -> None:
        folder = setup.find_base_folder(base_folder)
        used = threads or report.usable_cores()
        options = swapping.SwapOptions(
            base=workload.read_base_shape(folder),
            rank=rank,
            prompt_tokens=prompt_tokens,
            samples=samples,
            seed=seed,
        )
        result: dict[str, Any] = {"kind": "swap", "conditions": report.conditions()}
        warn_if_busy()
        async with setup.target(
            spawn=spawn,
            address=server,
            base_folder=folder,
            threads=used,
            flags=server_flag or (),
        ) as ours:
            info = await ours.client.info()
            outcome = await _swap(ours.client, options)
            result |= {
                "device": {"server": info.device},
                "versions": report.versions(PACKAGES),
                "commands": {"server": ours.command},
                "workload": {
                    "rank": rank,
                    "adapter_bytes": _adapter_bytes(options),
                    "prompt_tokens": prompt_tokens,
                    "samples": samples,
                    "threads": used,
                    "seed": seed,
                },
                "cases": outcome.as_json(),
                "summary": outcome.summary(),
            }
        OUT.print(swap_table(outcome))
        finish(result, json_file)

    run_command(work(), debug)


async def _swap(client: AsyncClient, options: swapping.SwapOptions) -> swapping.SwapResult:
    OUT.print(f"seed {options.seed}", style="dim")
    progress = Progress(console=Console(stderr=True), transient=True)
    with tempfile.TemporaryDirectory(prefix="veneer-loadtest-") as scratch, progress:
        task = progress.add_task("swapping", total=options.samples)
        return await swapping.swap(
            client, options, Path(scratch), lambda: progress.advance(task)
        )


def _adapter_bytes(options: swapping.SwapOptions) -> int:
    """Bytes of one synthetic adapter in bf16."""
    per_layer = sum(
        options.rank * (rows + columns) for rows, columns in options.base.projections().values()
    )
    return 2 * options.base.layers * per_layer
