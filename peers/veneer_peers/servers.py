"""Peers that are servers: their programs, how they are started, and their gates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import Enum
from pathlib import Path
from typing import Final

from veneer_loadtest.commands.common import OUT
from veneer_loadtest.errors import BadOption
from veneer_loadtest.results import AnswersGate

from veneer_peers.compare import CompareOptions
from veneer_peers.gate import answers_line, check_answers
from veneer_peers.llama import llama_peer
from veneer_peers.peft import PeftPeerProcess
from veneer_peers.systems import HttpSystem
from veneer_peers.vllm import vllm_peer

__all__ = ["SLOTS", "Peer", "answer_gates", "programs_of", "started"]

SLOTS: Final = 32
"""Sequences that llama-server decodes at once under an open loop."""


class Peer(Enum):
    """Systems that `compare` can run beside a server."""

    PEFT = "peft"
    VLLM = "vllm"
    LLAMA = "llama-server"


def programs_of(
    peers: Sequence[Peer], vllm: Path | None, llama: Path | None, model: Path | None
) -> Mapping[Peer, tuple[Path, ...]]:
    """The files that each chosen peer is started from.

    Raises:
        BadOption: one of them was not given, or is not there.
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
async def started(
    programs: Mapping[Peer, tuple[Path, ...]],
    folder: Path,
    named: Mapping[str, Path],
    threads: int,
    scratch: Path,
    parallel: int,
) -> AsyncIterator[list[HttpSystem]]:
    """The chosen peers that are servers, started and ready."""
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


async def answer_gates(
    others: Sequence[HttpSystem],
    reference: PeftPeerProcess,
    options: CompareOptions,
) -> dict[str, AnswersGate]:
    """The gate of each peer, before any of them is measured.

    Raises:
        GateFailed: a peer does not answer with the adapters that it was asked for.
        PeerError: a peer rejected a request.
    """
    gates = {}
    streams = options.for_the_gate()
    for system in others:
        rows = await system.answers(streams, options.tokens)
        gates[system.name] = await check_answers(system.name, rows, reference, streams)
        OUT.print(answers_line(system.name, gates[system.name]), soft_wrap=True)
    return gates
