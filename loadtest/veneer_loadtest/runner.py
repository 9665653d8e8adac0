"""Runs streams against a server over gRPC and notes when each token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from veneer_client import AsyncClient, GenerationEnd, Tokens

from veneer_loadtest.workload import Stream

__all__ = ["Round", "StreamRun", "run_round", "run_stream"]


@dataclass(frozen=True, slots=True)
class StreamRun:
    """One answered stream.

    Attributes:
        arrival_s: seconds from the call to each token's arrival at the client.
            Tokens that came in one message have one time.
        end: what the server said of it.
    """

    token_ids: tuple[int, ...]
    arrival_s: tuple[float, ...]
    end: GenerationEnd


@dataclass(frozen=True, slots=True)
class Round:
    """One batch of streams through one system.

    Attributes:
        wall_s: from the first call to the last token of the last stream.
        tokens: new tokens in all.
        first_token_s: one for each stream.
        gaps_s: time between tokens, all streams together.
        client_cpu_s: CPU time of the load generator itself (0 for a peer without one).
        rows: the new tokens of each stream.
        cached_prompt_tokens: prompt tokens found in the prefix cache, all streams.
    """

    wall_s: float
    tokens: int
    first_token_s: tuple[float, ...]
    gaps_s: tuple[float, ...]
    client_cpu_s: float
    rows: tuple[tuple[int, ...], ...]
    cached_prompt_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second."""
        return self.tokens / self.wall_s


async def run_stream(
    client: AsyncClient, stream: Stream, tokens: int, *, use_prefix_cache: bool = False
) -> StreamRun:
    """One greedy stream of exactly ``tokens`` new tokens.

    The prefix cache is off unless asked for: rounds repeat prompts, and a peer
    computes them anew each time.

    Raises:
        VeneerError: the call failed.
    """
    start = time.perf_counter()
    ids: list[int] = []
    arrivals: list[float] = []
    async with client.generate_stream(
        Tokens(stream.prompt),
        adapter=stream.adapter,
        max_tokens=tokens,
        temperature=0.0,
        ignore_eos=True,
        use_prefix_cache=use_prefix_cache,
    ) as call:
        async for chunk in call:
            now = time.perf_counter() - start
            ids += chunk.token_ids
            arrivals += [now] * len(chunk.token_ids)
        return StreamRun(tuple(ids), tuple(arrivals), call.final)


async def run_round(
    client: AsyncClient,
    streams: Sequence[Stream],
    tokens: int,
    *,
    use_prefix_cache: bool = False,
) -> Round:
    """All streams at once, one call each; returns when the last has ended.

    Raises:
        VeneerError: any of the calls failed (the others are cancelled).
    """
    cpu, start = time.process_time(), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                run_stream(client, stream, tokens, use_prefix_cache=use_prefix_cache)
            )
            for stream in streams
        ]
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    runs = [task.result() for task in tasks]
    return Round(
        wall_s=wall_s,
        tokens=sum(len(run.token_ids) for run in runs),
        first_token_s=tuple(run.arrival_s[0] for run in runs),
        gaps_s=tuple(
            after - before
            for run in runs
            for before, after in zip(run.arrival_s, run.arrival_s[1:], strict=False)
        ),
        client_cpu_s=cpu_s,
        rows=tuple(run.token_ids for run in runs),
        cached_prompt_tokens=sum(run.end.usage.cached_prompt_tokens for run in runs),
    )
