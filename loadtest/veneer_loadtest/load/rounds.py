"""Send a whole load as one round of a measurement."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from veneer_loadtest.errors import TargetFailed
from veneer_loadtest.load.generator import generate
from veneer_loadtest.load.spec import LoadSpec
from veneer_loadtest.load.targets import TargetSpec

_TIMEOUT_S: float = 600.0


@dataclass(frozen=True, slots=True)
class Round:
    """Measurements of one load on one system.

    Attributes:
        wall_s: from the first call to the last token of the last stream.
        tokens: new tokens in total.
        first_token_s: time to first token of each stream.
        gaps_s: time between tokens, all streams together.
        client_cpu_s: CPU time of the load generator (0 for a system without one).
        cached_prompt_tokens: prompt tokens found in the prefix cache, all streams.
    """

    wall_s: float
    tokens: int
    first_token_s: tuple[float, ...]
    gaps_s: tuple[float, ...]
    client_cpu_s: float
    cached_prompt_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second."""
        return self.tokens / self.wall_s


async def send_round(name: str, load: LoadSpec, target: TargetSpec) -> Round:
    """Send a load from a separate process, as a server's users would.

    Args:
        name: name of the server, for errors.

    Raises:
        TargetFailed: a request failed, or an answer had no token.
    """
    loaded = await generate(load, target, workers=1, timeout_s=_TIMEOUT_S, stop=asyncio.Event())
    records = loaded.records
    bad = [record for record in records if record.outcome != "ok"]
    if bad or loaded.failure:
        reason = bad[0].reason if bad else loaded.failure
        raise TargetFailed(f"{name}: {len(bad)} of {len(records)} requests failed: {reason}")
    if any(r.first_token_s is None for r in records):
        raise TargetFailed(f"{name}: an answer had no token with text")
    return Round(
        wall_s=max(r.end_s for r in records) - min(r.due_s for r in records),
        tokens=sum(r.tokens for r in records),
        first_token_s=tuple(r.first_token_s for r in records if r.first_token_s is not None),
        gaps_s=tuple(gap for r in records for gap in r.gap_values()),
        client_cpu_s=loaded.cpu_s,
        cached_prompt_tokens=sum(r.cached for r in records),
    )
