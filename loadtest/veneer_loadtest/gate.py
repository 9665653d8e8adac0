"""The correctness gate: no speed figure before both systems compute the same thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from veneer_client import AsyncClient, Tokens, VeneerError

from veneer_loadtest.peer import PeftPeerProcess
from veneer_loadtest.peer_messages import Score
from veneer_loadtest.report import percentile
from veneer_loadtest.runner import run_round
from veneer_loadtest.workload import Stream

__all__ = ["Gate", "GateFailed", "check"]

MEAN_BOUND: Final = 0.2
P99_BOUND: Final = 1.0
"""Nats a token. Both sides multiply the same NF4 weights in bf16 (8 bits of
mantissa), in another order, through all layers. Measured on SmolLM2-135M against the
same weights in fp32: PEFT is off by 0.095 on average over prompts of random tokens
(which are unlikely, so that errors are large) and 0.033 over greedy answers, ours by
0.081 and 0.031; the two differ by 0.106 and 0.040, 99th percentile 0.36. The bounds
leave twice that, since they must hold for any base."""

DISTINCT: Final = 2.0
"""A wrong adapter must move log-probabilities at least this many times further than
the two systems differ: else the gate could not see a mix-up, and says so."""


class GateFailed(VeneerError):
    """The server's log-probabilities are not those of PEFT."""

    code = "FAILED_PRECONDITION"
    reason = "GATE_FAILED"


@dataclass(frozen=True, slots=True)
class Gate:
    """What the gate saw.

    Attributes:
        tokens: teacher-forced tokens compared (prompts and answers).
        mean, p99, worst: absolute difference of log-probabilities, nats.
        mean_bound, p99_bound: what was allowed.
        other_adapter_mean: mean absolute difference that another adapter makes, in
            PEFT; None with one adapter.
        own_best: answers that PEFT scores best under the adapter that made them.
        smallest_margin: least lead of the own adapter over the next one, nats for
            the whole answer; below 0 where another adapter is better.
        answers: answers scored.
    """

    tokens: int
    mean: float
    p99: float
    worst: float
    mean_bound: float
    p99_bound: float
    other_adapter_mean: float | None
    own_best: int
    smallest_margin: float
    answers: int

    def as_json(self) -> Mapping[str, object]:
        """For a result file."""
        return asdict(self)


async def check(
    client: AsyncClient,
    peer: PeftPeerProcess,
    streams: Sequence[Stream],
    tokens: int,
) -> Gate:
    """Answer ``streams`` (one for each adapter) in one batch on the server; score the
    answers teacher-forced on both sides, and on PEFT's under every adapter.

    Raises:
        GateFailed: out of bounds, or an answer fits another adapter better.
    """
    answered = await run_round(client, streams, tokens)
    adapters = [stream.adapter for stream in streams]
    differences: list[float] = []
    others: list[float] = []
    margins: list[float] = []
    for stream, answer in zip(streams, answered.rows, strict=True):
        row = [*stream.prompt, *answer]
        scores = {
            adapter: (await peer.score(Score(row=row, adapter=adapter))).logprobs
            for adapter in adapters
        }
        ours = await _server_score(client, row, stream.adapter)
        theirs = scores[stream.adapter]
        differences += [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        for name, scored in scores.items():
            if name != stream.adapter:
                others += [abs(a - b) for a, b in zip(scored, theirs, strict=True)]
        sums = {name: sum(s[len(stream.prompt) - 1 :]) for name, s in scores.items()}
        own = sums.pop(stream.adapter)
        if sums:
            margins.append(own - max(sums.values()))
    gate = Gate(
        tokens=len(differences),
        mean=sum(differences) / len(differences),
        p99=percentile(differences, 0.99),
        worst=max(differences),
        mean_bound=MEAN_BOUND,
        p99_bound=P99_BOUND,
        other_adapter_mean=sum(others) / len(others) if others else None,
        own_best=len(streams) - sum(margin <= 0 for margin in margins),
        smallest_margin=min(margins, default=0.0),
        answers=len(streams),
    )
    if not _passes(gate):
        raise GateFailed(
            "the server does not compute what PEFT computes, or the adapters are too alike "
            f"to tell, so its speed means nothing: {gate}"
        )
    return gate


def _passes(gate: Gate) -> bool:
    within = gate.mean <= gate.mean_bound and gate.p99 <= gate.p99_bound
    other = gate.other_adapter_mean
    distinct = other is None or other >= DISTINCT * gate.mean
    return within and distinct and gate.own_best == gate.answers


async def _server_score(client: AsyncClient, row: list[int], adapter: str) -> list[float]:
    """Log-probabilities of the row's tokens after the first."""
    answer = await client.generate(
        Tokens(tuple(row)),
        adapter=adapter,
        max_tokens=1,
        temperature=0.0,
        logprobs=True,
        echo=True,
    )
    return [item.logprob for item in answer.prompt_logprobs]
