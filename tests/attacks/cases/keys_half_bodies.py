"""Half-sent HTTP bodies beside callers with keys: of strangers, and of another tenant."""

from __future__ import annotations

from tests.attacks.case import Bug, Target
from tests.attacks.cases import http_half_bodies

TITLE = "half-sent HTTP bodies of strangers and of another tenant"
FLAGS = http_half_bodies.FLAGS
KEYS = True
BUG = Bug(
    "veneer_server.openai.http.connection",
    "if (other := places.earns(self._place, owner or self._place.host)) is not None:",
    "if (other := None) is not None:",
)


async def attack(target: Target) -> list[str]:
    """Both must leave a caller with a key its connection, and let new ones in."""
    mine = target.keys["inference-a"]
    flooding = target.rng.choice(("", target.keys["inference-b"]))
    return await http_half_bodies.attack(target, mine, flooding)
