"""Half-sent HTTP bodies from strangers and from another tenant, beside callers with keys."""

from __future__ import annotations

from dataclasses import replace

from tests.attacks.case import Bug, Target
from tests.attacks.cases import http_half_bodies

TITLE = "half-sent HTTP bodies of strangers and of another tenant"
FLAGS = http_half_bodies.FLAGS
KEYS = True
BUG = Bug(
    "veneer_server.queues.connection_places",
    "return self._callers > self.most - max(1, self.most // NEWCOMERS)",
    "return False",
)


async def attack(target: Target) -> list[str]:
    """In both attacks, a caller with a key keeps its connection, and new ones are accepted."""
    mine, wrong = target.keys["inference-a"], []
    # Always run both: strangers alone do not show a tenant that takes the places of others.
    for flooding in target.rng.sample(("", target.keys["inference-b"]), 2):
        part = replace(target, seconds=target.seconds / 2)
        wrong += await http_half_bodies.attack(part, mine, flooding)
    return wrong
