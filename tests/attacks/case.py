"""The shape of an attack: what one caller does to harm the others.

An attack is a module in ``tests/attacks/cases``; the runner finds it by its file name::

    TITLE = "a schema whose grammar has a hundred million states"
    FLAGS = ("--max-queue", "64")            # optional: flags of the server

    async def attack(target: Target) -> list[str]:
        '''Repeats the attack for `target.seconds`. Returns a line for each answer that was not
        as documented; empty if every answer was right.'''

The runner (`python -m tests.attacks`) attacks a server beside 4 normal streams, after a run
without the attack where times count. Attacks share a server as far as their flags allow, and
one that has been harmed is replaced. The runner checks the streams' longest gap between tokens,
the growth of the processes' memory, that all other callers were answered and that the server
works afterwards. So a module only attacks, and only the addresses that it is given.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["AttackModule", "Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """The server under attack, and how much to do.

    Attributes:
        grpc: host:port of the gRPC server.
        openai: host:port of the OpenAI-compatible HTTP server.
        metrics: host:port of the metrics server.
        seconds: about how long to attack; the attack ends by itself.
        full: the whole attack; else a short form for every test run.
        times: also judge how long answers take; else only answers, memory and bounds.
        rng: source of all randomness; its seed is printed.
        work: an empty folder.
        adapter: an adapter that the server has.
    """

    grpc: str
    openai: str
    metrics: str
    seconds: float
    full: bool
    times: bool
    rng: random.Random
    work: Path
    adapter: str


class AttackModule(Protocol):
    """What the runner needs from an attack's module; ``FLAGS`` is optional."""

    TITLE: str

    async def attack(self, target: Target) -> list[str]: ...
