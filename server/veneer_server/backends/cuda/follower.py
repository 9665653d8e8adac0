"""The processes that serve a base divided among GPUs (``--tensor-parallel``), one per GPU.

The engine's process leads and uses the first GPU. It loads its part, then starts the others,
which find the quantized base on disk. They end when the leader closes its connections or dies.
If a follower fails before that, the engine ends too, and is restarted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from veneer_registry.child_python import child_python
from veneer_registry.errors import VeneerError

from veneer_server import logs
from veneer_server.backends.cuda import chosen
from veneer_server.backends.parallel.leading import Leading, MemberLink, PartDecoder, follow
from veneer_server.backends.parallel.peers import Member, Peers
from veneer_server.backends.parallel.sharding import Shard
from veneer_server.models.config import read_decoder_config
from veneer_server.wire.messages import EngineConfig

log = logging.getLogger(__name__)

MODULE: Final = "veneer_server.backends.cuda.follower"
_LOST: Final = 70
"""Exit status of an engine that has lost a follower."""


@dataclass(frozen=True, slots=True)
class _Given:
    """The first message to a follower: its settings.

    Attributes:
        file: see `Device.join`.
    """

    config: EngineConfig
    num_blocks: int
    index: int
    file: str


def lead(
    config: EngineConfig,
    num_blocks: int,
    join: Callable[[str, int, int], Peers],
    build: Callable[[Member], PartDecoder],
    *,
    module: str = "",
    lost: Callable[[int], Any] = lambda _status: os._exit(_LOST),
) -> Leading:
    """Start the followers, and build a decoder that leads them.

    Args:
        join: see `Device.join`.
        build: builds this process's decoder.
        module: the Python module that followers run, instead of this one.
        lost: called with a follower's exit status if it is not 0.

    Raises:
        CudaUnavailable: a follower cannot serve.
    """
    count = config.tensor_parallel
    folder = tempfile.TemporaryDirectory(prefix="veneer-cards-")
    file = str(Path(folder.name) / "meeting")
    links = []
    for index in range(1, count):
        link, process = _start(module or MODULE)
        links.append(link)
        link.steps.send(_Given(config, num_blocks, index, file))
        watch = threading.Thread(target=_watch, args=(process, index, lost), daemon=True)
        watch.start()
    _answers(links)
    peers = join(file, 0, count)
    decoder = build(_member(config, 0, peers))
    _answers(links)
    leading = Leading(decoder, links)
    weakref.finalize(leading, _end, links, folder).atexit = False
    return leading


def _member(config: EngineConfig, index: int, peers: Peers) -> Member:
    whole = read_decoder_config(Path(config.base_folder))
    return Member(Shard(index, config.tensor_parallel), whole, peers)


def _start(module: str) -> tuple[MemberLink, subprocess.Popen[bytes]]:
    steps, their_steps = Pipe()
    copies, their_copies = Pipe()
    theirs = their_steps.fileno(), their_copies.fileno()
    process = subprocess.Popen(child_python("-m", module, *map(str, theirs)), pass_fds=theirs)
    their_steps.close()
    their_copies.close()
    return MemberLink(steps, copies), process


def _watch(process: subprocess.Popen[bytes], index: int, lost: Callable[[int], Any]) -> None:
    if status := process.wait():
        log.critical("the process of card %d has ended with %d", index, status)
        lost(status)


def _answers(links: list[MemberLink]) -> None:
    """Wait until each follower has reported success for its current stage of starting.

    Raises:
        CudaUnavailable: a follower has failed.
    """
    for index, link in enumerate(links, 1):
        try:
            why = link.steps.recv()
        except EOFError:
            why = "its process has ended"
        if why:
            _close(links)
            raise chosen.CudaUnavailable(f"card {index}: {why}")


def _close(links: list[MemberLink]) -> None:
    for link in links:
        link.close()


def _end(links: list[MemberLink], folder: tempfile.TemporaryDirectory[str]) -> None:
    # Removed only now: the process group may use its file as long as it exists.
    _close(links)
    folder.cleanup()


def run(link: MemberLink, ended: Callable[[], Any]) -> None:
    """Run a follower: build its decoder, then carry out the leader's messages."""
    given: _Given = link.steps.recv()
    config, index, count = given.config, given.index, given.config.tensor_parallel
    logs.configure(config.log_format, process="engine")
    torch.set_num_threads(1)
    shard = Shard(index, count)
    try:
        card = chosen.open_device(torch.device("cuda", index))
        weights = chosen.loaded(config, card, shard)
    except (RuntimeError, ValueError, VeneerError) as error:
        link.steps.send(str(error))
        return
    link.steps.send("")
    peers = card.join(given.file, index, count)
    member = _member(config, index, peers)
    decoder = chosen.decoder_of(config, card, weights, given.num_blocks, member)
    link.steps.send("")

    def pinned(numbers: int) -> torch.Tensor:
        return card.pinned(numbers, dtype=torch.bfloat16)

    follow(decoder, link, pinned, ended)


def main(ended: Callable[[], Any] = lambda: os._exit(0)) -> None:
    """Entry point. The program's arguments are the file descriptors of its two connections."""
    steps, copies = (Connection(int(descriptor)) for descriptor in sys.argv[1:])
    with contextlib.suppress(EOFError):  # the leader is gone
        run(MemberLink(steps, copies), ended)


if __name__ == "__main__":
    main()
