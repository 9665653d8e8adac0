"""The interface of an attack: what one caller does to harm the others.

An attack is a module in ``tests/attacks/cases``; the runner finds it by its file name::

    TITLE = "a schema whose grammar has a hundred million states"
    FLAGS = ("--max-queue", "64")            # optional: flags of the server
    KEYS = True                              # optional: a server with keys, see `Target.keys`
    LOADS = 1 << 30                          # optional: bytes that the server may hold for it
    WAITS = 10                               # optional: see below
    BUG = Bug("veneer_server.a.b", "if size > limit:", "if False:")  # with it, the attack fails

    async def attack(target: Target) -> list[str]:
        '''Repeats the attack for `target.seconds`. Returns a line for each answer that was not
        as documented; empty if every answer was right.'''

The runner (`python -m tests.attacks`) attacks a server that also serves 4 normal streams; if
times count, it first makes a run without the attack. Attacks share a server as far as their
flags allow, and a server that has been harmed is replaced. The runner checks the streams'
longest gap between tokens, the growth of the processes' memory, that all other callers were
answered and that the server works afterwards. So a module only attacks, and only the addresses
that it is given. With
``WAITS`` of control gaps more than others a new caller may wait, where that is by design. With
``--bugs`` each attack runs against a server that has its `BUG`, and must fail.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from veneer_server.access.principal import Role

KEYS: Final[dict[str, tuple[str, Role]]] = {
    "operator": ("default", "operator"),
    "team-a": ("team-a", "admin"),
    "team-b": ("team-b", "admin"),
    "inference-a": ("team-a", "inference"),
    "inference-b": ("team-b", "inference"),
}
"""Keys of a server with keys: tenant and role. The normal callers use the operator's."""


@dataclass(frozen=True, slots=True)
class Bug:
    """A planted bug that the attack must notice: an edit of the server's source in its process.

    Attributes:
        module: the edited module.
        old, new: text and its replacement; ``old`` is in the module's source once, inside a
            function.
        process: which process is edited.
    """

    module: str
    old: str
    new: str
    process: Literal["front", "engine"] = "front"


@dataclass(frozen=True, slots=True)
class Target:
    """The server under attack, and how much to do.

    Attributes:
        grpc: host:port of the gRPC server.
        openai: host:port of the OpenAI-compatible HTTP server.
        metrics: host:port of the metrics server.
        seconds: about how long to attack; the attack ends by itself.
        full: run the whole attack; otherwise a short form for every test run.
        times: also judge how long answers take; otherwise only answers, memory and bounds.
        rng: source of all randomness; its seed is printed.
        work: an empty folder.
        adapter: an adapter that the server has.
        keys: API keys by the names in `KEYS`; empty on a server without keys.
        keys_file: the file with these keys, for attacks that add their own keys.
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
    keys: dict[str, str]
    keys_file: Path

    def metadata(self, key: str) -> tuple[tuple[str, str], ...]:
        """Return the gRPC metadata (also used as HTTP headers) of a caller with that key."""
        return (("authorization", f"Bearer {self.keys[key]}"),)


class AttackModule(Protocol):
    """What an attack's module must define, besides the optional ``FLAGS``, ``KEYS``, ``LOADS``,
    ``WAITS`` and ``BUG``."""

    TITLE: str

    async def attack(self, target: Target) -> list[str]: ...
