"""The command ``compare``."""

from __future__ import annotations

import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer_loadtest import compare as comparing
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
from veneer_loadtest.peer import PeftPeerProcess
from veneer_loadtest.tables import compare_table, gate_line

__all__ = ["EXAMPLES", "compare"]


class Peer(Enum):
    """Systems that `compare` can run beside a server."""

    PEFT = "peft"


EXAMPLES = (
    "Examples:\n\n  veneer-loadtest compare --spawn --peer peft --streams 1,8,32\n\n"
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
