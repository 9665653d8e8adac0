"""The command ``veneer-loadtest``: compare, swap, prefix."""

from __future__ import annotations

import signal
import sys
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from veneer_client import AsyncClient

from veneer_loadtest import compare as comparing
from veneer_loadtest import prefix as prefixes
from veneer_loadtest import report, setup, workload
from veneer_loadtest import swap as swapping
from veneer_loadtest.cli_common import (
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
from veneer_loadtest.cli_common import run as run_command
from veneer_loadtest.peer import PeftPeerProcess
from veneer_loadtest.tables import compare_table, gate_line, prefix_table, swap_table

__all__ = ["cli", "main"]

cli = typer.Typer(
    help="Measure a Veneer server, and peers beside it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@cli.callback()
def top() -> None:
    """Measure a Veneer server, and peers beside it."""


class Peer(Enum):
    """Systems that `compare` can run beside a server."""

    PEFT = "peft"


@cli.command(
    epilog="Examples:\n\n  veneer-loadtest compare --spawn --peer peft --streams 1,8,32\n\n"
    "  veneer-loadtest compare --spawn --adapters runs/adapters --json result.json"
)
def compare(
    spawn: Spawn = False,
    server: Server = None,
    peer: Annotated[Peer, typer.Option(help="What to run beside it.")] = Peer.PEFT,
    streams: Annotated[str, typer.Option(help="Concurrent streams, by level.")] = "1,8,32",
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of adapter folders; else synthetic ones.")
    ] = None,
    generate: Annotated[int, typer.Option(help="Synthetic adapters to make.", min=1)] = 8,
    rank: Rank = 16,
    tokens: Annotated[int, typer.Option(help="New tokens of each stream.", min=2)] = 64,
    prompt_tokens: Annotated[str, typer.Option(help="Shortest..longest prompt.")] = "16..64",
    repeat: Annotated[int, typer.Option(help="Rounds of each system and level.", min=1)] = 3,
    base_folder: BaseFolder = None,
    threads: Threads = 0,
    server_flag: ServerFlag = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Tokens/s and latencies beside PEFT: same base, adapters, prompts and threads."""

    async def work() -> None:
        levels = setup.parse_streams(streams)
        lengths = setup.parse_range(prompt_tokens)
        folder = setup.find_base_folder(base_folder)
        shape = workload.read_base_shape(folder)
        used = threads or report.usable_cores()
        result: dict[str, Any] = {"kind": "compare", "conditions": report.conditions()}
        warn_if_busy()
        with tempfile.TemporaryDirectory(prefix="veneer-loadtest-") as scratch:
            named = (
                setup.find_adapters(adapters)
                if adapters
                else workload.make_adapters(
                    Path(scratch), shape, count=generate, rank=rank, seed=seed
                )
            )
            options = comparing.CompareOptions(
                adapters=named,
                vocab=shape.vocab,
                streams=levels,
                prompt_tokens=lengths,
                tokens=tokens,
                repeat=repeat,
                seed=seed,
            )
            OUT.print(f"seed {seed}; {len(named)} adapters; starting both systems", style="dim")
            async with (
                setup.target(
                    spawn=spawn,
                    address=server,
                    base_folder=folder,
                    threads=used,
                    flags=server_flag or (),
                ) as ours,
                PeftPeerProcess(folder, named, used, Path(scratch) / "peer.log") as theirs,
                setup.published(ours.client, named),
            ):
                info = await ours.client.info()
                gate = await comparing.check(ours.client, theirs, options)
                OUT.print(gate_line(gate), soft_wrap=True)
                measured = []
                for count in levels:
                    measured.append(
                        await comparing.measure(ours.client, theirs, options, count)
                    )
                    OUT.print(f"{count} streams: {measured[-1].ratio:.2f} x PEFT", style="dim")
                result |= {
                    "device": {"server": info.device, "peer": theirs.ready.device},
                    "versions": {**report.versions(PACKAGES), **theirs.ready.versions},
                    "commands": {
                        "server": ours.command,
                        "peer": "python -m veneer_loadtest.peft_process",
                    },
                    "workload": {
                        "adapters": list(named),
                        "rank": rank if adapters is None else None,
                        "prompt_tokens": lengths,
                        "tokens": tokens,
                        "repeat": repeat,
                        "threads": used,
                        "seed": seed,
                        "sampling": "greedy, end of sequence ignored",
                    },
                    "gate": gate.as_json(),
                    "levels": [level.as_json() for level in measured],
                    "summary": {f"ratio_{level.streams}": level.ratio for level in measured},
                }
        OUT.print(compare_table(measured))
        finish(result, json_file)

    run_command(work(), debug)


@cli.command(
    epilog="Examples:\n\n  veneer-loadtest swap --spawn\n\n"
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


@cli.command(
    epilog="Examples:\n\n  veneer-loadtest prefix --spawn\n\n"
    "  veneer-loadtest prefix --spawn --shared 1024 --streams 1,8 --json prefix.json"
)
def prefix(
    spawn: Spawn = False,
    server: Server = None,
    streams: Annotated[str, typer.Option(help="Concurrent streams, by level.")] = "1,8",
    generate: Annotated[int, typer.Option(help="Synthetic adapters; 0: the base.", min=0)] = 8,
    rank: Rank = 16,
    shared: Annotated[int, typer.Option(help="Tokens of the common beginning.", min=1)] = 512,
    own: Annotated[int, typer.Option(help="Tokens of each request's ending.", min=1)] = 16,
    tokens: Annotated[int, typer.Option(help="New tokens of each stream.", min=2)] = 32,
    repeat: Annotated[int, typer.Option(help="Rounds with and without.", min=1)] = 4,
    base_folder: BaseFolder = None,
    threads: Threads = 0,
    server_flag: ServerFlag = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """What the prefix cache gains where prompts begin alike."""

    async def work() -> None:
        levels = setup.parse_streams(streams)
        folder = setup.find_base_folder(base_folder)
        shape = workload.read_base_shape(folder)
        used = threads or report.usable_cores()
        result: dict[str, Any] = {"kind": "prefix", "conditions": report.conditions()}
        warn_if_busy()
        with tempfile.TemporaryDirectory(prefix="veneer-loadtest-") as scratch:
            named = workload.make_adapters(
                Path(scratch), shape, count=generate, rank=rank, seed=seed
            )
            async with (
                setup.target(
                    spawn=spawn,
                    address=server,
                    base_folder=folder,
                    threads=used,
                    flags=server_flag or (),
                ) as ours,
                setup.published(ours.client, named),
            ):
                options = prefixes.PrefixOptions(
                    adapters=tuple(named) or ("",),
                    vocab=shape.vocab,
                    shared=shared,
                    own=own,
                    tokens=tokens,
                    repeat=repeat,
                    seed=seed,
                )
                info = await ours.client.info()
                OUT.print(f"seed {seed}; {len(named)} adapters", style="dim")
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


def main() -> None:
    """Entry of the console script."""
    # As Ctrl-C does: what this run started is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cli()


if __name__ == "__main__":
    main()
