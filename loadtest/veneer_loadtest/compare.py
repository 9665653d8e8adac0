"""Ours beside a peer: the same base, adapters, prompts and threads, in one run.

A result file holds:

- ``kind``: ``"compare"``
- ``conditions``: time, command, machine, load average before the run (`report`)
- ``versions``: of the packages on both sides; ``device`` of the server and peer
- ``commands``: what was started, ``{"server": ..., "peer": ...}``
- ``workload``: streams, adapters, rank, prompt_tokens, tokens, repeat, threads, seed
- ``gate``: see `gate.Gate`; its passing comes before any speed figure
- ``levels``: one for each number of streams, with ``streams``, ``ratio`` (ours / peer,
  of the median tokens/s), ``ranges_overlap`` and, under ``ours`` and ``peft``:
  ``tokens_per_s`` {median, low, high}, ``first_token_ms`` {p50, p99},
  ``inter_token_ms`` {p50, p99}, ``client_cpu_share`` (load generator's CPU time /
  wall time), ``rounds`` [{wall_s, tokens}] in the order they ran; and ``same_tokens``,
  the share of greedy tokens equal to the peer's up to each row's first difference
  (the two may part at a near tie; the gate is what counts)
- ``summary``: ``ratio_N`` for each number of streams
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from veneer_client import AsyncClient

from veneer_loadtest import gate as correctness
from veneer_loadtest.peer import PeftPeerProcess
from veneer_loadtest.peer_messages import Generate
from veneer_loadtest.report import median, percentile
from veneer_loadtest.runner import Round, run_round
from veneer_loadtest.workload import Stream, make_streams

__all__ = [
    "CompareOptions",
    "Level",
    "SystemName",
    "abba",
    "check",
    "measure",
    "same_prefix_share",
]

SystemName = Literal["ours", "peft"]

WARM_UP_TOKENS: int = 16


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What `compare` measures.

    Attributes:
        adapters: name -> folder; published on the server before.
        vocab: tokens of the base's vocabulary.
        prompt_tokens: shortest and longest prompt.
        tokens: new tokens of each stream.
        repeat: rounds of each system at each number of streams.
    """

    adapters: Mapping[str, Path]
    vocab: int
    streams: tuple[int, ...]
    prompt_tokens: tuple[int, int]
    tokens: int
    repeat: int
    seed: int

    def workload(self, streams: int) -> tuple[Stream, ...]:
        """The requests of one round."""
        return make_streams(
            tuple(self.adapters),
            count=streams,
            prompt_tokens=self.prompt_tokens,
            vocab=self.vocab,
            seed=self.seed + streams,
        )


@dataclass(frozen=True, slots=True)
class Level:
    """Both systems at one number of streams, rounds in the order they ran."""

    streams: int
    ours: tuple[Round, ...]
    peft: tuple[Round, ...]

    @property
    def ratio(self) -> float:
        """Ours / PEFT, of the median tokens a second."""
        return median(r.tokens_per_s for r in self.ours) / median(
            r.tokens_per_s for r in self.peft
        )

    @property
    def ranges_overlap(self) -> bool:
        """Where they do, no win may be claimed."""
        ours = [r.tokens_per_s for r in self.ours]
        peft = [r.tokens_per_s for r in self.peft]
        return min(ours) <= max(peft) and min(peft) <= max(ours)

    def as_json(self) -> dict[str, object]:
        """See the module's docstring."""
        return {
            "streams": self.streams,
            "ratio": self.ratio,
            "ranges_overlap": self.ranges_overlap,
            "same_tokens": same_prefix_share(self.ours[0].rows, self.peft[0].rows),
            "ours": _figures(self.ours),
            "peft": _figures(self.peft),
        }


def _figures(rounds: Sequence[Round]) -> dict[str, object]:
    rates = [r.tokens_per_s for r in rounds]
    first = [t for r in rounds for t in r.first_token_s]
    gaps = [t for r in rounds for t in r.gaps_s]
    return {
        "tokens_per_s": {"median": median(rates), "low": min(rates), "high": max(rates)},
        "first_token_ms": {"p50": median(first) * 1e3, "p99": percentile(first, 0.99) * 1e3},
        "inter_token_ms": {"p50": median(gaps) * 1e3, "p99": percentile(gaps, 0.99) * 1e3},
        "client_cpu_share": sum(r.client_cpu_s for r in rounds) / sum(r.wall_s for r in rounds),
        "rounds": [{"wall_s": r.wall_s, "tokens": r.tokens} for r in rounds],
    }


def abba(repeat: int) -> Iterator[SystemName]:
    """Ours, PEFT, PEFT, ours, ...: each ``repeat`` times, so that drift hits both."""
    for number in range(repeat):
        yield from ("ours", "peft") if number % 2 == 0 else ("peft", "ours")


def same_prefix_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Tokens equal up to each row's first difference / all tokens."""
    same = 0
    for row, other in zip(ours, theirs, strict=True):
        for a, b in zip(row, other, strict=True):
            if a != b:
                break
            same += 1
    return same / max(1, sum(len(row) for row in ours))


async def check(
    client: AsyncClient, peer: PeftPeerProcess, options: CompareOptions
) -> correctness.Gate:
    """The correctness gate with one stream for each adapter.

    Raises:
        GateFailed: see `gate.check`.
    """
    streams = options.workload(len(options.adapters))
    return await correctness.check(client, peer, streams, options.tokens)


async def measure(
    client: AsyncClient, peer: PeftPeerProcess, options: CompareOptions, streams: int
) -> Level:
    """Warm both up, then run the rounds in ABBA order, one system at a time."""
    work = options.workload(streams)
    await run_round(client, work, WARM_UP_TOKENS)
    await _peft_round(peer, work, WARM_UP_TOKENS)
    rounds: dict[SystemName, list[Round]] = {"ours": [], "peft": []}
    for system in abba(options.repeat):
        if system == "ours":
            rounds[system].append(await run_round(client, work, options.tokens))
        else:
            rounds[system].append(await _peft_round(peer, work, options.tokens))
    return Level(streams, tuple(rounds["ours"]), tuple(rounds["peft"]))


async def _peft_round(peer: PeftPeerProcess, work: Sequence[Stream], tokens: int) -> Round:
    done = await peer.generate(
        Generate(
            prompts=[list(stream.prompt) for stream in work],
            adapters=[stream.adapter for stream in work],
            tokens=tokens,
        )
    )
    gaps = [b - a for a, b in zip(done.step_s, done.step_s[1:], strict=False)]
    return Round(
        wall_s=done.wall_s,
        tokens=sum(len(row) for row in done.rows),
        # One padded batch: every row gets its token at the end of each step.
        first_token_s=(done.step_s[0],) * len(work),
        gaps_s=tuple(gaps) * len(work),
        client_cpu_s=0.0,
        rows=tuple(tuple(row) for row in done.rows),
    )
