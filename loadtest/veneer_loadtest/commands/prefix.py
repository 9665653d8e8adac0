"""The command ``prefix``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer_loadtest import prefix as prefixes
from veneer_loadtest import report, setup, workload
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
from veneer_loadtest.commands.load_options import numbers_of
from veneer_loadtest.tables import prefix_table

EXAMPLES = (
    "Examples:\n\n  veneer-loadtest prefix --spawn\n\n"
    "  veneer-loadtest prefix --spawn --shared 1024 --streams 1,8 --json prefix.json"
)


def prefix(
    spawn: Spawn = False,
    server: Server = None,
    streams: Annotated[str, typer.Option(help="Concurrent streams of each level.")] = "1,8",
    generate: Annotated[int, typer.Option(help="Synthetic adapters; 0: the base.", min=0)] = 8,
    rank: Rank = 16,
    shared: Annotated[int, typer.Option(help="Tokens of the shared prefix.", min=1)] = 512,
    own: Annotated[int, typer.Option(help="Tokens of each request's own suffix.", min=1)] = 16,
    tokens: Annotated[int, typer.Option(help="New tokens per stream.", min=2)] = 32,
    repeat: Annotated[int, typer.Option(help="Rounds with and without the cache.", min=1)] = 4,
    base_folder: BaseFolder = None,
    threads: Threads = 0,
    server_flag: ServerFlag = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Measure the gain of the prefix cache when prompts share a prefix."""

    async def work() -> None:
        levels = numbers_of("--streams", streams, least=1)
        used = threads or report.usable_cores()
        result: dict[str, Any] = {"kind": "prefix", "conditions": report.conditions()}
        warn_if_busy()
        async with setup.target(
            spawn=spawn,
            address=server,
            base_folder=base_folder,
            threads=used,
            flags=server_flag or (),
        ) as ours:
            info = await ours.client.info()
            shape = setup.needed_shape(info, base_folder)
            with tempfile.TemporaryDirectory(prefix="veneer-loadtest-") as scratch:
                named = workload.make_adapters(
                    Path(scratch), shape, count=generate, rank=rank, seed=seed
                )
                options = prefixes.PrefixOptions(
                    adapters=tuple(named) or ("",),
                    vocab=shape.vocab,
                    shared=shared,
                    own=own,
                    tokens=tokens,
                    repeat=repeat,
                    seed=seed,
                )
                OUT.print(f"seed {seed}; {len(named)} adapters", style="dim")
                async with setup.published(ours.client, named):
                    measured = [
                        await prefixes.measure(ours.client, options, count) for count in levels
                    ]
            result |= {
                "device": {"server": info.device},
                "versions": report.versions(PACKAGES),
                "commands": {"server": ours.command},
                "workload": {
                    "adapters": len(named),
                    "rank": rank,
                    "shared": shared,
                    "own": own,
                    "tokens": tokens,
                    "repeat": repeat,
                    "threads": used,
                    "seed": seed,
                },
                "levels": [level.as_json() for level in measured],
                "summary": {
                    key: value
                    for level in measured
                    for key, value in (
                        (f"first_token_gain_{level.streams}", level.first_token_gain),
                        (f"throughput_gain_{level.streams}", level.throughput_gain),
                    )
                },
            }
        OUT.print(prefix_table(measured))
        finish(result, json_file)

    run_command(work(), debug)
